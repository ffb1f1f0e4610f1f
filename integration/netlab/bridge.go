package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// bridgeLink is the bridge's name inside its own namespace.
	bridgeLink = "br0"
	// carrierWait bounds the wait for a new cable to carry frames.
	carrierWait = 5 * time.Second
)

// Bridge is an Ethernet switch in a namespace of its own: the underlay between hosts.
type Bridge struct {
	lab   *Lab
	name  string
	space *space

	// What follows is guarded by lab.mu.
	ports []*port
	cuts  map[cut]struct{}
}

// port is one cable: a veth pair between a host and a bridge.
type port struct {
	host   *Host
	bridge *Bridge
	inHost string // interface name on the host
	onSwch string // interface name in the bridge's namespace
}

// Bridge adds a switch without ports.
func (l *Lab) Bridge(ctx context.Context, name string) (*Bridge, error) {
	s, err := l.addSpace(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("add bridge %s: %w", name, err)
	}
	b := &Bridge{lab: l, name: name, space: s, cuts: map[cut]struct{}{}}
	if err := l.doIn(s, makeBridge); err != nil {
		return nil, fmt.Errorf("add bridge %s: %w", name, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bridges[name] = b
	return b, nil
}

// makeBridge runs inside the bridge's namespace. Multicast snooping is off because there is no querier: with it, neighbour
// discovery would depend on timers.
func makeBridge() error {
	snooping := false
	br := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs(), MulticastSnooping: &snooping}
	br.Name = bridgeLink
	if err := netlink.LinkAdd(br); err != nil {
		return fmt.Errorf("make bridge: %w", err)
	}
	// The switch only switches: it takes part in nothing at the IP level, and packets do not visit its netfilter hooks for IP.
	for _, set := range []struct{ name, value string }{
		{"ipv6/conf/all/disable_ipv6", "1"},
		{"ipv6/conf/default/disable_ipv6", "1"},
		{"bridge/bridge-nf-call-iptables", "0"},
		{"bridge/bridge-nf-call-ip6tables", "0"},
		{"bridge/bridge-nf-call-arptables", "0"},
	} {
		err := os.WriteFile(filepath.Join("/proc/sys/net", set.name), []byte(set.value), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return netlink.LinkSetUp(br)
}

// Name is the bridge's name within the lab.
func (b *Bridge) Name() string { return b.name }

// NetNS is the path of the namespace that the switch is in.
func (b *Bridge) NetNS() string { return b.space.path }

// Connect lays a cable from the host to the bridge and gives the host's end the addresses. It returns the interface's name
// on the host (eth0, eth1 ...) when frames can pass.
func (l *Lab) Connect(ctx context.Context, h *Host, b *Bridge, addrs ...netip.Prefix) (string, error) {
	p, err := l.addPort(ctx, h, b)
	if err != nil {
		return "", fmt.Errorf("connect %s to %s: %w", h.name, b.name, err)
	}
	if err := errors.Join(
		h.Do(func() error { return giveAddresses(p.inHost, addrs) }),
		l.doIn(b.space, func() error { return waitCarrier(ctx, p.onSwch) }),
		h.Do(func() error { return waitCarrier(ctx, p.inHost) }),
	); err != nil {
		return "", fmt.Errorf("connect %s to %s: %w", h.name, b.name, err)
	}
	return p.inHost, nil
}

func (l *Lab) addPort(ctx context.Context, h *Host, b *Bridge) (*port, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil, ErrClosed
	}
	p := &port{host: h, bridge: b, inHost: fmt.Sprintf("eth%d", len(h.ports)), onSwch: fmt.Sprintf("port%d", len(b.ports))}
	h.ports, b.ports = append(h.ports, p), append(b.ports, p)
	l.mu.Unlock()
	return p, l.doIn(b.space, func() error { return makeCable(l.prefix, p) })
}

// makeCable runs inside the bridge's namespace; the kernel makes the other end in the host's, so that neither is ever in a
// third one.
func makeCable(prefix string, p *port) error {
	br, err := netlink.LinkByName(bridgeLink)
	if err != nil {
		return err
	}
	hostNS, err := os.Open(p.host.space.path)
	if err != nil {
		return err
	}
	defer hostNS.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = p.onSwch, br.Attrs().Index
	cable := &netlink.Veth{LinkAttrs: attrs, PeerName: p.inHost, PeerNamespace: netlink.NsFd(hostNS.Fd())}
	if err := netlink.LinkAdd(cable); err != nil {
		return fmt.Errorf("make veth: %w", err)
	}
	link, err := netlink.LinkByName(p.onSwch)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetAlias(link, linkAlias(prefix, p.host.name+" "+p.inHost)); err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// giveAddresses runs inside the host's namespace.
func giveAddresses(ifname string, addrs []netip.Prefix) error {
	link, err := netlink.LinkByName(ifname)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	for _, p := range addrs {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, a); err != nil {
			return fmt.Errorf("add address %s: %w", p, err)
		}
	}
	return nil
}

// waitCarrier waits until the kernel has noticed that the cable is whole. It runs inside the namespace of that end.
func waitCarrier(ctx context.Context, ifname string) error {
	ctx, cancel := context.WithTimeout(ctx, carrierWait)
	defer cancel()
	for {
		link, err := netlink.LinkByName(ifname)
		if err != nil {
			return err
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for carrier on %s (%s): %w", ifname, link.Attrs().OperState, ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// Unplug takes the carrier from one interface of the host, as pulling the cable would: addresses stay.
func (h *Host) Unplug(ctx context.Context, ifname string) error {
	return h.setPlugged(ctx, ifname, false)
}

// Plug undoes Unplug and returns when frames can pass.
func (h *Host) Plug(ctx context.Context, ifname string) error { return h.setPlugged(ctx, ifname, true) }

func (h *Host) setPlugged(ctx context.Context, ifname string, in bool) error {
	p, err := h.port(ifname)
	if err != nil {
		return err
	}
	err = h.lab.doIn(p.bridge.space, func() error {
		link, err := netlink.LinkByName(p.onSwch)
		if err != nil {
			return err
		}
		if !in {
			return netlink.LinkSetDown(link)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		return waitCarrier(ctx, p.onSwch)
	})
	if err == nil && in {
		err = h.Do(func() error { return waitCarrier(ctx, ifname) })
	}
	if err != nil {
		return fmt.Errorf("cable of %s on host %s: %w", ifname, h.name, err)
	}
	return nil
}

func (h *Host) port(ifname string) (*port, error) {
	h.lab.mu.Lock()
	defer h.lab.mu.Unlock()
	for _, p := range h.ports {
		if p.inHost == ifname {
			return p, nil
		}
	}
	return nil, fmt.Errorf("host %s has no cable at %q", h.name, ifname)
}
