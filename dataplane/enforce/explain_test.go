package enforce

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policy/policytest"
)

// newDryRun loads every program that answers questions, over the maps of a host under test.
func newDryRun(t *testing.T, k *twin, v *policy.View) *dryRun {
	t.Helper()
	var steps []dryStep
	for h, name := range hookPrograms {
		if h != policy.HookBind {
			steps = append(steps, dryStep{hook: h, program: name})
		}
	}
	d, err := loadDryRun(k.coll.Maps, v.Overlay4, v.Overlay6, steps)
	must(t, err, "load the twin")
	t.Cleanup(d.coll.Close)
	return d
}

// dump is everything that a host under test holds in maps which programs may write, beside what is only ever added to.
func dump(t *testing.T, coll *ebpf.Collection) map[string]string {
	t.Helper()
	out := map[string]string{}
	for name, m := range coll.Maps {
		switch m.Type() {
		case ebpf.Hash, ebpf.Array, ebpf.LPMTrie:
		default:
			continue
		}
		var key, value []byte
		it := m.Iterate()
		for it.Next(&key, &value) {
			out[fmt.Sprintf("%s %x", name, key)] = fmt.Sprintf("%x", value)
		}
		must(t, it.Err(), "read map "+name)
	}
	return out
}

// untold fails when anything was counted or told.
func untold(t *testing.T, coll *ebpf.Collection) {
	t.Helper()
	var perCPU []uint64
	for _, name := range []string{mapCounters, mapLost} {
		for slot := range coll.Maps[name].MaxEntries() {
			must(t, coll.Maps[name].Lookup(slot, &perCPU), "read "+name)
			for _, n := range perCPU {
				if n != 0 {
					t.Errorf("map %s has %d in slot %d", name, n, slot)
				}
			}
		}
	}
	r, err := ringbuf.NewReader(coll.Maps[mapEvents])
	must(t, err, "open the event ring")
	defer r.Close()
	if n := r.AvailableBytes(); n != 0 {
		t.Errorf("%d bytes of events were told", n)
	}
}

// TestExplainTable asks the twin about every packet of the one table of cases. It answers as the judge in Go, which
// TestTable compares with the programs that are attached, every time anew; and afterwards every map is what it was.
func TestExplainTable(t *testing.T) {
	needRoot(t)
	cases := policytest.Cases()
	k := newTwin(t, cases[0].View.Overlay4, cases[0].View.Overlay6)
	d := newDryRun(t, k, cases[0].View)
	asked := 0
	for _, c := range cases {
		if c.Packet.Hook == policy.HookBind {
			continue // no packet, and no question
		}
		asked++
		t.Run(c.Name, func(t *testing.T) {
			k.load(t, c.View, c.Table(), c.Now)
			before := dump(t, k.coll)
			for range 2 {
				compareDry(t, k, d, &c, c.Packet, c.Now)
			}
			if !maps.Equal(before, dump(t, k.coll)) {
				t.Error("the twin wrote to the judge's maps")
			}
		})
	}
	if asked < 100 {
		t.Errorf("only %d cases were asked", asked)
	}
	untold(t, k.coll)
}

// compareDry asks the twin and the judge in Go about one packet.
func compareDry(t *testing.T, k *twin, d *dryRun, c *policytest.Case, p policy.Packet, now time.Time) {
	t.Helper()
	want := policy.Judge(c.View, c.Table(), p, now)
	must(t, d.clear(), "clear")
	in := inputOf(p)
	in.Now = k.now.stamp(now)
	got, err := d.judge(hookPrograms[p.Hook], in, frame(p))
	must(t, err, "ask")
	// A Decision of Judge carries what it tracks beside it.
	if got.Verdict != want.Verdict || got.Reason != want.Reason || got.Rule != want.Rule || got.Src != want.Src || got.Dst != want.Dst {
		t.Errorf("the twin says %+v, want %+v, for %+v", got, want, p)
	}
}

// TestExplainRandom crosses the cases with each other, as TestRandomTwin does with the programs that are attached.
func TestExplainRandom(t *testing.T) {
	needRoot(t)
	const rounds, packets = 40, 6
	cases := policytest.Cases()
	k := newTwin(t, cases[0].View.Overlay4, cases[0].View.Overlay6)
	d := newDryRun(t, k, cases[0].View)
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	for round := range rounds {
		c := cases[r.IntN(len(cases))]
		k.load(t, c.View, c.Table(), c.Now)
		before := dump(t, k.coll)
		for range packets {
			p := vary(r, &cases[r.IntN(len(cases))], &cases[r.IntN(len(cases))])
			if p.Hook != policy.HookBind {
				compareDry(t, k, d, &c, p, c.Now)
			}
		}
		if !maps.Equal(before, dump(t, k.coll)) {
			t.Error("the twin wrote to the judge's maps")
		}
		if t.Failed() {
			t.Fatalf("seed %d, round %d: host of %q", seed, round, c.Name)
		}
	}
	untold(t, k.coll)
}

// TestExplainFrames: the packets that questions are asked with are those that the tests of the judge send.
func TestExplainFrames(t *testing.T) {
	needRoot(t)
	cases := policytest.Cases()
	k := newTwin(t, cases[0].View.Overlay4, cases[0].View.Overlay6)
	d := newDryRun(t, k, cases[0].View)
	same := 0
	for _, c := range cases {
		p := c.Packet
		opens := p.Part == policy.Whole && !p.Malformed && p.Quoted == nil && p.Tuple.Src.Addr().IsValid() && p.Tuple.Src.Port() != 0 &&
			(p.TCPFlags == policy.FlagSYN || p.EchoReq || p.Tuple.Proto == protoUDP)
		if !opens || p.Hook == policy.HookBind || p.Hook == policy.HookConnect {
			continue
		}
		same++
		k.load(t, c.View, c.Table(), c.Now)
		in := inputOf(p)
		in.Now = k.now.stamp(c.Now)
		must(t, d.clear(), "clear")
		got, err := d.judge(hookPrograms[p.Hook], in, dryFrame(p.Hook, p.Tuple))
		must(t, err, "ask")
		if got != c.Want {
			t.Errorf("%s: got %+v, want %+v", c.Name, got, c.Want)
		}
	}
	if same < 50 {
		t.Errorf("only %d cases open a flow", same)
	}
}

// TestExplainLevels: as many cgroups as the programs look at fit in a question.
func TestExplainLevels(t *testing.T) {
	if n := len(bpf.JudgeTestTestInput{}.Cgroups); n != maxLevels {
		t.Errorf("a question holds %d cgroups, and the judge looks at %d", maxLevels, n)
	}
}
