package registry_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/policydoc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var epoch = time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)

// bench is a registry over a real store, with a clock of its own.
type bench struct {
	*registry.Registry
	t     *testing.T
	dir   string
	store *store.SQLite
	opts  registry.Options
	now   atomic.Int64 // nanoseconds after epoch
}

func (b *bench) advance(d time.Duration) { b.now.Add(int64(d)) }

func newBench(t *testing.T) *bench { return newBenchIn(t, registry.Options{}) }

func newBenchIn(t *testing.T, opts registry.Options) *bench {
	t.Helper()
	b := &bench{t: t, dir: filepath.Join(t.TempDir(), "data")}
	opts.TrustDomain = td(t)
	opts.Now = func() time.Time { return epoch.Add(time.Duration(b.now.Load())) }
	opts.Parse = parse
	opts.Pin = func() [32]byte { return [32]byte{1, 2, 3} }
	b.opts = opts
	b.open()
	t.Cleanup(func() { b.store.Close() })
	return b
}

func (b *bench) open() {
	b.t.Helper()
	var err error
	if b.store, err = store.OpenSQLite(context.Background(), b.dir); err != nil {
		b.t.Fatal(err)
	}
	if b.Registry, err = registry.Open(context.Background(), b.store, b.opts); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) reopen() {
	b.t.Helper()
	if err := b.store.Close(); err != nil {
		b.t.Fatal(err)
	}
	b.open()
}

func td(t *testing.T) identity.TrustDomain {
	t.Helper()
	d, err := identity.ParseTrustDomain("settler.example")
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// parse reads a stand-in for policy documents: workloads with their globs, and rule names, in JSON.
func parse(files []store.SourceFile) (*policydoc.Document, error) {
	doc := &policydoc.Document{}
	d, err := identity.ParseTrustDomain("settler.example")
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		var src struct {
			Workloads map[string][]string
			Rules     []string
		}
		if err := json.Unmarshal(f.Data, &src); err != nil {
			return nil, err
		}
		for name, globs := range src.Workloads {
			id, err := d.ParseShort(name)
			if err != nil {
				return nil, err
			}
			doc.Workloads = append(doc.Workloads, policydoc.Workload{ID: id, Nodes: globs})
		}
		for _, r := range src.Rules {
			doc.Rules = append(doc.Rules, policydoc.Rule{ID: r})
		}
	}
	return doc, nil
}

func (b *bench) apply(text string) uint64 {
	b.t.Helper()
	files := []store.SourceFile{{Name: "p.json", Data: []byte(text)}}
	doc, err := parse(files)
	if err != nil {
		b.t.Fatal(err)
	}
	rev, err := b.ApplyPolicy(context.Background(), doc, files, "ada", nil)
	if err != nil {
		b.t.Fatal(err)
	}
	return rev
}

func (b *bench) token(req registry.TokenRequest) identity.JoinToken {
	b.t.Helper()
	text, _, err := b.CreateJoinToken(context.Background(), req)
	if err != nil {
		b.t.Fatal(err)
	}
	token, err := identity.ParseJoinToken(text)
	if err != nil {
		b.t.Fatal(err)
	}
	return token
}

func random32() (k [32]byte) {
	_, _ = rand.Read(k[:])
	return k
}

func wireguard(t *testing.T) key.Public {
	t.Helper()
	k := random32()
	p, err := key.PublicFromBytes(k[:])
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// join enrols a host under a name with a token for that name.
func (b *bench) join(name string) registry.Node {
	b.t.Helper()
	n, already, err := b.Enrol(context.Background(), registry.EnrolRequest{Token: b.token(registry.TokenRequest{Node: name}), Node: name, SPKI: random32(), WireGuardKey: wireguard(b.t)})
	if err != nil || already {
		b.t.Fatalf("enrol %s: already %t, %v", name, already, err)
	}
	return n
}

func (b *bench) instance(workload, node string) (registry.Instance, bool) {
	b.t.Helper()
	for _, i := range b.State().Instances {
		if i.Workload.Short() == workload && i.Node == node {
			return i, true
		}
	}
	return registry.Instance{}, false
}

func (b *bench) mustInstance(workload, node string) registry.Instance {
	b.t.Helper()
	i, ok := b.instance(workload, node)
	if !ok {
		b.t.Fatalf("%s is not on %s: %+v", workload, node, b.State().Instances)
	}
	return i
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestAddressesAreStableAndRest(t *testing.T) {
	b := newBenchIn(t, registry.Options{Overlay4: netip.MustParsePrefix("198.18.7.0/24")})
	b.join("api-1")
	const with = `{"workloads": {"app/api-server": ["api-*"], "app/webhook": ["api-1"]}}`
	const without = `{"workloads": {"app/webhook": ["api-1"]}}`
	b.apply(with)
	first := b.mustInstance("app/api-server", "api-1")
	b.apply(with)
	b.reopen()
	b.join("api-2")
	if got := b.mustInstance("app/api-server", "api-1"); got != first {
		t.Errorf("after another policy, a restart and another node: %+v, was %+v", got, first)
	}
	b.apply(without)
	if _, ok := b.instance("app/api-server", "api-1"); ok {
		t.Error("it is still there")
	}
	// Others go all the way round the range; its address rests.
	for i := range 300 {
		b.apply(fmt.Sprintf(`{"workloads": {"app/webhook": ["api-1"], "tmp/w%d": ["api-1"]}}`, i%5))
		if got := b.mustInstance(fmt.Sprintf("tmp/w%d", i%5), "api-1"); got.IPv4 == first.IPv4 || got.IPv6 == first.IPv6 {
			t.Fatalf("round %d: %s was given out in its quarantine", i, got.IPv4)
		}
	}
	b.apply(with)
	if got := b.mustInstance("app/api-server", "api-1"); got.IPv4 != first.IPv4 || got.IPv6 != first.IPv6 || got.Number != first.Number {
		t.Errorf("back within the quarantine: %+v, was %+v", got, first)
	}
	b.apply(without)
	b.advance(registry.Quarantine)
	found := false
	for i := range 254 {
		b.apply(fmt.Sprintf(`{"workloads": {"app/webhook": ["api-1"], "new/w%d": ["api-1"]}}`, i))
		found = found || b.mustInstance(fmt.Sprintf("new/w%d", i), "api-1").IPv4 == first.IPv4
		if found {
			break
		}
	}
	if !found {
		t.Error("the address never came free")
	}
}

func TestFullRangeIsRefusedWhole(t *testing.T) {
	b := newBenchIn(t, registry.Options{Overlay4: netip.MustParsePrefix("198.18.7.0/24")})
	b.join("api-1")
	var w []string
	for i := range 260 {
		w = append(w, fmt.Sprintf(`"app/w%d": ["api-1"]`, i))
	}
	files := []store.SourceFile{{Name: "p.json", Data: []byte(`{"workloads": {` + strings.Join(w, ",") + `}}`)}}
	doc, err := parse(files)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.ApplyPolicy(context.Background(), doc, files, "ada", nil); !errors.Is(err, registry.ErrPoolExhausted) {
		t.Errorf("got %v", err)
	}
	if st := b.State(); st.PolicyRevision != 0 || len(st.Instances) != 0 {
		t.Errorf("half applied: revision %d, %d instances", st.PolicyRevision, len(st.Instances))
	}
}

func TestPolicyHistoryAndRollback(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	b.join("api-1")
	one := b.apply(`{"workloads": {"app/api-server": ["api-1"]}, "rules": ["a"]}`)
	two := b.apply(`{"workloads": {"app/webhook": ["api-1"]}, "rules": ["b", "a"]}`)
	if one != 1 || two != 2 {
		t.Fatalf("revisions %d %d", one, two)
	}
	stale := one
	if _, err := b.ApplyPolicy(ctx, &policydoc.Document{}, nil, "eve", &stale); !errors.Is(err, registry.ErrPolicyConflict) {
		t.Errorf("stale If-Match: %v", err)
	}
	three, err := b.Rollback(registry.WithActor(ctx, "bob"), 0)
	if err != nil || three != 3 {
		t.Fatalf("rollback: %d %v", three, err)
	}
	b.mustInstance("app/api-server", "api-1")
	b.reopen()
	st := b.State()
	if st.PolicyRevision != 3 || len(st.Policy.Workloads) != 1 || st.Policy.Workloads[0].ID.Short() != "app/api-server" {
		t.Errorf("after a restart: revision %d, %+v", st.PolicyRevision, st.Policy.Workloads)
	}
	if st.RuleNumbers["a"] != 1 || st.RuleNumbers["b"] != 2 {
		t.Errorf("rule numbers %v", st.RuleNumbers)
	}
	h, err := b.History(ctx)
	if err != nil || len(h) != 3 || h[0].Revision != 3 || h[0].By != "bob" || h[0].Comment != "rollback to 1" || h[2].By != "ada" {
		t.Errorf("history %+v %v", h, err)
	}
	src, err := b.PolicySource(ctx, 2)
	if err != nil || len(src) != 1 || !strings.Contains(string(src[0].Data), "webhook") {
		t.Errorf("source %v %v", src, err)
	}
	if _, err := b.Rollback(ctx, 99); !errors.Is(err, registry.ErrPolicyUnknown) {
		t.Errorf("rollback to 99: %v", err)
	}
}

func TestRevokeWorkload(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	b.join("api-1")
	b.join("api-2")
	const text = `{"workloads": {"app/api-server": ["api-*"]}}`
	b.apply(text)
	id := b.mustInstance("app/api-server", "api-1").Workload
	old := b.mustInstance("app/api-server", "api-1")
	must[uint64](t)(b.RevokeWorkload(ctx, id, "api-1"))
	if !b.mustInstance("app/api-server", "api-1").Revoked || b.mustInstance("app/api-server", "api-2").Revoked {
		t.Error("one node was meant")
	}
	must[uint64](t)(b.RevokeWorkload(ctx, id, ""))
	b.join("api-3")
	if _, ok := b.instance("app/api-server", "api-3"); ok || !b.mustInstance("app/api-server", "api-2").Revoked {
		t.Error("every node was meant, later ones too")
	}
	b.apply(text)
	if !b.mustInstance("app/api-server", "api-1").Revoked {
		t.Error("applying the same policy again gave it back")
	}
	b.apply(`{}`)
	b.apply(text)
	if i := b.mustInstance("app/api-server", "api-1"); i.Revoked || i.IPv4 == old.IPv4 || i.IPv6 == old.IPv6 {
		t.Errorf("placed anew: %+v, was %+v", i, old)
	}
	if _, err := b.RevokeWorkload(ctx, id, "nobody"); !errors.Is(err, registry.ErrNotPlaced) {
		t.Errorf("got %v", err)
	}
	b.apply(`{}`)
	if _, err := b.RevokeWorkload(ctx, id, ""); !errors.Is(err, registry.ErrWorkloadUnknown) {
		t.Errorf("got %v", err)
	}
}

func TestWakeUps(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	mine, cancel := b.Subscribe()
	b.join("api-1")
	<-mine
	<-b.Changed()
	before := b.State()
	if err := b.Applied(ctx, "api-1", registry.AppliedReport{PolicyRevision: 3, Epoch: 9}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-mine:
		t.Error("a report woke the readers")
	default:
	}
	rev := must[uint64](t)(b.Bump(ctx))
	<-mine
	if st := b.State(); st.Revision != rev || before.Revision >= rev {
		t.Errorf("revision %d, bumped to %d", st.Revision, rev)
	}
	cancel()
	must[uint64](t)(b.Bump(ctx))
	select {
	case <-mine:
		t.Error("woken after cancel")
	default:
	}
	roll, err := b.Rollout(ctx, 3)
	if err != nil || len(roll) != 1 || !roll[0].Done || roll[0].Epoch != 9 {
		t.Errorf("rollout %+v %v", roll, err)
	}
	if roll, _ = b.Rollout(ctx, 4); roll[0].Done {
		t.Error("done with an older revision")
	}
	if err := b.Applied(ctx, "nobody", registry.AppliedReport{}); !errors.Is(err, registry.ErrNodeUnknown) {
		t.Errorf("got %v", err)
	}
}

func TestSettingsThatDoNotFit(t *testing.T) {
	b := newBench(t)
	b.join("api-1")
	other, err := identity.ParseTrustDomain("other.example")
	if err != nil {
		t.Fatal(err)
	}
	for what, opts := range map[string]registry.Options{
		"trust domain": {TrustDomain: other},
		"overlay":      {Overlay4: netip.MustParsePrefix("10.99.0.0/16")},
		"not a net":    {Overlay4: netip.MustParsePrefix("10.99.0.1/16")},
	} {
		if _, err := registry.Open(context.Background(), b.store, opts); !errors.Is(err, registry.ErrSettings) {
			t.Errorf("%s: %v", what, err)
		}
	}
	r, err := registry.Open(context.Background(), b.store, registry.Options{Lease: time.Hour})
	if err != nil || r.State().Lease != time.Hour || r.State().TrustDomain != td(t) {
		t.Errorf("lease: %v", err)
	}
}

func TestOverlay6For(t *testing.T) {
	p := registry.Overlay6For(td(t))
	if p.Bits() != 48 || p.Addr().As16()[0] != 0xfd || p != registry.Overlay6For(td(t)) || p.Masked() != p {
		t.Errorf("%s", p)
	}
}

// TestStateFollows compares the state that was kept by following revisions with one that was read whole.
func TestStateFollows(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	for i := range 8 {
		b.join(fmt.Sprintf("api-%d", i))
		b.apply(fmt.Sprintf(`{"workloads": {"app/w%d": ["api-*"], "app/x": ["api-[0-4]"]}}`, i%3))
	}
	must[uint64](t)(b.Revoke(ctx, "api-3"))
	must[uint64](t)(b.RevokeWorkload(ctx, b.mustInstance("app/x", "api-1").Workload, "api-1"))
	must[uint64](t)(b.Bump(ctx))
	followed := b.State()
	b.reopen()
	whole := b.State()
	if fmt.Sprint(followed.Nodes, followed.Instances, followed.Numbers, followed.RuleNumbers, followed.Revision) !=
		fmt.Sprint(whole.Nodes, whole.Instances, whole.Numbers, whole.RuleNumbers, whole.Revision) {
		t.Errorf("followed:\n%+v\nread whole:\n%+v", followed, whole)
	}
	if head, err := store.VerifyAudit(ctx, b.store); err != nil || head.Lines == 0 {
		t.Errorf("audit log: %+v %v", head, err)
	}
}
