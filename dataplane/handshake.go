package dataplane

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/signet-overlay/signet/dataplane/enforce"
)

// HandshakeGuard is the guard in front of WireGuard's own port against floods of handshakes. It is off by default: it
// is no part of what keeps the overlay shut, WireGuard's cookies stay behind it, and it ends with the agent.
type HandshakeGuard struct {
	Mode       string   // off or empty, auto, native, generic or tc
	Interfaces []string // underlay devices; empty means those that hold an address of the underlay
}

// Off reports whether there is no guard.
func (h HandshakeGuard) Off() bool { return h.Mode == "" || h.Mode == "off" }

// Check refuses a mode that does not exist.
func (h HandshakeGuard) Check() error {
	if h.Off() {
		return nil
	}
	if _, err := enforce.ParseFloodMode(h.Mode); err != nil {
		return fmt.Errorf("mode: %q is none of off, auto, native, generic, tc", h.Mode)
	}
	return nil
}

// startHandshakeGuard attaches the guard where it is asked for. A host without it is no less shut, so that a failure is
// a warning and no more.
func (d *Dataplane) startHandshakeGuard() {
	if d.cfg.Handshakes.Off() {
		return
	}
	mode, err := enforce.ParseFloodMode(d.cfg.Handshakes.Mode)
	if err == nil {
		d.flood, err = enforce.OpenFlood(enforce.FloodConfig{Port: uint16(d.cfg.ListenPort), Mode: mode, Logger: d.cfg.Logger})
	}
	if err != nil {
		d.floodErr = err
		d.cfg.Logger.Warn("handshakes are not guarded", "error", err)
		return
	}
	d.refreshHandshakeGuard(func(text string) { d.cfg.Logger.Warn(text) })
}

// refreshHandshakeGuard follows devices, this host's addresses and the peers' endpoints.
func (d *Dataplane) refreshHandshakeGuard(report func(string)) {
	if d.flood == nil {
		return
	}
	names, own, err := d.underlay()
	errs := []error{err}
	for _, s := range d.flood.Status() {
		if !slices.Contains(names, s.Interface) {
			errs = append(errs, d.flood.Detach(s.Interface))
		}
	}
	for _, name := range names {
		errs = append(errs, d.flood.Attach(name))
	}
	errs = append(errs, d.flood.SetOwn(own), d.flood.SetKnown(d.peerAddresses()))
	if err := errors.Join(errs...); err != nil {
		report("the handshake guard is not what it should be: " + err.Error())
	}
}

// underlay lists the devices to guard and this host's addresses on the underlay.
func (d *Dataplane) underlay() (names []string, own []netip.Addr, err error) {
	devices, err := net.Interfaces()
	if err != nil {
		return nil, nil, fmt.Errorf("list devices: %w", err)
	}
	for _, dev := range devices {
		if dev.Flags&net.FlagLoopback != 0 || dev.Name == d.cfg.Interface {
			continue
		}
		addrs, err := dev.Addrs()
		if err != nil {
			continue // it is gone again
		}
		holds := false
		for _, a := range addrs {
			prefix, err := netip.ParsePrefix(a.String())
			if err != nil || d.cfg.Overlay4.Contains(prefix.Addr()) || d.cfg.Overlay6.Contains(prefix.Addr()) {
				continue
			}
			own = append(own, prefix.Addr())
			holds = holds || prefix.Addr().IsGlobalUnicast()
		}
		asked := d.cfg.Handshakes.Interfaces
		if slices.Contains(asked, dev.Name) || len(asked) == 0 && holds {
			names = append(names, dev.Name)
		}
	}
	return names, own, nil
}

// peerAddresses are those that handshakes of peers may come from.
func (d *Dataplane) peerAddresses() []netip.Addr {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []netip.Addr
	for _, p := range d.peers {
		for _, e := range p.Endpoints {
			if a := e.Addr().Unmap(); !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	return out
}

// handshakeStatus says where the guard stands, and why not better.
func (d *Dataplane) handshakeStatus() (hooks []HookStatus, warnings []string) {
	if d.floodErr != nil {
		return nil, []string{"handshakes are not guarded, though handshake_guard asks for it: " + d.floodErr.Error()}
	}
	if d.flood == nil {
		return nil, nil
	}
	for _, s := range d.flood.Status() {
		h := HookStatus{Name: fmt.Sprintf("handshake_guard/%s (%v)", s.Interface, s.Mode), Attached: s.Attached}
		if s.Refused != nil {
			h.Error = "no better mode: " + s.Refused.Error()
		}
		hooks = append(hooks, h)
	}
	return hooks, nil
}
