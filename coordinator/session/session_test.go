package session_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-overlay/signet/coordinator/authority"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/coordinator/session"
	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/proto/signetv1"
)

func TestAStreamBringsTheSnapshotAndThenDifferences(t *testing.T) {
	r := newRig(t)
	api, db := r.enrolled("api-1").connect(), r.enrolled("db-1").connect()
	for api.h.held == nil || len(api.h.held.Snapshot.Bindings) < 2 { // db-1 may not have been published at first
		api.update()
		api.ack("")
	}
	for db.h.held == nil || len(db.h.held.Snapshot.Bindings) < 2 {
		db.update()
		db.ack("")
	}
	if n := len(api.h.held.Snapshot.Workloads); n != 2 {
		t.Fatalf("api-1 has %d workloads", n)
	}
	rev := r.apply(document + hookRule)
	u, _ := api.update()
	var hook identity.Number
	for _, w := range api.h.held.Snapshot.Workloads {
		if w.ID.Short() == "app/hook" {
			hook = w.Number
		}
	}
	if got, want := names(u), []string{"names", fmt.Sprintf("ruleset/%d", hook)}; !slices.Equal(got, want) {
		t.Errorf("one new rule brought %v, expected %v", got, want)
	}
	if m := api.h.held.Snapshot.Manifest; m.PolicyRevision != rev {
		t.Errorf("the manifest says policy revision %d, expected %d", m.PolicyRevision, rev)
	}
}

func TestAStreamResumes(t *testing.T) {
	r := newRig(t)
	h := r.enrolled("api-1")
	l := h.connect()
	l.update()
	wake, cancel := r.srv.Watch()
	defer cancel()
	l.ack("")
	r.eventually("the report arrives", wake, func() bool { return r.srv.Reports()["api-1"].Epoch == h.held.Epoch() })
	l.close()

	// Nothing changed: nothing is sent until something does.
	l = h.connect()
	db := r.enrolled("db-1")
	u, _ := l.update()
	number := r.reg.State().Nodes["db-1"].Number
	if !slices.Contains(names(u), bindingOf(int(number), "db-1")) || slices.Contains(names(u), "self") {
		t.Errorf("a resumed stream brought %v", names(u))
	}
	l.close()

	// An agent that lost its state gets everything.
	h.held = nil
	l = h.connect()
	if u, _ := l.update(); len(u.Sections) != len(h.held.Sections()) {
		t.Errorf("a fresh agent got %d of %d sections", len(u.Sections), len(h.held.Sections()))
	}
	_ = db
}

func TestASlowReaderGetsTheLatest(t *testing.T) {
	r := newRig(t)
	l := r.enrolled("api-1").connect()
	l.update() // not acknowledged
	before := r.srv.Updates()
	last := uint64(0)
	published, cancel := r.pub.Subscribe("")
	defer cancel()
	for i := range 4 {
		last = r.apply(document + strings.Repeat("#\n", i+1))
		r.eventually("publication", published, func() bool { return r.pub.Current().PolicyRevision == last })
	}
	if sent := r.srv.Updates() - before; sent > 1 {
		t.Errorf("%d updates were sent to an agent that acknowledges nothing", sent)
	}
	l.ack("")
	for l.h.held.Snapshot.Manifest.PolicyRevision != last {
		l.update()
		l.ack("")
	}
	if sent := r.srv.Updates() - before; sent > 3 {
		t.Errorf("%d updates for 4 revisions, expected that intermediate ones are skipped", sent)
	}
}

func TestARefusedDeltaIsSentOnceMoreAsAWhole(t *testing.T) {
	r := newRig(t)
	l := r.enrolled("api-1").connect()
	l.update()
	l.ack("")
	r.apply(document + hookRule)
	l.update()
	l.ack("section \"names\" is missing\x1b[31m")
	u, _ := l.update()
	if len(u.Sections) != len(l.h.held.Sections()) {
		t.Errorf("after a refusal %d of %d sections came", len(u.Sections), len(l.h.held.Sections()))
	}
	wake, cancel := r.srv.Watch()
	defer cancel()
	r.eventually("the report with its error", wake, func() bool { return r.srv.Reports()["api-1"].Error != "" })
	if e := r.srv.Reports()["api-1"].Error; strings.ContainsRune(e, '\x1b') {
		t.Errorf("the report still holds a control character: %q", e)
	}
}

func TestRevokeEndsTheStreamWithASignedManifest(t *testing.T) {
	r := newRig(t)
	api, db := r.enrolled("api-1").connect(), r.enrolled("db-1").connect()
	api.update()
	for db.h.held == nil || len(db.h.held.Snapshot.Bindings) < 2 {
		db.update()
		db.ack("")
	}
	begin := time.Now()
	if _, err := r.reg.Revoke(t.Context(), "api-1"); err != nil {
		t.Fatal(err)
	}
	// api-1 has acknowledged nothing: its end waits for nothing.
	code, text := api.end()
	if code != codes.PermissionDenied || api.h.held.Snapshot.Self.Status != "revoked" || len(api.h.held.Snapshot.Workloads) != 0 {
		t.Errorf("ended with %v (%s), status %q", code, text, api.h.held.Snapshot.Self.Status)
	}
	db.update()
	if took := time.Since(begin); took > time.Second {
		t.Errorf("it took %v", took)
	}
	if s := db.h.held.Snapshot; len(s.Bindings) != 0 || len(s.Revoked) != 4 {
		t.Errorf("the peer holds %d bindings and tombstones %v", len(s.Bindings), s.Revoked)
	}
	// It may come again and hears the same; it may not renew.
	api.h.held = nil
	if code, _ := api.h.connect().end(); code != codes.PermissionDenied || api.h.held == nil || api.h.held.Snapshot.Self.Status != "revoked" {
		t.Errorf("a revoked node that connects again ends with %v", code)
	}
	hasPrefix(t, api.h.renew(api.h.priv), codes.PermissionDenied)
}

func TestPendingNodeGetsItsStatusAndIsApproved(t *testing.T) {
	r := newRig(t)
	h := r.newHost("api-1")
	resp, err := h.enrol(r.token(registry.TokenRequest{}))
	if err != nil || !resp.Pending {
		t.Fatalf("pending %v, %v", resp.GetPending(), err)
	}
	l := h.connect()
	l.update()
	l.ack("")
	if s := h.held.Snapshot; s.Self.Status != "pending" || len(s.Manifest.Sections) != 1 {
		t.Errorf("a pending node holds %v", s.Manifest.Sections)
	}
	if _, err := r.reg.Approve(t.Context(), "api-1"); err != nil {
		t.Fatal(err)
	}
	if l.update(); h.held.Snapshot.Self.Status != "active" || len(h.held.Snapshot.Workloads) != 2 {
		t.Errorf("after approval: %+v", h.held.Snapshot.Self)
	}
}

func TestExpiredSVIDMayRenewButNotSync(t *testing.T) {
	r := newRig(t)
	h := r.enrolled("api-1")
	r.skew.Store(int64(2 * time.Hour)) // an SVID lives one
	if code, text := h.connect().end(); code != codes.Unauthenticated || !strings.Contains(text, "CERT_EXPIRED") {
		t.Errorf("an expired SVID: %v %s", code, text)
	}
	next := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	if err := h.renew(next); err != nil {
		t.Fatalf("renew with an expired SVID: %v", err)
	}
	r.skew.Store(0)
	h.connect().update() // with the next key
	r.skew.Store(int64(32 * 24 * time.Hour))
	hasPrefix(t, h.renew(next), codes.Unauthenticated)
}

func TestAStreamEndsWithItsSVID(t *testing.T) {
	r := newRig(t, func(o *options) { o.life = 3 * time.Second })
	l := r.enrolled("api-1").connect()
	if code, text := l.end(); code != codes.Unauthenticated || !strings.Contains(text, "SVID") {
		t.Errorf("ended with %v %s", code, text)
	}
}

func TestStrangersAreRefused(t *testing.T) {
	r := newRig(t)
	other := newRig(t)
	h := other.enrolled("api-1")
	stolen := r.newHost("api-1")
	stolen.use(h.svid().Certificate, h.priv)
	if code, _ := stolen.connect().end(); code != codes.Unavailable { // TLS refuses it
		t.Errorf("an SVID of another root: %v", code)
	}
	// No certificate at all.
	if code, _ := r.newHost("api-1").connect().end(); code != codes.Unauthenticated {
		t.Errorf("no SVID: %v", code)
	}
	hasPrefix(t, r.newHost("api-1").renew(h.priv), codes.Unauthenticated)
	// A valid SVID of a node whose key was replaced.
	first := r.enrolled("api-9")
	second := r.newHost("api-9")
	if _, err := second.enrol(r.token(registry.TokenRequest{Node: "api-9", Replace: true})); err != nil {
		t.Fatal(err)
	}
	if code, text := first.connect().end(); code != codes.PermissionDenied {
		t.Errorf("a replaced key: %v %s", code, text)
	}
	// A certificate of the authority that is no node.
	imposter := r.newHost("api-3")
	cert := r.auth.ServerCertificate()
	imposter.cert = cert
	if code, text := imposter.connect().end(); code != codes.PermissionDenied {
		t.Errorf("the coordinator's own SVID: %v %s", code, text)
	}
}

// A foreign trust domain with the same root cannot exist; another trust domain's root is refused by the handshake.
func TestWrongTrustDomainIsRefused(t *testing.T) {
	r := newRig(t)
	td := must(identity.ParseTrustDomain("other.example"))(t)
	db := must(store.OpenSQLite(t.Context(), t.TempDir()))(t)
	t.Cleanup(func() { _ = db.Close() })
	opts := authority.Options{TrustDomain: td, Key: must(key.NewStateKey())(t)}
	if err := authority.Init(t.Context(), db, opts); err != nil {
		t.Fatal(err)
	}
	foreign := must(authority.Open(t.Context(), db, opts))(t)
	h := r.newHost("api-1")
	chain, _, err := foreign.IssueNode(t.Context(), h.csr(h.priv), must(td.Node("api-1"))(t))
	if err != nil {
		t.Fatal(err)
	}
	h.use(chain, h.priv)
	if code, text := h.connect().end(); code != codes.Unavailable && code != codes.Unauthenticated {
		t.Errorf("another trust domain: %v %s", code, text)
	}
}

func TestANewStreamReplacesTheOld(t *testing.T) {
	r := newRig(t)
	h := r.enrolled("api-1")
	first := h.connect()
	first.update()
	second := h.connect()
	if code, _ := first.end(); code != codes.Aborted {
		t.Errorf("the first stream ended with %v", code)
	}
	second.ack("")
	if n := len(r.srv.Connected()); n != 1 {
		t.Errorf("%d streams", n)
	}
}

func TestReenrolmentEndsTheOldHostsStream(t *testing.T) {
	r := newRig(t)
	l := r.enrolled("api-1").connect()
	l.update()
	if _, err := r.newHost("api-1").enrol(r.token(registry.TokenRequest{Node: "api-1", Replace: true})); err != nil {
		t.Fatal(err)
	}
	if code, _ := l.end(); code != codes.Unauthenticated {
		t.Errorf("the replaced host's stream ended with %v", code)
	}
}

func TestEndpointHints(t *testing.T) {
	r := newRig(t)
	api, db := r.enrolled("api-1"), r.enrolled("db-1")
	a := api.connect()
	for api.held == nil || len(api.held.Snapshot.Bindings) < 2 {
		a.update()
		a.ack("")
	}
	d := db.connect()
	d.update()
	for _, want := range [][]string{
		{"127.0.0.1:51820"},                        // only what was seen: an agent beside the coordinator
		{"192.0.2.7:51820", "[2001:db8::7]:51820"}, // reported, and loopback is nobody else's business
		{"192.0.2.7:40000", "198.51.100.1:51820"},  // moved
		{"192.0.2.7:40000"},                        // less
	} {
		if want[0] != "127.0.0.1:51820" {
			_ = d.stream.Send(&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Endpoints{Endpoints: &signetv1.Endpoints{ListenPort: 51820, Endpoints: append(slices.Clone(want), "not an endpoint")}}})
		}
		var got []string
		for got == nil {
			m, err := a.read()
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range m.GetHints().GetNodes() {
				if n.Node == "db-1" {
					got = n.Endpoints
				}
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("hints = %v, expected %v", got, want)
		}
	}
	if eps := r.srv.Endpoints("db-1"); len(eps) != 1 || eps[0] != netip.MustParseAddrPort("192.0.2.7:40000") {
		t.Errorf("endpoints = %v", eps)
	}
	// On connect everything is told at once.
	a.close()
	a = api.connect()
	var got []string
	for got == nil {
		m, err := a.read()
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range m.GetHints().GetNodes() {
			got = n.Endpoints
		}
	}
	if !slices.Equal(got, []string{"192.0.2.7:40000"}) {
		t.Errorf("hints on connect = %v", got)
	}
}

func TestRefusedHellos(t *testing.T) {
	r := newRig(t)
	h := r.enrolled("api-1")
	for name, c := range map[string]struct {
		first *signetv1.AgentMessage
		code  codes.Code
	}{
		"an epoch from the future": {&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Hello{Hello: &signetv1.Hello{WireguardKey: h.wg.Bytes(), Epoch: 1 << 63}}}, codes.FailedPrecondition},
		"another WireGuard key":    {&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Hello{Hello: &signetv1.Hello{WireguardKey: make([]byte, 32)}}}, codes.FailedPrecondition},
		"no WireGuard key":         {&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Hello{Hello: &signetv1.Hello{ListenPort: 51820}}}, codes.FailedPrecondition},
		"no Hello":                 {&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Ack{Ack: &signetv1.Ack{}}}, codes.InvalidArgument},
		"an empty message":         {&signetv1.AgentMessage{}, codes.InvalidArgument},
		"a section without a hash": {&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Hello{Hello: &signetv1.Hello{WireguardKey: h.wg.Bytes(), Sections: []*signetv1.SectionRef{{Name: "self"}}}}}, codes.InvalidArgument},
		"a port above 65535":       {&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Hello{Hello: &signetv1.Hello{WireguardKey: h.wg.Bytes(), ListenPort: 70000}}}, codes.InvalidArgument},
	} {
		conn := h.client()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		stream := must(signetv1.NewMeshClient(conn).Sync(ctx))(t)
		_ = stream.Send(c.first)
		_, err := stream.Recv()
		if status.Code(err) != c.code {
			t.Errorf("%s: %v, expected %v", name, err, c.code)
		}
		cancel()
		_ = conn.Close()
	}
}

func TestAFloodEndsTheStream(t *testing.T) {
	r := newRig(t)
	l := r.enrolled("api-1").connect()
	l.update()
	for range 400 {
		l.ack("")
	}
	if code, _ := l.end(); code != codes.ResourceExhausted {
		t.Errorf("ended with %v", code)
	}
}

func TestEnrolmentRefusals(t *testing.T) {
	r := newRig(t)
	used := r.token(registry.TokenRequest{Node: "api-1"})
	first := r.newHost("api-1")
	a, err := first.enrol(used)
	if err != nil {
		t.Fatal(err)
	}
	again, err := first.enrol(used) // the same key, the same answer
	if err != nil || again.NodeId != a.NodeId {
		t.Errorf("repeated: %v, %v", again, err)
	}
	texts := map[string]bool{}
	refused := func(name string, h *host, secret [32]byte, code codes.Code) {
		t.Helper()
		_, err := h.enrol(secret)
		if status.Code(err) != code {
			t.Errorf("%s: %v, expected %v", name, err, code)
		}
		texts[status.Convert(err).Message()] = true
	}
	refused("used", r.newHost("api-2"), used, codes.PermissionDenied)
	refused("unknown", r.newHost("api-2"), [32]byte{1}, codes.PermissionDenied)
	expiring := r.token(registry.TokenRequest{Node: "api-2", TTL: time.Nanosecond})
	refused("expired", r.newHost("api-2"), expiring, codes.PermissionDenied)
	refused("other name", r.newHost("api-2"), r.token(registry.TokenRequest{Node: "api-3"}), codes.PermissionDenied)
	refused("taken", r.newHost("api-1"), r.token(registry.TokenRequest{Node: "api-1"}), codes.AlreadyExists)
	refused("no name", r.newHost("../x"), r.token(registry.TokenRequest{}), codes.InvalidArgument)
	if len(texts) != 6 {
		t.Errorf("6 reasons gave %d sentences: %v", len(texts), texts)
	}
	for name, req := range map[string]*signetv1.EnrolRequest{
		"short secret": {TokenSecret: []byte("x"), Node: "n", Csr: first.csr(first.priv), WireguardKey: first.wg.Bytes()},
		"no key":       {TokenSecret: make([]byte, 32), Node: "n", Csr: first.csr(first.priv)},
		"no csr":       {TokenSecret: make([]byte, 32), Node: "n", WireguardKey: first.wg.Bytes()},
		"large csr":    {TokenSecret: make([]byte, 32), Node: "n", Csr: make([]byte, 1<<14), WireguardKey: first.wg.Bytes()},
		"large":        {TokenSecret: used[:], Node: "api-1", Csr: first.csr(first.priv), WireguardKey: first.wg.Bytes(), Version: strings.Repeat("v", 64<<10)},
		"garbage csr":  {TokenSecret: make([]byte, 32), Node: "n", Csr: []byte("garbage"), WireguardKey: first.wg.Bytes()},
	} {
		conn := first.dial(identity.PinnedTLS(r.auth.Bundle().Pin()))
		_, err := signetv1.NewEnrolmentClient(conn).Enrol(t.Context(), req)
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
		_ = conn.Close()
	}
}

func TestOneTokenManyHosts(t *testing.T) {
	r := newRig(t)
	secret := r.token(registry.TokenRequest{Node: "api-*"})
	const n = 50
	var wg sync.WaitGroup
	won := make(chan string, n)
	for i := range n {
		h := r.newHost(fmt.Sprintf("api-%d", i))
		wg.Go(func() {
			if _, err := h.enrol(secret); err == nil {
				won <- h.name
			} else if status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s: %v", h.name, err)
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Errorf("%d of %d won", len(won), n)
	}
}

func TestEnrolmentsAreLimitedByAddress(t *testing.T) {
	r := newRig(t, func(o *options) { o.config = func(c *session.Config) { c.Rate, c.Burst = 0.001, 3 } })
	h := r.newHost("api-1")
	for range 3 {
		_, err := h.enrol([32]byte{1})
		hasPrefix(t, err, codes.PermissionDenied)
	}
	_, err := h.enrol([32]byte{1})
	hasPrefix(t, err, codes.ResourceExhausted)
}

func TestStreamsAreBounded(t *testing.T) {
	r := newRig(t, func(o *options) { o.config = func(c *session.Config) { c.MaxStreams = 1; c.MaxConns = 10 } })
	r.enrolled("api-1").connect().update()
	if code, _ := r.enrolled("api-2").connect().end(); code != codes.ResourceExhausted {
		t.Errorf("the second of one stream: %v", code)
	}
}

func TestReportsReachMemoryAtOnceAndTheStoreSoon(t *testing.T) {
	r := newRig(t)
	l := r.enrolled("api-1").connect()
	l.update()
	wake, cancel := r.srv.Watch()
	defer cancel()
	l.ack("")
	r.eventually("the report in memory", wake, func() bool { return r.srv.Reports()["api-1"].PolicyRevision == 1 })
	stored := func() bool {
		rows, err := r.reg.Rollout(t.Context(), 1)
		return err == nil && len(rows) == 1 && rows[0].Done && rows[0].Epoch == l.h.held.Epoch()
	}
	r.eventually("the report in the store", r.stored, stored)
}

func TestStoppingEndsEveryStream(t *testing.T) {
	r := newRig(t)
	l := r.enrolled("api-1").connect()
	l.update()
	l.ack("")
	begin := time.Now()
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("stopping took %v", d)
	}
	if code, _ := l.end(); code != codes.Unavailable {
		t.Errorf("the stream ended with %v", code)
	}
}
