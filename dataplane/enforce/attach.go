package enforce

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/signet-overlay/signet/bpf"
)

// cgroupHooks are attached at the cgroup root; the names are those of the pins and of the programs. Without those of
// packets nothing is judged; without another, Config.Accept must name it, and Hooks names what is missing.
var cgroupHooks = [...]struct {
	name   string
	kind   ebpf.ProgramType
	attach ebpf.AttachType
}{
	{name: "egress", kind: ebpf.CGroupSKB, attach: ebpf.AttachCGroupInetEgress},
	{name: "ingress", kind: ebpf.CGroupSKB, attach: ebpf.AttachCGroupInetIngress},
	{name: "connect4", kind: ebpf.CGroupSockAddr, attach: ebpf.AttachCGroupInet4Connect},
	{name: "connect6", kind: ebpf.CGroupSockAddr, attach: ebpf.AttachCGroupInet6Connect},
	{name: "sendmsg4", kind: ebpf.CGroupSockAddr, attach: ebpf.AttachCGroupUDP4Sendmsg},
	{name: "sendmsg6", kind: ebpf.CGroupSockAddr, attach: ebpf.AttachCGroupUDP6Sendmsg},
	{name: "bind4", kind: ebpf.CGroupSockAddr, attach: ebpf.AttachCGroupInet4Bind},
	{name: "bind6", kind: ebpf.CGroupSockAddr, attach: ebpf.AttachCGroupInet6Bind},
	{name: hookSetsockopt, kind: ebpf.CGroupSockopt, attach: ebpf.AttachCGroupSetsockopt},
}

// hookSetsockopt keeps processes below the cgroup root from switching the queue, and with it the tunnel's judge, off.
const hookSetsockopt = "setsockopt"

// Names of device hooks. A guard's pins carry the device's index.
const (
	hookTunnelEgress  = "tunnel_egress"
	hookTunnelIngress = "tunnel_ingress"
	hookLoopback      = "lo_egress"
	hookGuard         = "guard" // ingress
	hookGuardEgress   = "guard_egress"
)

const loopbackIndex = 1 // in every network namespace

// attachCgroup attaches the hooks that judge sockets. The packet hooks come first: they alone let nothing wrong pass. What
// is missing of the others is for refuseGaps to judge.
func (e *Enforcer) attachCgroup() error {
	for _, h := range cgroupHooks {
		prog := e.coll.Programs[h.name]
		err := e.ensure(hook{
			name: h.name, prog: prog,
			here: func(i *link.Info) bool { c := i.Cgroup(); return c != nil && c.CgroupId == e.cgroup },
			attach: func() (link.Link, error) {
				return link.AttachCgroup(link.CgroupOptions{Path: e.cfg.CgroupRoot, Attach: h.attach, Program: prog})
			},
		})
		if err != nil && optional(h.name) {
			e.log.Warn("hook is not attached", "hook", h.name, "error", err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// refuseGaps refuses to go on without a hook that the operator has not accepted to miss.
func (e *Enforcer) refuseGaps() error {
	for _, h := range cgroupHooks {
		if err := e.failed[h.name]; err != nil && !slices.Contains(e.cfg.Accept, h.name) {
			return fmt.Errorf("%w: %w", ErrNoHook, err)
		}
	}
	return nil
}

// ensureDevice attaches a program at the head of a device, in front of other tools' programs.
func (e *Enforcer) ensureDevice(name, program string, index int, attach ebpf.AttachType, handle uint32) error {
	prog := e.coll.Programs[program]
	if e.cfg.Clsact {
		return e.ensure(hook{name: name, prog: prog, device: index, place: &place{index, attach == ebpf.AttachTCXEgress, handle}})
	}
	return e.ensure(hook{
		name: name, prog: prog, device: index, side: attach,
		here: func(i *link.Info) bool { t := i.TCX(); return t != nil && int(t.Ifindex) == index },
		attach: func() (link.Link, error) {
			l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: attach, Anchor: link.Head()})
			if errors.Is(err, ebpf.ErrNotSupported) {
				err = fmt.Errorf("%w: %w", ErrNoTCX, err)
			}
			return l, err
		},
	})
}

// AttachTunnel judges what passes the tunnel device. Call it before the device is up. It is idempotent; another device
// takes the place of the one before.
func (e *Enforcer) AttachTunnel(ifindex int) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return ErrClosed
	}
	return explain(e.attachTunnel(ifindex))
}

// ErrNotTunnel: what passes the tunnel and is not of the overlay is denied, so a device of the underlay must never be
// taken for it.
var ErrNotTunnel = errors.New("device has a link-layer address, so it is no tunnel")

func (e *Enforcer) attachTunnel(ifindex int) error {
	device, err := net.InterfaceByIndex(ifindex)
	if err != nil {
		return fmt.Errorf("tunnel device %d: %w", ifindex, err)
	}
	if len(device.HardwareAddr) > 0 || device.Flags&net.FlagLoopback != 0 {
		return fmt.Errorf("tunnel device %s: %w", device.Name, ErrNotTunnel)
	}
	if err := e.ensureDevice(hookTunnelEgress, hookTunnelEgress, ifindex, ebpf.AttachTCXEgress, handleTunnel); err != nil {
		return err
	}
	if err := e.ensureDevice(hookTunnelIngress, hookTunnelIngress, ifindex, ebpf.AttachTCXIngress, handleTunnel); err != nil {
		return err
	}
	// The device is called the tunnel only once it is judged; and it stays guarded until then.
	if err := e.writer.settings(func(s *bpf.JudgeSettings) { s.Tunnel = uint32(ifindex) }); err != nil {
		return err
	}
	e.tunnel = ifindex
	errs := []error{e.detachGuard(ifindex)}
	if e.cfg.Clsact {
		errs = append(errs, e.leaveTCX())
	}
	return errors.Join(errs...)
}

// attachDevices attaches to loopback and guards every device that is present; guards of devices that are gone go.
func (e *Enforcer) attachDevices() error {
	if err := e.ensureDevice(hookLoopback, hookLoopback, loopbackIndex, ebpf.AttachTCXEgress, handleLoopback); err != nil {
		return err
	}
	devices, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	present := map[int]bool{}
	for _, d := range devices {
		present[d.Index] = true
		if err := e.attachGuard(d.Index, d.Name); err != nil {
			// Told by Hooks: one odd device must not keep the host unguarded.
			e.log.Warn("device is not guarded", "device", d.Name, "error", err)
		}
	}
	pins, err := os.ReadDir(e.cfg.links())
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	for _, p := range pins {
		if index, ok := guardIndex(p.Name()); ok && !present[index] {
			if err := e.drop(p.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

func guardNames(index int) (egress, ingress string) {
	return hookGuard + "_egress_" + strconv.Itoa(index), hookGuard + "_ingress_" + strconv.Itoa(index)
}

// guardIndex reads the device's index from the name of a guard's pin.
func guardIndex(name string) (int, bool) {
	rest, ok := strings.CutPrefix(name, hookGuard+"_")
	if !ok {
		return 0, false
	}
	_, number, _ := strings.Cut(rest, "_")
	index, err := strconv.Atoi(number)
	return index, err == nil
}

// AttachGuard keeps overlay addresses off a device that is not the tunnel, both ways. It is idempotent; the tunnel and
// loopback are never guarded, and asking for it does nothing. name is for messages.
func (e *Enforcer) AttachGuard(ifindex int, name string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return ErrClosed
	}
	if err := e.attachGuard(ifindex, name); err != nil {
		return explain(fmt.Errorf("guard %s: %w", name, err))
	}
	return nil
}

func (e *Enforcer) attachGuard(index int, name string) error {
	if index == loopbackIndex || index == e.tunnel {
		return nil
	}
	egress, ingress := guardNames(index)
	return errors.Join(
		e.ensureDevice(egress, hookGuardEgress, index, ebpf.AttachTCXEgress, handleGuard),
		e.ensureDevice(ingress, hookGuard, index, ebpf.AttachTCXIngress, handleGuard))
}

// Guards lists the devices that are guarded, or should be, by index.
func (e *Enforcer) Guards() []int {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []int
	for name := range e.wants {
		if index, ok := guardIndex(name); ok && !slices.Contains(out, index) {
			out = append(out, index)
		}
	}
	return out
}

// DetachGuard forgets the guard of a device that is gone. It is idempotent.
func (e *Enforcer) DetachGuard(ifindex int) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return ErrClosed
	}
	return e.detachGuard(ifindex)
}

func (e *Enforcer) detachGuard(index int) error {
	egress, ingress := guardNames(index)
	errs := []error{e.drop(egress), e.drop(ingress)}
	if e.cfg.Clsact { // an earlier process may have left them
		errs = append(errs, e.cfg.Filters.Detach(index, true, handleGuard), e.cfg.Filters.Detach(index, false, handleGuard))
	}
	return errors.Join(errs...)
}

// Release detaches and unpins everything below the directory, of every version: overlay addresses are unguarded afterwards.
func Release(cfg Config) error {
	versions, err := cfg.versions()
	errs := []error{err}
	for _, dir := range versions {
		errs = append(errs, releaseVersion(dir))
	}
	if cfg.Filters != nil {
		errs = append(errs, clearFilters(cfg.Filters))
	}
	return explain(errors.Join(errs...))
}

// versions lists the directories of pins, one for each version of the layout.
func (c Config) versions() ([]string, error) {
	all, err := os.ReadDir(c.BPFFS)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list pins: %w", err)
	}
	var out []string
	for _, entry := range all {
		number, ok := strings.CutPrefix(entry.Name(), "v")
		if _, err := strconv.Atoi(number); ok && err == nil && entry.IsDir() {
			out = append(out, filepath.Join(c.BPFFS, entry.Name()))
		}
	}
	return out, nil
}

// releaseVersion removes the pins of one version, links first: from then on nothing reads the maps.
func releaseVersion(pins string) error {
	var errs []error
	for _, dir := range []string{filepath.Join(pins, dirLinks), filepath.Join(pins, dirMaps)} {
		all, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("list pins: %w", err))
		}
		for _, p := range all {
			// A link without pin and without process is detached by the kernel.
			if err := os.Remove(filepath.Join(dir, p.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, fmt.Errorf("remove pin: %w", err))
			}
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove pin directory: %w", err))
		}
	}
	if err := os.Remove(pins); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("remove pin directory: %w", err))
	}
	return errors.Join(errs...)
}
