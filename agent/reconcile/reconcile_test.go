package reconcile_test

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/agent/reconcile"
	"github.com/signet-overlay/signet/agent/session/sessiontest"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeTarget records calls; fail makes one kind of call fail.
type fakeTarget struct {
	mu    sync.Mutex
	calls []string
	view  *policy.View
	peers map[key.Public]mesh.Peer
	keep  map[key.Public]time.Duration
	fail  map[string]error
}

func newTarget() *fakeTarget {
	return &fakeTarget{peers: map[key.Public]mesh.Peer{}, keep: map[key.Public]time.Duration{}, fail: map[string]error{}}
}

func (f *fakeTarget) do(call string, then func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, call)
	if err := f.fail[call]; err != nil {
		return err
	}
	then()
	return nil
}

func (f *fakeTarget) UpdateHost(context.Context, mesh.Self, []netip.Addr) error {
	return f.do("host", func() {})
}
func (f *fakeTarget) Enforce(_ context.Context, v *policy.View) error {
	return f.do("enforce", func() { f.view = v })
}
func (f *fakeTarget) DenyAll(context.Context) error { return f.do("deny", func() { f.view = nil }) }
func (f *fakeTarget) UpdatePeer(_ context.Context, p mesh.Peer) error {
	return f.do("peer", func() { f.peers[p.Key] = p })
}
func (f *fakeTarget) UpdateKeepalive(_ context.Context, k key.Public, d time.Duration) error {
	return f.do("keepalive", func() { f.keep[k] = d })
}
func (f *fakeTarget) DeletePeer(_ context.Context, k key.Public) error {
	return f.do("delete", func() { delete(f.peers, k) })
}
func (f *fakeTarget) PrunePeers(_ context.Context, keep []key.Public) error {
	return f.do("prune", func() {
		for k := range f.peers {
			if !slices.Contains(keep, k) {
				delete(f.peers, k)
			}
		}
	})
}

// take returns the calls since the last take.
func (f *fakeTarget) take() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := strings.Join(f.calls, " ")
	f.calls = nil
	return s
}

func (f *fakeTarget) set(call string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail[call] = err
}

func start(t *testing.T, f *fakeTarget, mode reconcile.OnLeaseEnd) *reconcile.Reconciler {
	t.Helper()
	return startOn(t, f, mode)
}

func startOn(t *testing.T, f reconcile.Target, mode reconcile.OnLeaseEnd) *reconcile.Reconciler {
	t.Helper()
	r := reconcile.New(f, mode, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = r.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return r
}

var hints = map[string][]netip.AddrPort{"db-1": {netip.MustParseAddrPort("192.0.2.7:51820")}}

func set(t *testing.T, r *reconcile.Reconciler, s *mesh.Snapshot) error {
	t.Helper()
	return r.Wait(t.Context(), r.Set(func(in *reconcile.Input) { in.Snapshot, in.Hints = s, hints }))
}

func wait(d time.Duration) { <-time.After(d); synctest.Wait() }

func TestOrderAndNoCallsWhenNothingChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		s := sessiontest.Sample(t, 1, time.Now())
		if err := set(t, r, &s); err != nil {
			t.Fatal(err)
		}
		if got := f.take(); got != "host enforce peer prune" {
			t.Errorf("calls: %s", got)
		}
		again := sessiontest.Sample(t, 2, time.Now())
		again.Manifest.PolicyRevision = s.Manifest.PolicyRevision
		if err := set(t, r, &again); err != nil {
			t.Fatal(err)
		}
		wait(5 * time.Minute)
		if got := f.take(); got != "" {
			t.Errorf("calls for the same wish: %s", got)
		}
		if st := r.Status(); st.Epoch != 2 || st.PolicyRevision != 101 || !st.Enforced || len(st.Failed) != 0 {
			t.Errorf("status: %+v", st)
		}
	})
}

func TestBindingEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		s := sessiontest.Sample(t, 1, time.Now())
		for i := range s.Bindings {
			s.Bindings[i].NotAfter = time.Now().Add(time.Hour)
		}
		if err := set(t, r, &s); err != nil {
			t.Fatal(err)
		}
		f.take()
		wait(59 * time.Minute)
		if got := f.take(); got != "" {
			t.Errorf("calls before the end: %s", got)
		}
		wait(61 * time.Second)
		if got := f.take(); got != "enforce prune" || len(f.peers) != 0 {
			t.Errorf("calls at the end: %s, %d peers", got, len(f.peers))
		}
	})
}

func TestFailuresAreDataAndRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		f.set("peer", errors.New("no route"))
		s := sessiontest.Sample(t, 1, time.Now())
		if err := set(t, r, &s); err == nil || !strings.Contains(err.Error(), "peer db-1: no route") {
			t.Errorf("Wait gave %v", err)
		}
		if st := r.Status(); st.PolicyRevision != 101 || st.Epoch != 0 || len(st.Failed) != 1 || st.Failed[0].Name != "db-1" {
			t.Errorf("status: %+v", st)
		}
		f.take()
		wait(10 * time.Second)
		tries := strings.Count(f.take(), "peer")
		if tries < 3 || tries > 12 {
			t.Errorf("%d retries in 10 s", tries)
		}
		f.set("peer", nil)
		wait(31 * time.Second)
		if st := r.Status(); len(st.Failed) != 0 || st.Epoch != 1 {
			t.Errorf("status after the repair: %+v", st)
		}
	})
}

func TestNobodyIsLetInAheadOfTheJudge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		f.set("enforce", errors.New("map full"))
		s := sessiontest.Sample(t, 1, time.Now())
		if err := set(t, r, &s); err == nil {
			t.Error("no error")
		}
		if got := f.take(); strings.Contains(got, "peer ") || len(f.peers) != 0 {
			t.Errorf("calls: %s", got)
		}
		if r.Status().Enforced {
			t.Error("counts as enforced")
		}
	})
}

func TestHostFailureDoesNotHoldUpARevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		s := sessiontest.Sample(t, 1, time.Now())
		if err := set(t, r, &s); err != nil {
			t.Fatal(err)
		}
		f.set("host", errors.New("device is gone"))
		gone := sessiontest.Sample(t, 2, time.Now())
		gone.Workloads, gone.Bindings, gone.Rulesets = nil, nil, nil
		if err := set(t, r, &gone); err == nil {
			t.Error("no error")
		}
		if len(f.peers) != 0 || len(f.view.Rulesets) != 0 {
			t.Error("the revocation was held up")
		}
	})
}

func TestNoSnapshotDeniesAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		s := sessiontest.Sample(t, 1, time.Now())
		v := r.Set(func(in *reconcile.Input) { in.Overlay4, in.Overlay6 = s.Self.Overlay4, s.Self.Overlay6 })
		if err := r.Wait(t.Context(), v); err != nil {
			t.Fatal(err)
		}
		if got := f.take(); got != "enforce prune" {
			t.Errorf("calls: %s", got)
		}
		denied(t, f.view)
	})
}

// denied checks that a View passes nothing of the overlay.
func denied(t *testing.T, v *policy.View) {
	t.Helper()
	p := policy.Packet{Hook: policy.HookIngressDevice, TCPFlags: policy.FlagSYN, Tuple: flow.Tuple{Proto: flow.TCP,
		Src: netip.AddrPortFrom(sessiontest.Addrs(9)[0], 4000), Dst: netip.AddrPortFrom(sessiontest.Addrs(5)[0], 5432)}}
	if d := policy.Judge(v, &policy.Table{Conns: map[flow.Tuple]policy.Conn{}}, p, time.Now()); d.Verdict != flow.Deny {
		t.Errorf("a packet passes: %+v", d)
	}
}

func TestDownAndUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		s := sessiontest.Sample(t, 1, time.Now())
		if err := set(t, r, &s); err != nil {
			t.Fatal(err)
		}
		f.take()
		if err := r.Wait(t.Context(), r.Set(func(in *reconcile.Input) { in.Down = true })); err != nil {
			t.Fatal(err)
		}
		if got := f.take(); got != "deny prune" || len(f.peers) != 0 {
			t.Errorf("calls: %s", got)
		}
		if err := r.Wait(t.Context(), r.Set(func(in *reconcile.Input) { in.Down = false })); err != nil {
			t.Fatal(err)
		}
		if got := f.take(); got != "enforce peer prune" || len(f.peers) != 1 {
			t.Errorf("calls: %s", got)
		}
	})
}

func TestKeepalive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		s := sessiontest.Sample(t, 1, time.Now())
		if err := set(t, r, &s); err != nil {
			t.Fatal(err)
		}
		k := sessiontest.PeerKey(t)
		if f.keep[k] != 0 {
			t.Errorf("keepalive %v for a peer with an endpoint", f.keep[k])
		}
		for _, c := range []struct {
			nat   bool
			hints map[string][]netip.AddrPort
			want  time.Duration
		}{{true, hints, reconcile.Keepalive}, {false, hints, 0}, {false, nil, 0}, {true, nil, reconcile.Keepalive}} {
			if err := r.Wait(t.Context(), r.Set(func(in *reconcile.Input) { in.BehindNAT, in.Hints = c.nat, c.hints })); err != nil {
				t.Fatal(err)
			}
			if f.keep[k] != c.want {
				t.Errorf("NAT %v, hints %v: keepalive %v, expected %v", c.nat, c.hints, f.keep[k], c.want)
			}
		}
	})
}

func TestBuildView(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	locals := map[policy.LocalKey]identity.Number{{Cgroup: 5, UID: policy.AnyUID}: sessiontest.APINumber, {Cgroup: 6}: 9999}
	interfaces := map[uint32]identity.Number{7: sessiontest.APINumber, 8: 9999}
	build := func(change func(*mesh.Snapshot), mode reconcile.OnLeaseEnd, at time.Time) *policy.View {
		s := sessiontest.Sample(t, 1, now)
		change(&s)
		v := reconcile.BuildView(&s, locals, interfaces, mode, at)
		if err := v.Validate(); err != nil {
			t.Fatal(err)
		}
		return v
	}
	same := func(*mesh.Snapshot) {}
	a4 := func(last byte) netip.Addr { return sessiontest.Addrs(last)[0] }

	v := build(same, reconcile.DenyAll, now)
	if own := v.Addresses[a4(5)]; !own.Local || own.Number != sessiontest.APINumber {
		t.Errorf("own workload: %+v", own)
	}
	if node := v.Addresses[a4(1)]; !node.Local || node.Number != sessiontest.NodeNumber {
		t.Errorf("own node: %+v", node)
	}
	if peer := v.Addresses[a4(9)]; peer.Local || peer.Number != sessiontest.PGNumber || !peer.NotAfter.Equal(now.Add(24*time.Hour)) {
		t.Errorf("peer: %+v", peer)
	}
	if gone := v.Addresses[a4(77)]; !gone.Revoked || gone.Number != 1010 {
		t.Errorf("tombstone: %+v", gone)
	}
	if len(v.Locals) != 1 || len(v.Rulesets) != 1 || v.Revision != 101 || v.Lease.Mode != policy.LeaseDenyAll || !v.Lease.Ends.Equal(now.Add(24*time.Hour)) {
		t.Errorf("view: %+v", v)
	}
	if len(v.Interfaces) != 1 || v.Interfaces[7] != sessiontest.APINumber || len(v.Traits) != 0 {
		t.Errorf("interfaces %v, traits %v", v.Interfaces, v.Traits)
	}
	want := policy.Traits{Confined: true}
	if v := build(func(s *mesh.Snapshot) { s.Workloads[0].Traits = want }, reconcile.DenyAll, now); v.Traits[sessiontest.APINumber] != want || len(v.Traits) != 1 {
		t.Errorf("traits %v", v.Traits)
	}
	if v := build(same, reconcile.DenyAll, now.Add(25*time.Hour)); len(v.Addresses) != 5 {
		t.Errorf("%d addresses after the Bindings' end, expected own 4 and the tombstone", len(v.Addresses))
	}
	if v := build(same, reconcile.Static, now.Add(6*24*time.Hour)); v.Addresses[a4(9)].Number != sessiontest.PGNumber || !v.Lease.Ends.Equal(now.Add(8*24*time.Hour)) {
		t.Errorf("static after 6 days: %+v", v)
	}
	if v := build(same, reconcile.Static, now.Add(9*24*time.Hour)); v.Addresses[a4(9)].Number != 0 {
		t.Error("static goes on after its grace")
	}
	if v := build(same, reconcile.DenyNew, now); v.Lease.Mode != policy.LeaseDenyNew {
		t.Error("deny-new is not in the lease")
	}
	for _, status := range []string{"pending", "revoked"} {
		if v := build(func(s *mesh.Snapshot) { s.Self.Status = status }, reconcile.DenyAll, now); len(v.Addresses) != 2 || len(v.Locals)+len(v.Rulesets)+len(v.Interfaces)+len(v.Traits) != 0 {
			t.Errorf("%s: %+v", status, v)
		}
	}
	// Two keys that claim one address: the later Binding is left out, in the judge as in the tunnel.
	v = build(func(s *mesh.Snapshot) {
		k, err := key.NewPrivate()
		if err != nil {
			t.Fatal(err)
		}
		b := s.Bindings[1]
		b.Number, b.Node, b.Key = 2000, "other", k.Public()
		s.Bindings = append(s.Bindings, b)
	}, reconcile.DenyAll, now)
	if v.Addresses[a4(9)].Number != sessiontest.PGNumber {
		t.Errorf("a contradiction won: %+v", v.Addresses[a4(9)])
	}
}
