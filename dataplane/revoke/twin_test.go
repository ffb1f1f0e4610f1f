package revoke

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// randomView keeps some of the services that TestTwins uses, and takes back what there is to take back.
func (l *lab) randomView(r *rand.Rand) *policy.View {
	l.t.Helper()
	v := l.view()
	one := func(n int) bool { return r.IntN(n) == 0 }
	for i := range twinPairs {
		proto := flow.TCP
		if i%2 == 1 {
			proto = flow.UDP
		}
		if !one(3) {
			permit(v, uint32(i+1), numA, numB, proto, uint16(80+i))
		}
		if !one(3) {
			permit(v, uint32(i+100), numB, numA, proto, uint16(80+i))
		}
	}
	if one(4) {
		permit(v, 200, numB, numA, flow.AnyProto, 0)
	}
	if one(4) {
		delete(v.Addresses, a6)
	}
	if one(4) {
		b := v.Addresses[b4]
		b.NotAfter = time.Now().Add(-time.Second)
		v.Addresses[b4] = b
	}
	return v
}

const twinPairs = 8

// TestTwins: the program in the kernel ends as many sockets as Allowed condemns, and Allowed finds none left.
func TestTwins(t *testing.T) {
	l := newLab(t)
	l.enforce()
	a, b := l.start("a"), l.start("b")
	kernel := l.revoker(KindIterator)
	twin := l.revoker(KindDiag).mu.way.(*diag)
	condemned := func() []listed {
		nl, err := dial()
		must(t, err, "dial")
		defer nl.close()
		all, _, err := twin.condemned(context.Background(), nl)
		must(t, err, "list")
		return all
	}
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	gone, stayed := 0, 0
	for round := range 8 {
		l.apply(l.everything())
		for i := range twinPairs {
			a.twinPair(b, i)
		}
		l.apply(l.randomView(r))
		if r.IntN(4) == 0 {
			l.forget()
		}
		want := condemned()
		n, err := kernel.Sweep(context.Background())
		must(t, err, "sweep")
		left := condemned()
		if n != len(want) || len(left) != 0 {
			t.Fatalf("seed %d, round %d: the kernel ended %d sockets and left %d; its twin wants %d to go", seed, round, n, len(left), len(want))
		}
		gone, stayed = gone+n, stayed+2*twinPairs-n
		for i := range twinPairs {
			a.twinClose(b, i)
		}
	}
	if gone == 0 || stayed == 0 {
		t.Errorf("%d sockets went and %d stayed: this proves nothing", gone, stayed)
	}
	t.Logf("%d sockets went and %d stayed", gone, stayed)
}

// everything allows all services that TestTwins uses.
func (l *lab) everything() *policy.View {
	l.t.Helper()
	v := l.view()
	permit(v, 1, numA, numB, flow.AnyProto, 0)
	permit(v, 2, numB, numA, flow.AnyProto, 0)
	return v
}

// twinPair connects the two workloads by one of several ways; every other one is opened by B.
func (p *proc) twinPair(b *proc, i int) {
	from, to, addresses := p, b, [...]string{b4.String(), b6.String()}
	if i/2%2 == 1 {
		from, to, addresses = b, p, [...]string{a4.String(), a6.String()}
	}
	proto := [...]string{"tcp", "udp"}[i%2]
	kind, target := proto+"4", fmt.Sprintf("%s:%d", addresses[0], 80+i)
	if i >= twinPairs/2 {
		kind, target = proto+"6", fmt.Sprintf("[%s]:%d", addresses[1], 80+i)
	}
	pair(from, fmt.Sprint("c", i), to, fmt.Sprint("s", i), kind, kind, target)
}

func (p *proc) twinClose(b *proc, i int) {
	from, to := p, b
	if i/2%2 == 1 {
		from, to = b, p
	}
	from.want("ok", "close c%d", i)
	to.want("ok", "close ls%d", i)
	if i%2 == 0 {
		to.want("ok", "close s%d", i)
	}
}
