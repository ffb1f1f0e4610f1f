package enforce

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policy/policytest"
)

const (
	packetsEnv = "SIGNET_PACKETS"      // how many packets TestRandomPackets judges; unset takes packetsDefault
	seedEnv    = "SIGNET_PACKETS_SEED" // SEED or SEED/LOAD, as a failure printed it: the packets begin there

	packetsDefault = 100_000
	viewsPerLoad   = 4   // views that follow each other over one table
	packetsPerView = 400 // then the whole table is compared
	maxDifferent   = 10  // loads with a difference, then the test gives up
	fastRoom       = 128 // connections of each IP version: soon full, and never far from it
)

// fastTwin is the twin without a system call before and after each run: what goes in and comes out is mapped memory.
type fastTwin struct {
	*twin
	in, out *ebpf.Memory
}

func newFastTwin(t testing.TB, v *policy.View) *fastTwin {
	t.Helper()
	spec, err := bpf.LoadJudgeTest()
	must(t, err, "read object")
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	must(t, setOverlay(spec, v.Overlay4, v.Overlay6), "set overlay")
	must(t, setLinkHeader(spec, benchLinkHeader), "set link header")
	spec.Maps[mapConns4].MaxEntries, spec.Maps[mapConns6].MaxEntries = fastRoom, fastRoom
	for _, name := range []string{"test_in", "test_out"} {
		spec.Maps[name].Flags |= unix.BPF_F_MMAPABLE
	}
	coll, err := ebpf.NewCollection(spec)
	must(t, err, "load")
	t.Cleanup(coll.Close)
	k := &fastTwin{twin: &twin{coll: coll, now: clock{wall: policytest.Now, mono: int64(1000 * time.Hour)}}}
	k.w, err = newWriter(coll.Maps, func() clock { return k.now })
	must(t, err, "writer")
	k.in, err = coll.Maps["test_in"].Memory()
	must(t, err, "map the input")
	k.out, err = coll.Maps["test_out"].Memory()
	must(t, err, "map the output")
	return k
}

// bytesOf is a value as the kernel reads it.
func bytesOf[T any](v *T) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v)) }

// run judges a frame as the packet's hook, socket and device say.
func (k *fastTwin) run(t testing.TB, p *policy.Packet, frame []byte, now time.Time) policy.Decision {
	t.Helper()
	in := bpf.JudgeTestTestInput{
		Now: k.now.stamp(now), Levels: uint32(len(p.Socket.Cgroups)), Uid: p.Socket.UID, Device: uint32(p.Device),
		Ifindex: p.Interface,
	}
	if p.Connected {
		in.Connected = 1
	}
	if p.Device == policy.DeviceWorkload {
		in.Device = uint32(policy.DeviceOther)
	}
	for i, id := range p.Socket.Cgroups {
		in.Cgroups[len(p.Socket.Cgroups)-1-i] = id
	}
	var out bpf.JudgeTestTestOutput
	_, err := k.in.WriteAt(bytesOf(&in), 0)
	must(t, err, "set input")
	_, err = k.out.WriteAt(bytesOf(&out), 0)
	must(t, err, "clear output")
	code, err := k.coll.Programs[hookPrograms[p.Hook]].Run(&ebpf.RunOptions{Data: frame})
	must(t, err, "run")
	_, err = k.out.ReadAt(bytesOf(&out), 0)
	must(t, err, "read output")
	d := policy.Decision{
		Verdict: flow.Verdict(out.Verdict), Reason: flow.Reason(out.Reason), Rule: out.Rule,
		Src: identity.Number(out.Src), Dst: identity.Number(out.Dst),
	}
	if out.Runs == 0 {
		d = policy.Decision{Verdict: flow.Ignore} // the guard passed it without a look
	}
	if out.Runs > 1 {
		t.Errorf("the program decided %d times", out.Runs)
	}
	if passed := d.Verdict != flow.Deny; passed != passes(p.Hook, code) {
		t.Errorf("verdict %v, and the program returned %d", d.Verdict, int32(code))
	}
	return d
}

// TestRandomPackets judges very many packets of a generator in both twins. The packets of one load follow each other over
// one table: requests, replies, errors and fragments of what passed before, while views replace each other.
func TestRandomPackets(t *testing.T) {
	needRoot(t)
	total, seed, load := randomSettings(t)
	cases := policytest.Cases()
	views := distinctViews(cases)
	k := newFastTwin(t, views[0])
	began, done := time.Now(), 0
	verdicts := map[flow.Reason]int{}
	different := 0
	for ; done < total && different < maxDifferent; load++ {
		r, failed := rand.New(rand.NewPCG(seed, load)), t.Failed()
		n, same := k.randomLoad(t, r, cases, views, verdicts)
		done += n
		if !same || t.Failed() && !failed {
			different++
			t.Logf("to see it again: %s=%d/%d", seedEnv, seed, load)
		}
	}
	rate := float64(done) / time.Since(began).Seconds()
	t.Logf("seed %d: %d packets, %d loads with a difference, %d views, %.0f packets a second; by reason: %v",
		seed, done, different, len(views), rate, verdicts)
	for _, r := range []flow.Reason{flow.PolicyAllow, flow.NoRule, flow.CTInvalid, flow.CTFull, flow.Malformed, flow.Fragment, flow.SpoofedSource} {
		if verdicts[r] == 0 && done >= packetsDefault && !t.Failed() {
			t.Errorf("no packet was judged %v: the generator has lost its bite", r)
		}
	}
}

// randomSettings reads how many packets there are to be, and where they begin.
func randomSettings(t *testing.T) (total int, seed, load uint64) {
	t.Helper()
	total, seed = packetsDefault, uint64(time.Now().UnixNano())
	if s := os.Getenv(packetsEnv); s != "" {
		n, err := strconv.Atoi(s)
		must(t, err, packetsEnv)
		total = n
	}
	if s := os.Getenv(seedEnv); s != "" {
		first, second, both := strings.Cut(s, "/")
		var err error
		seed, err = strconv.ParseUint(first, 10, 64)
		must(t, err, seedEnv)
		if both {
			load, err = strconv.ParseUint(second, 10, 64)
			must(t, err, seedEnv)
		}
	}
	return total, seed, load
}

// distinctViews leaves out those that mean the same.
func distinctViews(cases []policytest.Case) (views []*policy.View) {
next:
	for i := range cases {
		for _, v := range views {
			if sameView(v, cases[i].View) {
				continue next
			}
		}
		views = append(views, cases[i].View)
	}
	return views
}

// stepNs is a step of the kernel's entries: an entry is judged again up to this much early, so that no load happens
// within one before an entry's end.
const stepNs = time.Duration(1) << bpf.ConnStep

// endsSoon: the conversation is to be judged again within a step.
func endsSoon(table *policy.Table, t flow.Tuple, now time.Time) bool {
	key, _ := t.Canonical()
	left := table.Conns[key].Expires.Sub(now)
	return left > 0 && left < stepNs
}

// randomLoad runs one table's packets, and returns how many there were, and whether both twins said the same
// of each; after a difference it ends.
func (k *fastTwin) randomLoad(t *testing.T, r *rand.Rand, cases []policytest.Case, views []*policy.View, reasons map[flow.Reason]int) (n int, same bool) {
	times := []time.Duration{0, 0, 0, stepNs, -stepNs, time.Minute, -time.Minute, 2 * time.Minute, time.Hour}
	now := policytest.Now.Add(times[r.IntN(len(times))])
	start := &cases[r.IntN(len(cases))]
	view := *views[r.IntN(len(views))]
	table := bounded(start.Table(), &view)
	table.Max = fastRoom
	for key := range table.Conns {
		if endsSoon(table, key, now) {
			delete(table.Conns, key)
		}
	}
	changes := viewsPerLoad
	if r.IntN(4) == 0 {
		table.Quota = 1 + r.IntN(40)
	}
	if table.Quota > 0 {
		changes = 1 // whose quota an old entry counts in changes when it is judged again, and not with the view
	}
	k.load(t, &view, table, now)
	g := newGenerator(r, cases, &view)
	for change := range changes {
		if change > 0 {
			next := *views[r.IntN(len(views))]
			next.Generation = view.Generation + 1
			next.Revision = uint64(r.IntN(3))
			view = next
			k.w.view = nil
			_, err := k.w.apply(&view)
			must(t, err, "apply")
			g.use(&view)
		}
		for i := range packetsPerView {
			p := g.next()
			if p.Quoted != nil && endsSoon(table, *p.Quoted, now) {
				continue // the kernel takes the connection for ended up to a step early
			}
			n++
			want := policy.Judge(&view, table, p, now)
			reasons[want.Reason]++
			if got := k.run(t, &p, frame(p), now); got != want {
				about := p.Tuple
				if p.Quoted != nil {
					about = *p.Quoted
				}
				key, _ := about.Canonical()
				t.Errorf("view %d, packet %d: kernel %+v, want %+v, for %s; tracked %+v; lease %+v; generation %d; at %v",
					change, i, got, want, showPacket(p), table.Conns[key], view.Lease, view.Generation, now)
				return n, false
			}
		}
		k.sameTable(t, &view, table)
	}
	return n, true
}

func showPacket(p policy.Packet) string {
	if p.Quoted != nil {
		return fmt.Sprintf("%+v quoting %+v", p, *p.Quoted)
	}
	return fmt.Sprintf("%+v", p)
}
