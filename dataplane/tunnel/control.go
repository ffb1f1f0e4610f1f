package tunnel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/signet-overlay/signet/internal/key"
)

// This file speaks to the kernel's WireGuard, by generic netlink. Keys go as bytes in a message; there is no command line
// and no text form.

// control reads and writes one device of the kernel, in the network namespace of the thread that made it.
type control struct {
	name   string
	client *wgctrl.Client
}

// openControl opens the socket. The kernel loads its module for it, where it can.
func openControl(name string) (*control, error) {
	client, err := wgctrl.New()
	if err != nil {
		return nil, fmt.Errorf("open the kernel's WireGuard: %w", err)
	}
	return &control{name: name, client: client}, nil
}

// kernelReport is what the kernel says of the device.
type kernelReport struct {
	public     key.Public // zero before a private key was set
	listenPort int
	mark       int
	peers      map[key.Public]kernelPeer
}

// kernelPeer is what the kernel says of a peer.
type kernelPeer struct {
	peerReport
	allowed   []netip.Prefix
	keepalive time.Duration
}

// read asks for the device and all its peers. ErrClosed when the device is gone.
func (c *control) read() (kernelReport, error) {
	d, err := c.client.Device(c.name)
	if err != nil {
		return kernelReport{}, c.explain("read", err)
	}
	clear(d.PrivateKey[:]) // the kernel tells it unasked
	if d.Type != wgtypes.LinuxKernel {
		return kernelReport{}, fmt.Errorf("%w: %s is not the kernel's any more", ErrClosed, c.name)
	}
	r := kernelReport{listenPort: d.ListenPort, mark: d.FirewallMark, peers: make(map[key.Public]kernelPeer, len(d.Peers))}
	if d.PublicKey != (wgtypes.Key{}) {
		if r.public, err = key.PublicFromBytes(d.PublicKey[:]); err != nil {
			return r, fmt.Errorf("read key of %s: %w", c.name, err)
		}
	}
	for i := range d.Peers {
		p := &d.Peers[i]
		k, err := key.PublicFromBytes(p.PublicKey[:])
		if err != nil {
			continue // a key that no peer of ours can have
		}
		r.peers[k] = fromKernel(p)
	}
	return r, nil
}

func fromKernel(p *wgtypes.Peer) kernelPeer {
	out := kernelPeer{keepalive: p.PersistentKeepaliveInterval, allowed: make([]netip.Prefix, 0, len(p.AllowedIPs))}
	out.rx, out.tx, out.allowedIPs = uint64(p.ReceiveBytes), uint64(p.TransmitBytes), len(p.AllowedIPs)
	if p.Endpoint != nil {
		e := p.Endpoint.AddrPort()
		out.endpoint = netip.AddrPortFrom(e.Addr().Unmap(), e.Port())
	}
	// A peer without a handshake has the time 0 of Unix, which the library may give as such or as its own zero.
	if !p.LastHandshakeTime.IsZero() && p.LastHandshakeTime.UnixNano() != 0 {
		out.handshake = p.LastHandshakeTime
	}
	for _, n := range p.AllowedIPs {
		a, ok := netip.AddrFromSlice(n.IP)
		bits, size := n.Mask.Size()
		if ok && size == 32 {
			a = a.Unmap()
		}
		if ok {
			out.allowed = append(out.allowed, netip.PrefixFrom(a, bits))
		}
	}
	return out
}

// deviceChange is what to write of the device; nil and zero mean: leave it.
type deviceChange struct {
	private      key.Private // a new one ends all sessions
	port         *int
	mark         *int // writing it, the same one too, makes the kernel forget local addresses of the underlay
	replacePeers bool
}

// device writes keys and ports.
func (c *control) device(d deviceChange) error {
	cfg := wgtypes.Config{ListenPort: d.port, FirewallMark: d.mark, ReplacePeers: d.replacePeers}
	if !d.private.IsZero() {
		var private wgtypes.Key
		raw := d.private.Reveal()
		copy(private[:], raw)
		clear(raw)
		defer clear(private[:])
		cfg.PrivateKey = &private
	}
	return c.explain("configure", c.client.ConfigureDevice(c.name, cfg))
}

// peerChange is what to write of one peer; zero means: leave it. The kernel takes the changes of a list in their order.
type peerChange struct {
	key       key.Public
	create    bool // else nothing happens when there is no such peer
	remove    bool
	replace   bool           // its addresses become exactly add
	add       []netip.Prefix // taken from the peers that hold them
	endpoint  netip.AddrPort
	keepalive *time.Duration
}

const (
	// maxMessagePeers and maxMessageAddresses are what the library puts into one message. From a list with more it makes
	// messages of its own, which lose the order of several changes of one peer: so it never gets one.
	maxMessagePeers     = 32
	maxMessageAddresses = 256
)

// split makes messages of a list of changes, in order. What does not fit becomes further changes of the same peer.
func split(changes []peerChange) (messages [][]peerChange) {
	var now []peerChange
	addresses := 0
	flush := func() {
		if len(now) > 0 {
			messages = append(messages, now)
		}
		now, addresses = nil, 0
	}
	for _, c := range changes {
		for {
			if len(now) == maxMessagePeers || addresses == maxMessageAddresses {
				flush()
			}
			n := min(len(c.add), maxMessageAddresses-addresses)
			part, rest := c, c.add[n:]
			part.add = c.add[:n:n]
			now, addresses = append(now, part), addresses+n
			if len(rest) == 0 {
				break
			}
			c = peerChange{key: c.key, add: rest}
		}
	}
	flush()
	return messages
}

// peers writes a list of changes. What fits one message happens in one step as other callers of the kernel see it.
func (c *control) peers(changes ...peerChange) error {
	for _, message := range split(changes) {
		cfg := wgtypes.Config{Peers: make([]wgtypes.PeerConfig, 0, len(message))}
		for _, p := range message {
			cfg.Peers = append(cfg.Peers, toKernel(p))
		}
		if err := c.client.ConfigureDevice(c.name, cfg); err != nil {
			return c.explain("configure", err)
		}
	}
	return nil
}

func toKernel(p peerChange) wgtypes.PeerConfig {
	out := wgtypes.PeerConfig{PublicKey: wgtypes.Key(p.key.Bytes()), Remove: p.remove, UpdateOnly: !p.create && !p.remove,
		ReplaceAllowedIPs: p.replace, PersistentKeepaliveInterval: p.keepalive}
	if p.endpoint.IsValid() {
		out.Endpoint = net.UDPAddrFromAddrPort(p.endpoint)
	}
	for _, a := range p.add {
		out.AllowedIPs = append(out.AllowedIPs, net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())})
	}
	return out
}

func (c *control) close() error {
	if err := c.client.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close the kernel's WireGuard: %w", err)
	}
	return nil
}

func (c *control) explain(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: the kernel's device %s is gone", ErrClosed, c.name)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s %s: CAP_NET_ADMIN is needed, run signetd as root: %w", what, c.name, err)
	default:
		return fmt.Errorf("%s %s: %w", what, c.name, err)
	}
}
