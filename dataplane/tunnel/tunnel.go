package tunnel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/signet-overlay/signet/internal/key"
)

// Errors that a caller tells apart.
var (
	// ErrBusy: another process holds the device.
	ErrBusy = errors.New("tunnel device is in use by another process")
	// ErrNoTUN: this host cannot make a TUN device.
	ErrNoTUN = errors.New("no TUN device support")
	// ErrClosed: the engine was closed, or its device was deleted underneath it.
	ErrClosed = errors.New("tunnel is closed")
	// ErrNoPeer: no peer has that key.
	ErrNoPeer = errors.New("no such peer")
	// ErrPeer: the description of a peer is not acceptable.
	ErrPeer = errors.New("invalid peer")
	// ErrNoHandshake: the peer did not answer in time.
	ErrNoHandshake = errors.New("no handshake")
)

const (
	// maxPeers bounds the peers of one device; one more is refused with ErrPeer. Each costs about 40 kB in this engine.
	maxPeers = 1 << 14
	// maxAllowedIPs bounds the addresses of one peer; more are refused with ErrPeer.
	maxAllowedIPs = 4096
	// maxEndpoints bounds the candidates of one peer. They are unsigned hints, so a longer list is cut, not refused.
	maxEndpoints = 16
	// maxKeepalive is the largest interval WireGuard's configuration takes (16 bits of seconds).
	maxKeepalive = 65535 * time.Second
)

// Peer describes another agent. It is a pure value: Update makes it real.
type Peer struct {
	Key key.Public
	// AllowedIPs are exactly the addresses bound to the peer, as /32 and /128. Anything wider is refused: it would let
	// the peer speak for addresses nobody signed.
	AllowedIPs []netip.Prefix
	// Endpoints are candidates for the peer's underlay address, best first; may be empty. They are hints that nobody
	// signed: those that cannot be an underlay address of another host are left out without an error.
	Endpoints []netip.AddrPort
	// Keepalive is the interval of empty packets that keep a NAT's mapping open; 0 means none. Whole seconds.
	Keepalive time.Duration
}

// PeerStatus is what is known of a peer. It is a snapshot.
type PeerStatus struct {
	Key key.Public
	// Endpoint is the last one that worked, or the one being tried when none has yet; worth keeping on disk when
	// LastHandshake is set.
	Endpoint      netip.AddrPort
	LastHandshake time.Time // zero when there was none since the peer was created
	RxBytes       uint64    // on the underlay, WireGuard's overhead included
	TxBytes       uint64
	AllowedIPs    int
	Up            bool // a session is live: it is less than three minutes old and the peer answers
	// RefusedSource counts inner packets whose source was not bound to the peer; cryptokey routing dropped them. The
	// kernel's engine cannot tell peers apart and leaves it 0: see Kernel.Limits.
	RefusedSource uint64
}

// Device is a WireGuard interface. Every method may be called again with the same arguments, and by several callers.
type Device interface {
	// Update creates a peer or changes it. A description that is already in force changes nothing and disturbs no
	// session. An address that another peer held moves to this one.
	Update(ctx context.Context, p Peer) error
	// Delete removes a peer; removing one that is not there succeeds.
	Delete(ctx context.Context, k key.Public) error
	// Prune removes all peers whose key is not in keep.
	Prune(ctx context.Context, keep []key.Public) error
	// Status returns all peers, ordered by key.
	Status() ([]PeerStatus, error)
	// Close stops the engine. The network device stays, so that programs attached to it go on judging and routes to
	// it go on dropping; that of the kernel's engine carries traffic too.
	Close() error
}

var _ Device = (*Userspace)(nil)

// normal checks a description and returns it in the form that is compared: addresses sorted and without duplicates,
// endpoints usable and within their limit.
func normal(p Peer) (Peer, error) {
	if p.Key.IsZero() {
		return p, fmt.Errorf("%w: it has no key", ErrPeer)
	}
	if len(p.AllowedIPs) > maxAllowedIPs {
		return p, fmt.Errorf("%w %s: %d addresses, at most %d are allowed", ErrPeer, p.Key.Short(), len(p.AllowedIPs), maxAllowedIPs)
	}
	for _, a := range p.AllowedIPs {
		if !a.IsValid() || !a.IsSingleIP() || a.Addr().Is4In6() || a.Addr().Zone() != "" {
			return p, fmt.Errorf("%w %s: allowed address %v is not a single address (/32 or /128)", ErrPeer, p.Key.Short(), a)
		}
	}
	if p.Keepalive < 0 || p.Keepalive > maxKeepalive || p.Keepalive%time.Second != 0 {
		return p, fmt.Errorf("%w %s: keepalive %v is not whole seconds from 0 to %v", ErrPeer, p.Key.Short(), p.Keepalive, maxKeepalive)
	}
	p.AllowedIPs = slices.Clone(p.AllowedIPs)
	slices.SortFunc(p.AllowedIPs, comparePrefix)
	p.AllowedIPs = slices.Compact(p.AllowedIPs)
	p.Endpoints = usable(p.Endpoints)
	return p, nil
}

// usable keeps the endpoints that can be another host's underlay address, in order and without duplicates. Loopback,
// multicast and unspecified addresses are left out: a hint must not aim our packets at this host or at everybody.
// Zones are left out because they are free text, and this text would reach WireGuard's configuration.
func usable(in []netip.AddrPort) []netip.AddrPort {
	var out []netip.AddrPort
	for _, e := range in {
		a := e.Addr().Unmap()
		if !a.IsValid() || e.Port() == 0 || a.Zone() != "" || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() ||
			a.IsLinkLocalUnicast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
			continue
		}
		if e = netip.AddrPortFrom(a, e.Port()); !slices.Contains(out, e) {
			out = append(out, e)
		}
		if len(out) == maxEndpoints {
			break
		}
	}
	return out
}

// equal reports whether two descriptions in normal form are the same.
func equal(a, b Peer) bool {
	return a.Key == b.Key && a.Keepalive == b.Keepalive && slices.Equal(a.AllowedIPs, b.AllowedIPs) && slices.Equal(a.Endpoints, b.Endpoints)
}

func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}
