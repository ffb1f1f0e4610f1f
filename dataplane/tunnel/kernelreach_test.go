package tunnel

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/key"
)

// trie is the kernel's table of addresses as it should be: each address belongs to one peer at most.
type trie map[netip.Prefix]key.Public

// apply does what the kernel does, and shows the table after each of its steps.
func (t trie) apply(changes []peerChange, show func()) {
	for _, c := range changes {
		if c.remove || c.replace {
			maps.DeleteFunc(t, func(_ netip.Prefix, k key.Public) bool { return k == c.key })
			show()
		}
		for _, a := range c.add {
			t[a] = c.key
			show()
		}
	}
}

// TestMoveAddresses plays changes of addresses against a table: an address that stays is there all the time, and the
// result is exact.
func TestMoveAddresses(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	k := newPrivate(t).Public()
	pick := func() (out []netip.Prefix) {
		for i := range 12 {
			if random.IntN(2) == 0 {
				out = append(out, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, 0, byte(i)}), 32))
			}
		}
		slices.SortFunc(out, comparePrefix)
		return out
	}
	table := trie{}
	now := Peer{Key: k}
	for range 200 {
		next := Peer{Key: k, AllowedIPs: pick()}
		changes, err := moveAddresses(now, next)
		if err != nil {
			t.Fatal(err)
		}
		table.apply(changes, func() {
			for _, a := range now.AllowedIPs {
				if slices.Contains(next.AllowedIPs, a) && table[a] != k {
					t.Fatalf("%v is missing on the way from %v to %v", a, now.AllowedIPs, next.AllowedIPs)
				}
			}
		})
		if got := slices.SortedFunc(maps.Keys(table), comparePrefix); !slices.Equal(got, next.AllowedIPs) {
			t.Fatalf("got %v, want %v", got, next.AllowedIPs)
		}
		now = next
	}
}

// TestSigns plays counters of a peer as the kernel shows them.
func TestSigns(t *testing.T) {
	at := time.Unix(1000, 0)
	hand := time.Unix(900, 0)
	type look struct {
		after  time.Duration
		rx, tx uint64
		hand   time.Time
		want   sign
	}
	for name, c := range map[string]struct {
		keepalive time.Duration
		looks     []look
	}{
		"idle": {looks: []look{{0, 100, 100, hand, noSign}, {20 * time.Second, 100, 100, hand, noSign}, {20 * time.Second, 100, 100, hand, noSign}}},
		"answered": {looks: []look{{0, 100, 100, hand, noSign}, {5 * time.Second, 100, 1000, hand, noSign}, {5 * time.Second, 200, 1000, hand, heard},
			{20 * time.Second, 200, 1000, hand, noSign}}},
		"silent": {looks: []look{{0, 100, 100, hand, noSign}, {5 * time.Second, 100, 1000, hand, noSign}, {14 * time.Second, 100, 1148, hand, noSign},
			{time.Second, 100, 1148, hand, silent}, {time.Second, 100, 1148, hand, noSign}}},
		"empty packets want no answer": {keepalive: 10 * time.Second, looks: []look{{0, 100, 100, hand, noSign}, {10 * time.Second, 100, 196, hand, noSign},
			{20 * time.Second, 100, 228, hand, noSign}, {20 * time.Second, 100, 260, hand, noSign}}},
		"an initiation was heard": {looks: []look{{0, 0, 0, time.Time{}, noSign}, {time.Second, 148, 92, time.Time{}, heard}, {time.Second, 180, 92, hand, noSign}}},
	} {
		t.Run(name, func(t *testing.T) {
			var s signs
			now := at
			for i, l := range c.looks {
				now = now.Add(l.after)
				w := kernelPeer{keepalive: c.keepalive}
				w.rx, w.tx, w.handshake = l.rx, l.tx, l.hand
				var got sign
				if s, got = s.observe(now, w); got != l.want {
					t.Fatalf("look %d: got %d, want %d", i, got, l.want)
				}
			}
		})
	}
}

// TestKick: the last keepalive is the wanted one, and one before it is switched on from off, which is what initiates.
func TestKick(t *testing.T) {
	for _, want := range []time.Duration{0, 25 * time.Second} {
		e := kernelEntry{desc: Peer{Key: newPrivate(t).Public(), Keepalive: want}}
		var all []time.Duration
		for _, c := range e.kick(endpoint1) {
			all = append(all, *c.keepalive)
		}
		if all[len(all)-1] != want || all[0] != 0 || all[1] == 0 {
			t.Errorf("keepalives %v", all)
		}
		if e.kick(endpoint1)[0].endpoint != endpoint1 {
			t.Error("the endpoint is not set before the initiation")
		}
	}
}

// TestSplit: no message is longer than the library leaves whole, and together they do the same in the same order.
func TestSplit(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	keys := []key.Public{newPrivate(t).Public(), newPrivate(t).Public(), newPrivate(t).Public()}
	for range 200 {
		var changes []peerChange
		for range random.IntN(60) {
			c := peerChange{key: keys[random.IntN(len(keys))], create: true, remove: random.IntN(4) == 0, replace: random.IntN(4) == 0}
			for range random.IntN(2) * random.IntN(600) {
				c.add = append(c.add, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(random.IntN(4)), byte(random.IntN(256))}), 32))
			}
			changes = append(changes, c)
		}
		whole, parts := trie{}, trie{}
		whole.apply(changes, func() {})
		for _, message := range split(changes) {
			addresses := 0
			for _, c := range message {
				addresses += len(c.add)
			}
			if len(message) == 0 || len(message) > maxMessagePeers || addresses > maxMessageAddresses {
				t.Fatalf("a message of %d changes and %d addresses", len(message), addresses)
			}
			parts.apply(message, func() {})
		}
		if !maps.Equal(whole, parts) {
			t.Fatal("the messages do something else")
		}
	}
}
