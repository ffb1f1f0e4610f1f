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

// cgroupHooks are attached at the cgroup root; the names are those of the pins and of the programs. Without an optional
// one the host is judged all the same: Hooks names what is missing.
var cgroupHooks = [...]struct {
	name     string
	attach   ebpf.AttachType
	optional bool
}{
	{name: "egress", attach: ebpf.AttachCGroupInetEgress},
	{name: "ingress", attach: ebpf.AttachCGroupInetIngress},
	{name: "connect4", attach: ebpf.AttachCGroupInet4Connect},
	{name: "connect6", attach: ebpf.AttachCGroupInet6Connect},
	{name: "sendmsg4", attach: ebpf.AttachCGroupUDP4Sendmsg},
	{name: "sendmsg6", attach: ebpf.AttachCGroupUDP6Sendmsg},
	{name: "bind4", attach: ebpf.AttachCGroupInet4Bind},
	{name: "bind6", attach: ebpf.AttachCGroupInet6Bind},
	{name: hookSetsockopt, attach: ebpf.AttachCGroupSetsockopt, optional: true},
}

// hookSetsockopt keeps processes below the cgroup root from switching the queue, and with it the tunnel's judge, off.
const hookSetsockopt = "setsockopt"

// Names of device hooks. A guard's pins carry the device's index.
const (
	hookTunnelEgress  = "tunnel_egress"
	hookTunnelIngress = "tunnel_ingress"
	hookLoopback      = "lo_egress"
	hookGuard         = "guard"
)

const loopbackIndex = 1 // in every network namespace

// attachCgroup attaches the hooks that judge sockets. The packet hooks come first: they alone let nothing wrong pass.
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
		if err != nil && h.optional {
			e.log.Warn("hook is not attached", "hook", h.name, "error", err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// ensureTCX attaches a program at the head of a device, in front of other tools' programs.
func (e *Enforcer) ensureTCX(name, program string, index int, attach ebpf.AttachType) error {
	prog := e.coll.Programs[program]
	return e.ensure(hook{
		name: name, prog: prog,
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
	if err := e.ensureTCX(hookTunnelEgress, hookTunnelEgress, ifindex, ebpf.AttachTCXEgress); err != nil {
		return err
	}
	if err := e.ensureTCX(hookTunnelIngress, hookTunnelIngress, ifindex, ebpf.AttachTCXIngress); err != nil {
		return err
	}
	// The device is called the tunnel only once it is judged; and it stays guarded until then.
	if err := e.writer.settings(func(s *bpf.JudgeSettings) { s.Tunnel = uint32(ifindex) }); err != nil {
		return err
	}
	e.tunnel = ifindex
	return e.detachGuard(ifindex)
}

// attachDevices attaches to loopback and guards every device that is present; guards of devices that are gone go.
func (e *Enforcer) attachDevices() error {
	if err := e.ensureTCX(hookLoopback, hookLoopback, loopbackIndex, ebpf.AttachTCXEgress); err != nil {
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
		e.ensureTCX(egress, hookGuard, index, ebpf.AttachTCXEgress),
		e.ensureTCX(ingress, hookGuard, index, ebpf.AttachTCXIngress))
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
	return errors.Join(e.drop(egress), e.drop(ingress))
}

// Release detaches and unpins everything below the directory: overlay addresses are unguarded afterwards.
func Release(cfg Config) error {
	var errs []error
	for _, dir := range []string{cfg.links(), cfg.maps()} {
		pins, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("list pins: %w", err))
		}
		for _, p := range pins {
			// A link without pin and without process is detached by the kernel.
			if err := os.Remove(filepath.Join(dir, p.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, fmt.Errorf("remove pin: %w", err))
			}
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove pin directory: %w", err))
		}
	}
	if err := os.Remove(cfg.pins()); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("remove pin directory: %w", err))
	}
	return explain(errors.Join(errs...))
}
