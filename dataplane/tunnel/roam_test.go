package tunnel

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/tailscale/wireguard-go/conn"
	"github.com/tailscale/wireguard-go/device"
)

var (
	home     = netip.MustParseAddrPort("192.0.2.1:51820")
	moved    = netip.MustParseAddrPort("192.0.2.2:51820")
	attacker = netip.MustParseAddrPort("203.0.113.66:666")
)

// initiationFrom is a packet that looks like an initiation, as the receiver wraps it.
func initiationFrom(b *roamingBind, from netip.AddrPort, index uint32) *sender {
	packet := make([]byte, device.MessageInitiationSize)
	binary.LittleEndian.PutUint32(packet, device.MessageInitiationType)
	binary.LittleEndian.PutUint32(packet[4:], index)
	s := &sender{StdNetEndpoint: &conn.StdNetEndpoint{AddrPort: from}, bind: b}
	s.readInitiation(packet)
	return s
}

func answerTo(index uint32) []byte {
	packet := make([]byte, device.MessageResponseSize)
	binary.LittleEndian.PutUint32(packet, device.MessageResponseType)
	binary.LittleEndian.PutUint32(packet[8:], index)
	return packet
}

func TestPlaceFollowsOnlyWhatIsProven(t *testing.T) {
	b := newRoamingBind()
	k := newPrivate(t).Public()
	raw := [32]byte(k.Bytes())
	b.move(k, home)
	p := b.place(k)
	want := func(step string, at netip.AddrPort) {
		t.Helper()
		if p.address() != at {
			t.Fatalf("%s: the peer is at %v, want %v", step, p.address(), at)
		}
	}
	for range 3 { // replays of an old initiation, which the engine will not answer
		initiationFrom(b, attacker, 7).InitiationMessagePublicKey(raw)
	}
	want("replayed initiations", home)
	initiationFrom(b, moved, 8).InitiationMessagePublicKey(raw)
	want("an initiation that is not verified", home)
	initiationFrom(b, attacker, 9).InitiationMessagePublicKey(raw)
	p.answers(answerTo(8))
	want("the answer to a verified initiation", moved)
	p.answers(answerTo(8))
	p.answers(answerTo(1000))
	p.answers(make([]byte, device.MessageResponseSize))
	want("answers to nothing", moved)
	(&sender{StdNetEndpoint: &conn.StdNetEndpoint{AddrPort: home}, bind: b}).FromPeer(raw)
	want("an authentic data packet", home)

	// A peer that is not configured has no place, and gets none by being claimed.
	stranger := [32]byte(newPrivate(t).Public().Bytes())
	initiationFrom(b, attacker, 1).InitiationMessagePublicKey(stranger)
	(&sender{StdNetEndpoint: &conn.StdNetEndpoint{AddrPort: attacker}, bind: b}).FromPeer(stranger)
	if b.known(stranger) != nil {
		t.Error("a stranger has a place")
	}
	b.forget(k)
	if b.known(raw) != nil {
		t.Error("a removed peer has a place")
	}
}

func TestPlaceWithoutAddress(t *testing.T) {
	b := newRoamingBind()
	k := newPrivate(t).Public()
	ep, err := b.ParseEndpoint(k.Hex())
	if err != nil {
		t.Fatal(err)
	}
	if ep.DstToString() != "" || ep.DstIP().IsValid() || ep.SrcIP().IsValid() {
		t.Errorf("a place: %q %v %v", ep.DstToString(), ep.DstIP(), ep.SrcIP())
	}
	if err := b.Send([][]byte{{4, 0, 0, 0}}, ep, 0); err == nil {
		t.Error("a packet was sent to nowhere")
	}
	for _, bad := range []string{"", "192.0.2.1:1", k.Hex()[2:], k.Hex() + "00"} {
		if _, err := b.ParseEndpoint(bad); err == nil {
			t.Errorf("%q is taken for a key", bad)
		}
	}
}
