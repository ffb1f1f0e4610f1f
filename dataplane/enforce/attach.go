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

// cgroupHooks are attached at the cgroup root; the names are those of the pins and of the programs.
var cgroupHooks = [...]struct {
	name   string
	attach ebpf.AttachType
}{
	{"egress", ebpf.AttachCGroupInetEgress},
	{"ingress", ebpf.AttachCGroupInetIngress},
	{"connect4", ebpf.AttachCGroupInet4Connect},
	{"connect6", ebpf.AttachCGroupInet6Connect},
	{"sendmsg4", ebpf.AttachCGroupUDP4Sendmsg},
	{"sendmsg6", ebpf.AttachCGroupUDP6Sendmsg},
	{"bind4", ebpf.AttachCGroupInet4Bind},
	{"bind6", ebpf.AttachCGroupInet6Bind},
}

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
		same := func(i *link.Info) bool { c := i.Cgroup(); return c != nil && c.CgroupId == e.cgroup }
		err := e.ensure(h.name, prog, same, func() (link.Link, error) {
			return link.AttachCgroup(link.CgroupOptions{Path: e.cfg.CgroupRoot, Attach: h.attach, Program: prog})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// ensureTCX attaches a program at the head of a device, in front of other tools' programs.
func (e *Enforcer) ensureTCX(name, program string, index int, attach ebpf.AttachType) error {
	prog := e.coll.Programs[program]
	same := func(i *link.Info) bool { t := i.TCX(); return t != nil && int(t.Ifindex) == index }
	return e.ensure(name, prog, same, func() (link.Link, error) {
		l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: attach, Anchor: link.Head()})
		if errors.Is(err, ebpf.ErrNotSupported) {
			err = fmt.Errorf("%w: %w", ErrNoTCX, err)
		}
		return l, err
	})
}

// ensure makes the pinned link of a hook run prog. A link that stands is updated in one step, without a moment between
// the two programs. One that was severed with its device or cgroup, or belongs to another, is replaced.
func (e *Enforcer) ensure(name string, prog *ebpf.Program, same func(*link.Info) bool, attach func() (link.Link, error)) error {
	path := filepath.Join(e.cfg.links(), name)
	old, err := link.LoadPinnedLink(path, nil)
	if err == nil && adopt(old, prog, same) == nil {
		e.keep(name, old)
		return nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		e.log.Warn("pinned link cannot be opened and is replaced", "hook", name, "error", err)
	}
	l, attachErr := attach()
	if old != nil {
		// After the new one is attached, so that there is no gap.
		if err := old.Close(); err != nil {
			e.log.Warn("close replaced link", "hook", name, "error", err)
		}
	}
	if attachErr != nil {
		e.failed[name] = attachErr
		return fmt.Errorf("attach %s: %w", name, attachErr)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return errors.Join(fmt.Errorf("remove the pin of %s: %w", name, err), l.Close())
	}
	if err := l.Pin(path); err != nil {
		return errors.Join(fmt.Errorf("pin %s: %w", name, err), l.Close())
	}
	e.keep(name, l)
	return nil
}

// errOtherTarget: the link stands, but elsewhere than asked for.
var errOtherTarget = errors.New("link is attached elsewhere")

// adopt updates a link that is attached where it should be.
func adopt(l link.Link, prog *ebpf.Program, same func(*link.Info) bool) error {
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("read link: %w", err)
	}
	if !same(info) {
		return errOtherTarget
	}
	if err := l.Update(prog); err != nil {
		return fmt.Errorf("update link: %w", err)
	}
	return nil
}

func (e *Enforcer) keep(name string, l link.Link) {
	if old := e.links[name]; old != nil && old != l {
		if err := old.Close(); err != nil {
			e.log.Warn("close replaced link", "hook", name, "error", err)
		}
	}
	e.links[name] = l
	delete(e.failed, name)
}

// drop takes a hook away: its pin is the last that holds it.
func (e *Enforcer) drop(name string) error {
	var errs []error
	if l := e.links[name]; l != nil {
		errs = append(errs, l.Close())
		delete(e.links, name)
	}
	delete(e.failed, name)
	if err := os.Remove(filepath.Join(e.cfg.links(), name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("remove the pin of %s: %w", name, err))
	}
	return errors.Join(errs...)
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

// HookStatus is one place in the kernel where the judge should stand.
type HookStatus struct {
	Name     string
	Attached bool
	Err      error // why it is not attached
}

// Hooks lists every hook, by name.
func (e *Enforcer) Hooks() []HookStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []HookStatus
	for name := range e.links {
		out = append(out, HookStatus{Name: name, Attached: true})
	}
	for name, err := range e.failed {
		out = append(out, HookStatus{Name: name, Err: err})
	}
	for _, name := range []string{hookTunnelEgress, hookTunnelIngress} {
		if e.links[name] == nil && e.failed[name] == nil {
			out = append(out, HookStatus{Name: name, Err: errors.New("there is no tunnel device yet")})
		}
	}
	slices.SortFunc(out, func(a, b HookStatus) int { return strings.Compare(a.Name, b.Name) })
	return out
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
