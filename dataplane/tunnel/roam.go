package tunnel

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/tailscale/wireguard-go/conn"
	"github.com/tailscale/wireguard-go/device"

	"github.com/signet-overlay/signet/internal/key"
)

// roamingBind is what the engine sends and receives by. It knows where each peer is: the engine leaves that to its
// bind.
//
// A peer moves as WireGuard has it (https://www.wireguard.com/papers/wireguard.pdf, section 2.1): to where its last
// authentic packet came from. The engine says of a data packet that it is authentic, and answers an initiation only
// when that is; so a peer's place follows its data packets and the initiations that are being answered, and nothing
// that merely claims to be from it.
type roamingBind struct {
	*splitBind
	places sync.Map // [32]byte, a public key -> *place; bounded by the engine's peers
}

func newRoamingBind() *roamingBind { return &roamingBind{splitBind: newSplitBind()} }

// place is where a peer is. It is the endpoint that the engine holds for the peer, for as long as the peer exists.
type place struct {
	key key.Public
	raw [32]byte                            // the same, in the engine's form
	at  atomic.Pointer[conn.StdNetEndpoint] // nil while it is not known

	mu    sync.Mutex
	asked [8]initiation // the latest ones, in a ring: replays must not push out the one being answered
	next  int
}

// initiation is a handshake that somebody began, as the peer or as a replay of it.
type initiation struct {
	index uint32 // that the answer will carry; sender-chosen
	from  *conn.StdNetEndpoint
}

// place gives the place of a peer, a new one for a new peer.
func (b *roamingBind) place(k key.Public) *place {
	raw := [32]byte(k.Bytes())
	p, _ := b.places.LoadOrStore(raw, &place{key: k, raw: raw})
	return p.(*place)
}

// move sets where a peer is tried next.
func (b *roamingBind) move(k key.Public, to netip.AddrPort) {
	b.place(k).at.Store(&conn.StdNetEndpoint{AddrPort: to})
}

// forget drops a peer that the engine has removed.
func (b *roamingBind) forget(k key.Public) { b.places.Delete([32]byte(k.Bytes())) }

// forgetSources makes the kernel choose anew from which local address each peer is reached.
func (b *roamingBind) forgetSources() {
	b.places.Range(func(_, p any) bool {
		p.(*place).ClearSrc()
		return true
	})
}

// ParseEndpoint gives the place of the peer whose key it is given, in hexadecimal.
func (b *roamingBind) ParseEndpoint(s string) (conn.Endpoint, error) {
	raw, err := hex.DecodeString(s)
	if err != nil {
		return nil, fmt.Errorf("internal error: %q is not a peer's key: %w", s, err)
	}
	k, err := key.PublicFromBytes(raw)
	if err != nil {
		return nil, fmt.Errorf("internal error: %q is not a peer's key: %w", s, err)
	}
	return b.place(k), nil
}

// Open opens the sockets.
func (b *roamingBind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	receive, actual, err := b.splitBind.Open(port)
	for i, f := range receive {
		receive[i] = b.receive(f)
	}
	return receive, actual, err
}

// receive makes the endpoints of received packets ours. The segments of one datagram train share one endpoint, so that
// a train costs one allocation.
func (b *roamingBind) receive(f conn.ReceiveFunc) conn.ReceiveFunc {
	return func(slab []byte, packets []conn.ReceivedPacket) (int, error) {
		n, err := f(slab, packets)
		var before conn.Endpoint
		var now *sender
		for i := range packets[:n] {
			p := &packets[i]
			std, ok := p.Endpoint.(*conn.StdNetEndpoint)
			if !ok {
				continue
			}
			if p.Endpoint != before || now.initiates {
				before, now = p.Endpoint, &sender{StdNetEndpoint: std, bind: b}
			}
			now.readInitiation(p.Bytes(slab))
			p.Endpoint = now
		}
		return n, err
	}
}

// Send sends a batch to one destination.
func (b *roamingBind) Send(bufs [][]byte, to conn.Endpoint, offset int) error {
	switch to := to.(type) {
	case *sender: // a cookie, which is owed to an address and not to a peer
		return b.splitBind.Send(bufs, to.StdNetEndpoint, offset)
	case *place:
		if len(bufs) == 1 {
			to.answers(bufs[0][offset:])
		}
		at := to.at.Load()
		if at == nil {
			return fmt.Errorf("peer %s: no endpoint is known", to.key.Short())
		}
		return b.splitBind.Send(bufs, at, offset)
	}
	return conn.ErrWrongEndpointType
}

// answers moves the peer to where the initiation came from that packet answers. The engine answers only what it has
// verified.
func (p *place) answers(packet []byte) {
	if len(packet) != device.MessageResponseSize || binary.LittleEndian.Uint32(packet) != device.MessageResponseType {
		return
	}
	index := binary.LittleEndian.Uint32(packet[8:]) // the initiator's own, repeated
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, a := range p.asked {
		if a.from != nil && a.index == index {
			p.at.Store(a.from)
			p.asked[i] = initiation{}
			return
		}
	}
}

// ask notes an initiation that is not verified yet.
func (p *place) ask(a initiation) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked[p.next] = a
	p.next = (p.next + 1) % len(p.asked)
}

// address is where the peer is; zero while that is not known.
func (p *place) address() netip.AddrPort {
	if at := p.at.Load(); at != nil {
		return at.AddrPort
	}
	return netip.AddrPort{}
}

// ClearSrc implements conn.Endpoint.
func (p *place) ClearSrc() {
	if at := p.at.Load(); at != nil {
		p.at.CompareAndSwap(at, &conn.StdNetEndpoint{AddrPort: at.AddrPort})
	}
}

// SrcToString implements conn.Endpoint.
func (p *place) SrcToString() string { return p.SrcIP().String() }

// DstToString implements conn.Endpoint; it is empty while the peer's place is not known.
func (p *place) DstToString() string {
	if a := p.address(); a.IsValid() {
		return a.String()
	}
	return ""
}

// DstToBytes implements conn.Endpoint.
func (p *place) DstToBytes() []byte {
	b, _ := p.address().MarshalBinary() // never fails
	return b
}

// DstIP implements conn.Endpoint.
func (p *place) DstIP() netip.Addr { return p.address().Addr() }

// SrcIP implements conn.Endpoint.
func (p *place) SrcIP() netip.Addr {
	if at := p.at.Load(); at != nil {
		return at.SrcIP()
	}
	return netip.Addr{}
}

// sender is where a received packet came from.
type sender struct {
	*conn.StdNetEndpoint
	bind      *roamingBind
	initiates bool // the packet looks like an initiation
	index     uint32
	moved     atomic.Pointer[place] // a train usually carries packets of one peer
}

func (s *sender) readInitiation(packet []byte) {
	if len(packet) == device.MessageInitiationSize && binary.LittleEndian.Uint32(packet) == device.MessageInitiationType {
		s.initiates, s.index = true, binary.LittleEndian.Uint32(packet[4:])
	}
}

// InitiationMessagePublicKey implements conn.InitiationAwareEndpoint: the packet claims to be that peer's.
func (s *sender) InitiationMessagePublicKey(raw [32]byte) {
	if p := s.bind.known(raw); p != nil && s.initiates {
		p.ask(initiation{index: s.index, from: s.StdNetEndpoint})
	}
}

// FromPeer implements conn.PeerAwareEndpoint: the packet is that peer's, proven by its session.
func (s *sender) FromPeer(raw [32]byte) {
	if p := s.moved.Load(); p != nil && p.raw == raw {
		return
	}
	if p := s.bind.known(raw); p != nil {
		p.at.Store(s.StdNetEndpoint)
		s.moved.Store(p)
	}
}

// known gives the place of a peer that exists.
func (b *roamingBind) known(raw [32]byte) *place {
	p, ok := b.places.Load(raw)
	if !ok {
		return nil
	}
	return p.(*place)
}
