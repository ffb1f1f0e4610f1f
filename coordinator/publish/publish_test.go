package publish

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/coordinator/compile"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policydoc"
	"github.com/signet-overlay/signet/proto/codec"
	"github.com/signet-overlay/signet/proto/signetv1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const document = `
zones: [{name: app}, {name: data}]
workloads:
  - {id: app/api, selectors: ["unit:api.service"], nodes: ["api-*"]}
  - {id: app/hook, selectors: ["unit:hook.service"], nodes: ["api-*"]}
  - {id: data/db, selectors: ["unit:db.service"], nodes: ["db-*"]}
rules:
  - {id: api-to-db, from: [app/api], to: [data/db], allow: [tcp/5432]}
`

// source is a registry reduced to its State.
type source struct {
	mu      sync.Mutex
	state   *registry.State
	subs    map[chan struct{}]struct{}
	bumps   int
	failing error
}

func (s *source) State() *registry.State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

func (s *source) Subscribe() (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.subs[ch] = struct{}{}
	return ch, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.subs, ch)
	}
}

func (s *source) Bump(context.Context) (uint64, error) {
	s.mu.Lock()
	failing := s.failing
	s.mu.Unlock()
	if failing != nil {
		return 0, failing
	}
	s.change(func(*registry.State) { s.bumps++ })
	return s.State().Revision, nil
}

// change makes the next State, as a transaction does.
func (s *source) change(fn func(*registry.State)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := *s.state
	next.Nodes = maps.Clone(next.Nodes)
	next.Instances = slices.Clone(next.Instances)
	next.Revision++
	fn(&next)
	s.state = &next
	for ch := range s.subs {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}

type signer struct {
	priv ed25519.PrivateKey
	cert []byte
}

func newSigner() *signer {
	seed := sha256.Sum256([]byte("distribution"))
	return &signer{ed25519.NewKeyFromSeed(seed[:]), []byte("certificate")}
}

func (s *signer) Sign(m []byte) []byte      { return ed25519.Sign(s.priv, m) }
func (s *signer) DistributionChain() []byte { return s.cert }

func testDomain(t testing.TB) identity.TrustDomain {
	t.Helper()
	td, err := identity.ParseTrustDomain("settler.example")
	if err != nil {
		t.Fatal(err)
	}
	return td
}

func testDocument(t testing.TB, text string) *policydoc.Document {
	t.Helper()
	doc, _, err := policydoc.Parse(testDomain(t), []policydoc.File{{Name: "policy.yaml", Data: []byte(text)}})
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func newSource(t testing.TB, nodes ...string) *source {
	t.Helper()
	s := &source{subs: map[chan struct{}]struct{}{}, state: &registry.State{
		Revision: 10, Incarnation: 1, TrustDomain: testDomain(t), Lease: 24 * time.Hour, PolicyRevision: 1,
		Overlay4: netip.MustParsePrefix("198.18.0.0/15"), Overlay6: netip.MustParsePrefix("fd00:5e77::/48"),
		Policy: testDocument(t, document), Nodes: map[string]registry.Node{},
		Numbers: map[identity.ID]identity.Number{}, RuleNumbers: map[string]uint32{"api-to-db": 1, "hook-to-db": 2},
	}}
	for i, w := range s.state.Policy.Workloads {
		s.state.Numbers[w.ID] = identity.Number(300 + i)
	}
	for i, name := range nodes {
		addNode(t, s.state, name, i+1)
	}
	return s
}

func addNode(t testing.TB, s *registry.State, name string, i int) {
	t.Helper()
	id, err := s.TrustDomain.Node(name)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(name))
	pub, err := key.PublicFromBytes(sum[:])
	if err != nil {
		t.Fatal(err)
	}
	a4, a6 := testAddrs(i * 16)
	s.Nodes[name] = registry.Node{Name: name, ID: id, Number: identity.Number(1000 + i), Status: registry.NodeActive, Key: pub, IPv4: a4, IPv6: a6, Revision: 5}
	for j, w := range s.Policy.Workloads {
		if strings.HasPrefix(name, strings.TrimSuffix(w.Nodes[0], "*")) {
			a4, a6 := testAddrs(i*16 + 1 + j)
			s.Instances = append(s.Instances, registry.Instance{Workload: w.ID, Number: s.Numbers[w.ID], Node: name, IPv4: a4, IPv6: a6, Revision: 6})
		}
	}
}

func testAddrs(n int) (netip.Addr, netip.Addr) {
	return netip.AddrFrom4([4]byte{198, 18, byte(n >> 8), byte(n)}), netip.MustParseAddr(fmt.Sprintf("fd00:5e77::%x", n+1))
}

// snapshot verifies a node's part as its agent would.
func snapshot(t testing.TB, n *Node, s *signer) mesh.Snapshot {
	t.Helper()
	u := &signetv1.Update{Manifest: n.Manifest(), DistributionCertificate: n.Certificate}
	for _, ref := range n.Refs() {
		u.Sections = append(u.Sections, &signetv1.Section{Name: ref.Name, Body: n.Section(ref.Name).Body})
	}
	held, err := codec.Apply(nil, u, codec.Trust{TrustDomain: testDomain(t), Node: n.Name,
		Distribution: func([]byte) (ed25519.PublicKey, error) { return s.priv.Public().(ed25519.PublicKey), nil }})
	if err != nil {
		t.Fatalf("node %s: %v", n.Name, err)
	}
	return held.Snapshot
}

func start(t testing.TB, src *source, sg *signer) *Publisher {
	t.Helper()
	p, err := New(t.Context(), Config{Source: src, Signer: sg, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// run runs p inside a synctest bubble.
func run(t *testing.T, p *Publisher) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := p.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	synctest.Wait()
}

func TestInterestSets(t *testing.T) {
	src, sg := newSource(t, "api-1", "api-2", "db-1"), newSigner()
	p := start(t, src, sg)
	api := snapshot(t, p.Current().Nodes["api-1"], sg)
	if len(api.Workloads) != 2 || len(api.Rulesets) != 1 || len(api.Bindings) != 2 {
		t.Fatalf("api-1 holds %d workloads, %d rulesets, %d bindings; expected 2, 1 and 2", len(api.Workloads), len(api.Rulesets), len(api.Bindings))
	}
	for _, b := range api.Bindings {
		if b.Node != "db-1" || b.Key != src.state.Nodes["db-1"].Key {
			t.Errorf("api-1 holds the binding of %v on %s", b.ID, b.Node)
		}
	}
	db := snapshot(t, p.Current().Nodes["db-1"], sg)
	if len(db.Bindings) != 4 || !slices.Equal(p.Current().Nodes["db-1"].Peers, []string{"api-1", "api-2"}) {
		t.Errorf("db-1 holds %d bindings and peers %v", len(db.Bindings), p.Current().Nodes["db-1"].Peers)
	}
	if db.Manifest.PolicyRevision != 1 || db.Manifest.Epoch != 1<<40|11 || db.Rules[1] != "api-to-db" {
		t.Errorf("manifest %+v, rules %v", db.Manifest, db.Rules)
	}
}

func TestPendingAndRevokedNodes(t *testing.T) {
	src, sg := newSource(t, "api-1", "api-2", "db-1", "db-2"), newSigner()
	setStatus(src.state, "api-2", registry.NodePending)
	p := start(t, src, sg)
	pending := snapshot(t, p.Current().Nodes["api-2"], sg)
	if pending.Self.Status != "pending" || len(pending.Manifest.Sections) != 1 {
		t.Errorf("a pending node holds %v", pending.Manifest.Sections)
	}
	src.change(func(s *registry.State) {
		setStatus(s, "db-1", registry.NodeRevoked)
		for i := range s.Instances {
			if s.Instances[i].Node == "db-1" {
				s.Instances[i].Revoked = true
			}
		}
	})
	if err := p.publish(); err != nil {
		t.Fatal(err)
	}
	gone := snapshot(t, p.Current().Nodes["db-1"], sg)
	if gone.Self.Status != "revoked" || len(gone.Manifest.Sections) != 1 {
		t.Errorf("a revoked node holds %v", gone.Manifest.Sections)
	}
	api := snapshot(t, p.Current().Nodes["api-1"], sg)
	for _, b := range api.Bindings {
		if b.Node != "db-2" {
			t.Errorf("the binding of %v on %s outlived its revocation", b.ID, b.Node)
		}
	}
	node, inst := src.state.Nodes["db-1"], src.state.Instances[4]
	if len(api.Revoked) != 4 || api.Revoked[node.IPv4] != node.Number || api.Revoked[inst.IPv6] != inst.Number {
		t.Errorf("tombstones = %v, expected those of %v and of %+v", api.Revoked, node.ID, inst)
	}
	if again := start(t, src, sg).Current().Nodes["api-1"]; !slices.Equal(again.Refs(), p.Current().Nodes["api-1"].Refs()) {
		t.Error("a restarted coordinator forgot the tombstones")
	}
}

func TestRevokedInstance(t *testing.T) {
	src, sg := newSource(t, "api-1", "db-1", "db-2"), newSigner()
	i := slices.IndexFunc(src.state.Instances, func(i registry.Instance) bool { return i.Node == "db-1" })
	src.state.Instances[i].Revoked = true
	p := start(t, src, sg)
	if own := snapshot(t, p.Current().Nodes["db-1"], sg); len(own.Workloads) != 0 || own.Revoked[src.state.Instances[i].IPv4] != src.state.Instances[i].Number {
		t.Errorf("its own host holds %d workloads, tombstones %v", len(own.Workloads), own.Revoked)
	}
	if api := snapshot(t, p.Current().Nodes["api-1"], sg); len(api.Bindings) != 2 || len(api.Revoked) != 2 {
		t.Errorf("the peer holds %d bindings, tombstones %v", len(api.Bindings), api.Revoked)
	}
	// The address goes to someone else: no tombstone may stand on it.
	src.state.Instances[slices.IndexFunc(src.state.Instances, func(i registry.Instance) bool { return i.Node == "db-2" })].IPv4 = src.state.Instances[i].IPv4
	if api := snapshot(t, start(t, src, sg).Current().Nodes["api-1"], sg); len(api.Revoked) != 1 {
		t.Errorf("tombstones = %v", api.Revoked)
	}
}

func setStatus(s *registry.State, node string, st registry.NodeStatus) {
	n := s.Nodes[node]
	n.Status = st
	s.Nodes[node] = n
}

func TestEncodeOnceSendMany(t *testing.T) {
	var nodes []string
	for i := range 50 {
		nodes = append(nodes, fmt.Sprintf("api-%d", i))
	}
	src, sg := newSource(t, append(nodes, "db-1")...), newSigner()
	p := start(t, src, sg)
	first := p.Counts()
	// 51 times self, workloads, names, revoked; 2 rulesets; bindings of 50 api, db, and 51 nodes.
	if want := uint64(51*4 + 2 + 51 + 51); first.Encoded != want || first.Manifests != 51 {
		t.Errorf("encoded %d sections and %d manifests, expected %d and 51", first.Encoded, first.Manifests, want)
	}
	a, b := p.Current().Nodes["api-0"], p.Current().Nodes["api-1"]
	if name := codec.BindingSection(302, "db-1"); a.Section(name) != b.Section(name) {
		t.Error("two nodes hold two encodings of one binding")
	}
	src.change(func(s *registry.State) { // the key of one host
		n := s.Nodes["api-7"]
		n.Key, n.Revision = s.Nodes["db-1"].Key, s.Revision
		s.Nodes["api-7"] = n
	})
	if err := p.publish(); err != nil {
		t.Fatal(err)
	}
	second := p.Counts()
	if second.Encoded-first.Encoded != 2 || second.Manifests-first.Manifests != 1 {
		t.Errorf("a new key encoded %d sections and %d manifests, expected 2 (workload, node) and 1 (db-1)", second.Encoded-first.Encoded, second.Manifests-first.Manifests)
	}
	if p.Current().Nodes["api-3"].Epoch == p.Current().Epoch || p.Current().Nodes["db-1"].Epoch != p.Current().Epoch {
		t.Error("the wrong nodes have a new manifest")
	}
}

func TestEveryNodeHearsOfANewPolicyRevision(t *testing.T) {
	src, sg := newSource(t, "api-1", "db-1"), newSigner()
	setStatus(src.state, "db-1", registry.NodePending)
	p := start(t, src, sg)
	before := p.Current().Nodes["db-1"]
	src.change(func(s *registry.State) { s.PolicyRevision++ })
	if err := p.publish(); err != nil {
		t.Fatal(err)
	}
	after := p.Current().Nodes["db-1"]
	if after.PolicyRevision != 2 || after.Epoch <= before.Epoch || !slices.Equal(after.Refs(), before.Refs()) {
		t.Errorf("pending node: revision %d, epoch %d after %d", after.PolicyRevision, after.Epoch, before.Epoch)
	}
}

func TestAnotherDistributionKeySignsEverythingAgain(t *testing.T) {
	src, sg := newSource(t, "api-1", "db-1"), newSigner()
	p := start(t, src, sg)
	seed := sha256.Sum256([]byte("the next one"))
	sg.priv, sg.cert = ed25519.NewKeyFromSeed(seed[:]), []byte("next certificate")
	if err := p.publish(); err != nil {
		t.Fatal(err)
	}
	if s := snapshot(t, p.Current().Nodes["api-1"], sg); len(s.Bindings) != 2 {
		t.Errorf("%d bindings", len(s.Bindings))
	}
}

func TestCoalescing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, sg := newSource(t, "api-1", "db-1"), newSigner()
		p := start(t, src, sg)
		run(t, p)
		time.Sleep(time.Second) // fake time: the writer is idle
		base := p.Counts().Publications
		wake, cancel := p.Subscribe("")
		defer cancel()
		begin := time.Now()
		src.change(func(s *registry.State) { s.PolicyRevision++ })
		<-wake
		if d := time.Since(begin); d != 0 {
			t.Errorf("the first change waited %v", d)
		}
		for range 100 {
			time.Sleep(time.Millisecond)
			src.change(func(s *registry.State) { s.PolicyRevision++ })
		}
		time.Sleep(coalesce)
		synctest.Wait()
		if n := p.Counts().Publications - base; n < 3 || n > 4 {
			t.Errorf("101 changes in 100 ms were published %d times, expected one at once and one for each 50 ms", n)
		}
		if p.Current().PolicyRevision != 102 {
			t.Errorf("published policy revision %d, the last was 102", p.Current().PolicyRevision)
		}
	})
}

func TestLeaseRoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, sg := newSource(t, "api-1", "db-1"), newSigner()
		p := start(t, src, sg)
		run(t, p)
		epoch := uint64(0)
		for range 80 { // an hour each: more than six half-lives
			time.Sleep(time.Hour)
			synctest.Wait()
			now := time.Now()
			cur := p.Current()
			if cur.Epoch < epoch {
				t.Fatalf("epoch %d after %d", cur.Epoch, epoch)
			}
			epoch = cur.Epoch
			for _, n := range cur.Nodes {
				s := snapshot(t, n, sg)
				checkLeft(t, "manifest of "+n.Name, s.Manifest.LeaseEnds.Sub(now))
				for _, b := range s.Bindings {
					checkLeft(t, "binding of "+b.ID.String(), b.NotAfter.Sub(now))
					if now.Sub(b.NotBefore) < maxBackdate/2 {
						t.Errorf("a binding began %v ago: a slow clock would refuse it", now.Sub(b.NotBefore))
					}
				}
			}
		}
		// Two nodes, two boundaries each per lease of 24 h, once more for the start.
		if n := src.bumps; n < 12 || n > 16 {
			t.Errorf("%d revisions for 80 hours of two nodes", n)
		}
	})
}

// checkLeft allows for the minute in which the writer may oversleep, and for whole seconds.
func checkLeft(t *testing.T, what string, left time.Duration) {
	t.Helper()
	if left < 12*time.Hour-maxSleep || left > 24*time.Hour+time.Second {
		t.Errorf("%s has %v left, expected 12 h to 24 h", what, left)
	}
}

func TestARestartSignsTheSameBindings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, sg := newSource(t, "api-1", "db-1"), newSigner()
		before := start(t, src, sg).Current()
		time.Sleep(3 * time.Minute)
		after := start(t, src, sg).Current()
		if after.Epoch <= before.Epoch {
			t.Errorf("epoch %d after %d", after.Epoch, before.Epoch)
		}
		for name, n := range before.Nodes {
			if !slices.Equal(n.Refs(), after.Nodes[name].Refs()) {
				t.Errorf("node %s holds other sections after a restart", name)
			}
			for _, s := range n.sections {
				if !bytes.Equal(s.Body, after.Nodes[name].Section(s.Ref.Name).Body) {
					t.Errorf("section %s has other bytes", s.Ref.Name)
				}
			}
		}
	})
}

func TestANewIncarnationIsAboveEverything(t *testing.T) {
	src, sg := newSource(t, "api-1"), newSigner()
	src.state.Revision = 1<<40 - 5
	before := start(t, src, sg).Current().Epoch
	src.state.Revision, src.state.Incarnation = 3, 2
	if after := start(t, src, sg).Current().Epoch; after <= before {
		t.Errorf("epoch %x after %x", after, before)
	}
}

func TestFailuresKeepWhatWasPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, sg := newSource(t, "api-1", "db-1"), newSigner()
		p := start(t, src, sg)
		run(t, p)
		before := p.Current()
		src.change(func(s *registry.State) { s.RuleNumbers = nil }) // does not compile
		time.Sleep(time.Second)
		if p.Current() != before || p.Counts().Failures == 0 {
			t.Error("a state that does not compile was published")
		}
		src.change(func(s *registry.State) { s.RuleNumbers = map[string]uint32{"api-to-db": 1} })
		time.Sleep(time.Second)
		if p.Current().Epoch <= before.Epoch {
			t.Error("the repaired state was not published")
		}
		// The disk fails through a lease boundary, and comes back.
		src.mu.Lock()
		src.failing = errors.New("disk full")
		src.mu.Unlock()
		time.Sleep(15 * time.Hour)
		src.mu.Lock()
		src.failing = nil
		src.mu.Unlock()
		time.Sleep(2 * retryDelay)
		if left := time.Until(p.Current().Nodes["api-1"].LeaseEnds); left < 12*time.Hour-maxSleep {
			t.Errorf("the lease has %v left after the disk came back", left)
		}
	})
}

func TestSubscribersWakeOnlyForTheirNode(t *testing.T) {
	src, sg := newSource(t, "api-1", "api-2", "db-1"), newSigner()
	p := start(t, src, sg)
	api, cancelA := p.Subscribe("api-2")
	db, cancelD := p.Subscribe("db-1")
	src.change(func(s *registry.State) { setStatus(s, "api-1", registry.NodeRevoked) })
	if err := p.publish(); err != nil {
		t.Fatal(err)
	}
	if len(api) != 0 || len(db) != 1 {
		t.Errorf("woken: api-2 %d, db-1 %d; expected only db-1", len(api), len(db))
	}
	cancelA()
	cancelD()
	if len(p.subs.byNode) != 0 {
		t.Error("subscribers stayed")
	}
}

func TestWindows(t *testing.T) {
	for _, lease := range []time.Duration{time.Second, 3 * time.Second, time.Minute, time.Hour, 24 * time.Hour, 7 * 24 * time.Hour} {
		for i := range 200 {
			name := fmt.Sprintf("node-%d", i)
			now := time.Unix(1_790_000_000+int64(i)*7919, 0)
			w := windowAt(name, lease, now)
			if now.Before(w.start) || !now.Before(w.next) || w.notBefore.After(now) {
				t.Fatalf("lease %v, %s: %v is not in [%v, %v)", lease, name, now, w.start, w.next)
			}
			if left := w.notAfter.Sub(now); left > max(lease, 2*time.Second) || left < lease/2-time.Second {
				t.Fatalf("lease %v, %s: %v left", lease, name, left)
			}
			if again := windowAt(name, lease, w.next); again.start != w.next {
				t.Fatalf("lease %v, %s: the next window begins at %v, not %v", lease, name, again.start, w.next)
			}
		}
	}
}

// The same input gives the same values, in whatever order maps are walked.
func TestBuildIsPure(t *testing.T) {
	src := newSource(t, "api-1", "api-2", "db-1", "db-2")
	c, err := compile.Compile(src.state)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1_790_000_000, 0)
	a, b := build(src.state, c.For, now), build(src.state, c.For, now)
	for name, n := range a.nodes {
		if !slices.Equal(n.bindings, b.nodes[name].bindings) || !slices.Equal(n.peers, b.nodes[name].peers) {
			t.Errorf("node %s differs", name)
		}
	}
}

func BenchmarkPublishOneRule(b *testing.B) {
	for _, n := range []int{20, 200, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var nodes []string
			for i := range n {
				nodes = append(nodes, fmt.Sprintf("api-%d", i))
			}
			src, sg := newSource(b, append(nodes, "db-1")...), newSigner()
			p := start(b, src, sg)
			with := testDocument(b, document+"  - {id: hook-to-db, from: [app/hook], to: [data/db], allow: [tcp/5432]}\n")
			without := src.state.Policy
			b.ResetTimer()
			for i := range b.N {
				src.change(func(s *registry.State) {
					s.PolicyRevision++
					s.Policy = []*policydoc.Document{with, without}[i%2]
				})
				if err := p.publish(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
