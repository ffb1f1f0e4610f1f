package enforce

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Filters attaches programs to devices by clsact, where the kernel has no tcx. dataplane/link has one. Each place is a
// device, a direction and a handle; a program's return value means there what it means to tcx.
type Filters interface {
	// Attach puts a program, given by its descriptor, into a place, in one step when another stands there.
	Attach(ifindex int, egress bool, handle uint32, name string, program int) error
	// Program is the id of the program in a place.
	Program(ifindex int, egress bool, handle uint32) (id uint32, err error)
	// Detach empties a place; an empty one, and a device that is gone, are success.
	Detach(ifindex int, egress bool, handle uint32) error
	// Clear empties places on both sides of a device, and leaves nothing of ours on it.
	Clear(ifindex int, handles ...uint32) error
}

// Handles of filters. The kernel runs all of them in one priority, so a device may pass from one to the other while both
// stand.
const (
	handleTunnel   = 0x51670001
	handleGuard    = 0x51670002
	handleLoopback = 0x51670003
)

var handles = []uint32{handleTunnel, handleGuard, handleLoopback}

// filterName is what tc shows of every filter of ours.
const filterName = "signet"

// place is where a filter stands.
type place struct {
	ifindex int
	egress  bool
	handle  uint32
}

// chooseClsact says whether devices are judged by clsact: where the kernel has no tcx, or the configuration says so.
func chooseClsact(cfg Config) (bool, error) {
	if !cfg.Clsact {
		_, err := link.QueryPrograms(link.QueryOptions{Target: loopbackIndex, Attach: ebpf.AttachTCXEgress})
		if err == nil {
			return false, nil
		}
		if !errors.Is(err, ebpf.ErrNotSupported) && !errors.Is(err, unix.EINVAL) {
			return false, explain(fmt.Errorf("ask for tcx: %w", err))
		}
	}
	if cfg.Filters == nil {
		return false, ErrNoTCX
	}
	return true, nil
}

// ByClsact says that devices are judged by clsact filters.
func (e *Enforcer) ByClsact() bool { return e.cfg.Clsact }

// forClsact takes the place of attachment out of the programs of devices: kernels without tcx do not know its name.
func forClsact(spec *ebpf.CollectionSpec) {
	for _, p := range spec.Programs {
		if p.Type == ebpf.SchedCLS {
			p.AttachType = ebpf.AttachNone
		}
	}
}

// filterStands asks the kernel whether a filter is in its place and runs our program.
func (e *Enforcer) filterStands(h *hook) error {
	id, err := e.cfg.Filters.Program(h.place.ifindex, h.place.egress, h.place.handle)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotAttached, err)
	}
	if ebpf.ProgramID(id) != h.id {
		return otherProgram(ebpf.ProgramID(id))
	}
	return nil
}

// placeFilter makes a filter run our program.
func (e *Enforcer) placeFilter(h *hook) error {
	if e.filterStands(h) == nil {
		return nil
	}
	p := h.place
	if err := e.cfg.Filters.Attach(p.ifindex, p.egress, p.handle, filterName, h.prog.FD()); err != nil {
		return fmt.Errorf("attach %s: %w", h.name, err)
	}
	if err := e.filterStands(h); err != nil {
		return fmt.Errorf("attach %s: %w", h.name, err)
	}
	return nil
}

// leaveOther takes away what an earlier process attached in the other of the two ways, after everything stands in this one.
func (e *Enforcer) leaveOther() error {
	if e.cfg.Clsact {
		return e.leaveTCX()
	}
	if e.cfg.Filters == nil {
		return nil
	}
	if _, err := e.cfg.Filters.Program(loopbackIndex, true, handleLoopback); err != nil {
		return nil // whoever used filters had one there
	}
	return clearFilters(e.cfg.Filters)
}

func (e *Enforcer) leaveTCX() error {
	pins, err := os.ReadDir(e.cfg.links())
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	var errs []error
	for _, p := range pins {
		_, guard := guardIndex(p.Name())
		// A tunnel that is not attached yet stays judged by what an earlier process left.
		if h, wanted := e.wants[p.Name()]; guard || wanted && h.place != nil {
			errs = append(errs, removePin(e.cfg.links(), p.Name()))
		}
	}
	return errors.Join(errs...)
}

// clearFilters takes our filters off every device.
func clearFilters(f Filters) error {
	devices, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, d := range devices {
		if err := f.Clear(d.Index, handles...); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("clear the filters of %s: %w", d.Name, err))
		}
	}
	return errors.Join(errs...)
}
