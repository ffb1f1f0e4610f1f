package enforce

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policy/policytest"
)

// TestRandomTwin crosses the cases with each other: the view of one, the connections of another, packets of several, at
// other hooks, from other sockets, at other times. The judge in Go and the one in the kernel must agree on each packet
// and on what is tracked after it.
func TestRandomTwin(t *testing.T) {
	needRoot(t)
	const rounds, packets = 400, 6
	cases := policytest.Cases()
	k := newTwin(t, cases[0].View.Overlay4, cases[0].View.Overlay6)
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	pick := func() *policytest.Case { return &cases[r.IntN(len(cases))] }
	times := []time.Duration{0, 0, 0, 1, -1, time.Minute, -time.Minute, 2 * time.Minute, time.Hour}
	for round := range rounds {
		v, tracked := pick(), pick()
		now := policytest.Now.Add(times[r.IntN(len(times))])
		table := bounded(tracked.Table(), v.View)
		k.load(t, v.View, table, now)
		for range packets {
			p := vary(r, pick(), pick())
			want := policy.Judge(v.View, table, p, now)
			if got := k.judge(t, p, now); got != want {
				t.Errorf("kernel %+v, want %+v, for %+v", got, want, p)
			}
			k.sameTable(t, v.View, table)
		}
		if t.Failed() {
			t.Fatalf("seed %d, round %d: view of %q, connections of %q, at %v", seed, round, v.Name, tracked.Name, now)
		}
	}
}

// bounded makes the connections such as the view's generation would have tracked them: due when a Binding or, in mode
// deny-all, the lease ends.
func bounded(t *policy.Table, v *policy.View) *policy.Table {
	for key, c := range t.Conns {
		ends := []time.Time{v.Addresses[c.Orig.Src.Addr()].NotAfter, v.Addresses[c.Orig.Dst.Addr()].NotAfter}
		if v.Lease.Mode == policy.LeaseDenyAll {
			ends = append(ends, v.Lease.Ends)
			if v.Lease.Ends.IsZero() {
				ends = append(ends, policytest.Now.Add(-time.Hour))
			}
		}
		for _, end := range ends {
			if !end.IsZero() && (c.Expires.IsZero() || end.Before(c.Expires)) {
				c.Expires = end
			}
		}
		t.Conns[key] = c
	}
	return t
}

// vary moves a case's packet to another hook, socket or direction.
func vary(r *rand.Rand, c, other *policytest.Case) policy.Packet {
	p := c.Packet
	if r.IntN(2) == 0 {
		p.Socket = other.Packet.Socket
	}
	if p.Hook == policy.HookConnect || p.Hook == policy.HookBind {
		return p
	}
	if r.IntN(2) == 0 && p.Quoted == nil {
		p.Tuple = p.Tuple.Reverse()
	}
	hooks := []policy.Hook{
		policy.HookEgressSocket, policy.HookIngressSocket, policy.HookEgressDevice, policy.HookIngressDevice,
		policy.HookLoopback, policy.HookGuard, policy.HookFromWorkload, policy.HookToWorkload,
	}
	if r.IntN(2) == 0 {
		p.Hook = hooks[r.IntN(len(hooks))]
	}
	p.Device = policy.DeviceTunnel
	if p.Hook != policy.HookFromWorkload && p.Hook != policy.HookToWorkload && p.Hook != policy.HookEgressDevice {
		p.Interface = 0
	}
	switch p.Hook {
	case policy.HookEgressSocket, policy.HookIngressSocket:
		p.Device = policy.Device(r.IntN(3))
	case policy.HookLoopback:
		p.Device = policy.DeviceLoopback
	case policy.HookGuard:
		p.Device = policy.DeviceOther
	}
	// What has ended may be opened again sooner in the kernel, which remembers flags (TestIdle).
	p.TCPFlags &^= policy.FlagFIN | policy.FlagRST
	return p
}
