package tunnel

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/tailscale/wireguard-go/tun"
)

// addrSet is an immutable set of addresses, keyed so that a packet's bytes are looked up without a conversion.
type addrSet struct {
	v4 map[[4]byte]struct{}
	v6 map[[16]byte]struct{}
}

func newAddrSet(addrs []netip.Addr) *addrSet {
	s := &addrSet{v4: make(map[[4]byte]struct{}), v6: make(map[[16]byte]struct{})}
	for _, a := range addrs {
		if a = a.Unmap(); a.Is4() {
			s.v4[a.As4()] = struct{}{}
		} else if a.IsValid() {
			s.v6[a.As16()] = struct{}{}
		}
	}
	return s
}

// verdict on the source of an outgoing packet.
type sourceVerdict uint8

const (
	ownSource sourceVerdict = iota
	foreignSource
	noSource // the unspecified address: the kernel's own multicast reports, dropped but nobody's forgery
)

// judge looks at the version nibble and the source address. What is too short or of another version has no source of
// ours.
func (s *addrSet) judge(packet []byte) sourceVerdict {
	const v4Source, v6Source = 12, 8
	if len(packet) == 0 {
		return foreignSource
	}
	switch packet[0] >> 4 {
	case 4:
		if len(packet) < v4Source+4 {
			return foreignSource
		}
		src := [4]byte(packet[v4Source:])
		if _, ok := s.v4[src]; ok {
			return ownSource
		}
		if src == ([4]byte{}) {
			return noSource
		}
	case 6:
		if len(packet) < v6Source+16 {
			return foreignSource
		}
		src := [16]byte(packet[v6Source:])
		if _, ok := s.v6[src]; ok {
			return ownSource
		}
		if src == ([16]byte{}) {
			return noSource
		}
	}
	return foreignSource
}

// guard stands between the network device and the engine. Outgoing packets whose source is not one of the host's own
// overlay addresses go no further. Until addresses are set, nothing goes out.
type guard struct {
	tun.Device
	own     atomic.Pointer[addrSet]
	foreign atomic.Uint64
	// events replaces the device's own: link state never sets the engine up or down, only our caller does.
	events    chan tun.Event
	closeOnce sync.Once
	closeErr  error
}

func newGuard(dev tun.Device) *guard {
	g := &guard{Device: dev, events: make(chan tun.Event)}
	g.own.Store(newAddrSet(nil))
	return g
}

// Read reads a batch and empties what may not leave: the engine skips packets of size zero.
func (g *guard) Read(slab []byte, packets []tun.ReadPacket) (int, error) {
	n, err := g.Device.Read(slab, packets)
	set := g.own.Load()
	var foreign uint64
	for i := range packets[:n] {
		p := &packets[i]
		switch set.judge(slab[p.Offset : p.Offset+p.Size]) {
		case ownSource:
			continue
		case foreignSource:
			foreign++
		}
		p.Size = 0
	}
	if foreign > 0 {
		g.foreign.Add(foreign)
	}
	return n, err
}

// Events never carries anything; it is closed by Close, which ends the engine's reader.
func (g *guard) Events() <-chan tun.Event { return g.events }

// Close closes the descriptor. The network device is persistent and stays.
func (g *guard) Close() error {
	g.closeOnce.Do(func() {
		close(g.events)
		g.closeErr = g.Device.Close()
	})
	return g.closeErr
}
