package registry_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
)

func TestOneTokenThousandKeys(t *testing.T) {
	b := newBench(t)
	token := b.token(registry.TokenRequest{Node: "api-1"})
	const hosts = 1000
	var won, used atomic.Int32
	var winner registry.EnrolRequest
	var wg sync.WaitGroup
	start := make(chan struct{})
	for range hosts {
		req := registry.EnrolRequest{Token: token, Node: "api-1", SPKI: random32(), WireGuardKey: wireguard(t)}
		wg.Go(func() {
			<-start
			switch _, already, err := b.Enrol(context.Background(), req); {
			case err == nil && !already:
				won.Add(1)
				winner = req
			case errors.Is(err, registry.ErrTokenUsed):
				used.Add(1)
			default:
				t.Errorf("enrol: already %t, %v", already, err)
			}
		})
	}
	began := time.Now()
	close(start)
	wg.Wait()
	if won.Load() != 1 || used.Load() != hosts-1 {
		t.Fatalf("%d won and %d were told that the token is used; want 1 and %d", won.Load(), used.Load(), hosts-1)
	}
	t.Logf("%d concurrent enrolments with one token: 1 won, %d refused, in %v", hosts, used.Load(), time.Since(began).Round(time.Millisecond))
	first := b.State().Nodes["api-1"]
	// The same key gets the same answer, also after the token's end.
	b.advance(2 * time.Hour)
	again, already, err := b.Enrol(context.Background(), winner)
	if err != nil || !already || again != first {
		t.Errorf("the winner again: %+v %t %v, want %+v", again, already, err, first)
	}
	if len(b.State().Nodes) != 1 {
		t.Errorf("%d nodes", len(b.State().Nodes))
	}
}

func TestAUsedTokenIsAnsweredAgainForAWhile(t *testing.T) {
	ctx := context.Background()
	for name, c := range map[string]struct {
		change func(b *bench, id string)
		want   error
	}{
		"within the grace": {func(b *bench, _ string) { b.advance(time.Hour + identity.RenewGrace) }, nil},
		"long after":       {func(b *bench, _ string) { b.advance(time.Hour + identity.RenewGrace + 1) }, registry.ErrTokenExpired},
		"revoked": {func(b *bench, id string) {
			if err := b.RevokeJoinToken(ctx, id); err != nil {
				b.t.Fatal(err)
			}
		}, registry.ErrTokenRevoked},
	} {
		b := newBench(t)
		token := b.token(registry.TokenRequest{Node: "api-1"})
		req := registry.EnrolRequest{Token: token, Node: "api-1", SPKI: random32(), WireGuardKey: wireguard(t)}
		if _, _, err := b.Enrol(ctx, req); err != nil {
			t.Fatal(err)
		}
		c.change(b, fmt.Sprintf("%x", token.ID))
		if _, already, err := b.Enrol(ctx, req); !errors.Is(err, c.want) || already != (c.want == nil) {
			t.Errorf("%s: already %t, %v; want %v", name, already, err, c.want)
		}
	}
}

func TestProvenKeyRetiresTheFormer(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	n := b.join("api-1")
	<-b.Changed()
	k1 := random32()
	if _, err := b.Renew(ctx, registry.RenewRequest{ID: n.ID, SPKI: n.SPKI, NewSPKI: k1}); err != nil {
		t.Fatal(err)
	}
	for _, spki := range [][32]byte{n.SPKI, random32()} { // neither proves the current one
		if err := b.Proven(ctx, n.ID, spki); err != nil {
			t.Fatal(err)
		}
		if _, err := b.CheckNode(n.ID, n.SPKI); err != nil {
			t.Fatalf("the former key was retired by another: %v", err)
		}
	}
	if err := b.Proven(ctx, n.ID, k1); err != nil {
		t.Fatal(err)
	}
	if _, err := b.CheckNode(n.ID, n.SPKI); !errors.Is(err, registry.ErrKeyRetired) {
		t.Errorf("former key: %v", err)
	}
	if _, err := b.Renew(ctx, registry.RenewRequest{ID: n.ID, SPKI: n.SPKI, NewSPKI: random32()}); !errors.Is(err, registry.ErrKeyRetired) {
		t.Errorf("renewal with the former key: %v", err)
	}
	if _, err := b.CheckNode(n.ID, k1); err != nil {
		t.Error(err)
	}
	select {
	case <-b.Changed():
		t.Error("a proof woke the readers, though no other node sees it")
	default:
	}
}

func TestFiveHundredEnrolments(t *testing.T) {
	b := newBench(t)
	b.apply(`{"workloads": {"app/api-server": ["h-*"], "app/webhook": ["h-*"]}}`)
	token := b.token(registry.TokenRequest{Node: "h-*", Uses: 500})
	reqs := make([]registry.EnrolRequest, 500)
	for i := range reqs {
		reqs[i] = registry.EnrolRequest{Token: token, Node: fmt.Sprintf("h-%d", i), SPKI: random32(), WireGuardKey: wireguard(t)}
	}
	began := time.Now()
	var wg sync.WaitGroup
	for _, req := range reqs {
		wg.Go(func() {
			if _, _, err := b.Enrol(context.Background(), req); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	t.Logf("500 enrolments with 2 workloads each: %v", time.Since(began).Round(time.Millisecond))
	st := b.State()
	seen := map[netip.Addr]bool{}
	for _, n := range st.Nodes {
		seen[n.IPv4], seen[n.IPv6] = true, true
	}
	for _, i := range st.Instances {
		seen[i.IPv4], seen[i.IPv6] = true, true
	}
	if len(st.Nodes) != 500 || len(st.Instances) != 1000 || len(seen) != 3000 {
		t.Errorf("%d nodes, %d instances, %d different addresses; want 500, 1000, 3000", len(st.Nodes), len(st.Instances), len(seen))
	}
	for a := range seen {
		if !st.Overlay4.Contains(a) && !st.Overlay6.Contains(a) {
			t.Errorf("%s is outside the overlay", a)
		}
		if a.Is4() && (a.As4()[3] == 0 || a.As4()[3] == 255) {
			t.Errorf("%s is an edge", a)
		}
	}
	b.reopen()
	if after := b.State(); len(after.Nodes) != 500 || len(after.Instances) != 1000 || after.Nodes["h-77"] != st.Nodes["h-77"] {
		t.Error("the state is another after a restart")
	}
}

func TestTokenRefusals(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	enrol := func(token identity.JoinToken, name string) error {
		_, _, err := b.Enrol(ctx, registry.EnrolRequest{Token: token, Node: name, SPKI: random32(), WireGuardKey: wireguard(t)})
		return err
	}
	good := b.token(registry.TokenRequest{Node: "api-1"})
	forged, err := identity.NewJoinToken(good.ID, random32(), good.Pin, good.TrustDomain)
	if err != nil {
		t.Fatal(err)
	}
	strange, err := identity.NewJoinToken([16]byte{9}, random32(), good.Pin, good.TrustDomain)
	if err != nil {
		t.Fatal(err)
	}
	revoked := b.token(registry.TokenRequest{Node: "api-1"})
	if err := b.RevokeJoinToken(ctx, fmt.Sprintf("%x", revoked.ID)); err != nil {
		t.Fatal(err)
	}
	b.join("taken")
	for _, c := range []struct {
		what  string
		token identity.JoinToken
		name  string
		want  error
	}{
		{"wrong secret", forged, "api-1", registry.ErrTokenUnknown},
		{"unknown", strange, "api-1", registry.ErrTokenUnknown},
		{"revoked", revoked, "api-1", registry.ErrTokenRevoked},
		{"other name", good, "api-2", registry.ErrTokenOtherName},
		{"bad name", good, "api/1", identity.ErrID},
		{"outside the glob", b.token(registry.TokenRequest{Node: "web-*"}), "api-3", registry.ErrTokenOtherName},
		{"taken name", b.token(registry.TokenRequest{Node: "taken"}), "taken", registry.ErrNameTaken},
		{"taken name, unbound token", b.token(registry.TokenRequest{}), "taken", registry.ErrNameTaken},
	} {
		if err := enrol(c.token, c.name); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.what, err, c.want)
		}
	}
	if err := enrol(good, ""); err != nil { // the refusals above used nothing up; the token knows the name
		t.Errorf("good token: %v", err)
	}
	if err := enrol(good, "api-1"); !errors.Is(err, registry.ErrTokenUsed) {
		t.Errorf("used: %v", err)
	}
	late := b.token(registry.TokenRequest{Node: "late", TTL: time.Minute})
	b.advance(time.Minute)
	if err := enrol(late, "late"); !errors.Is(err, registry.ErrTokenExpired) {
		t.Errorf("expired: %v", err)
	}
	for _, req := range []registry.TokenRequest{{Node: "a/b"}, {Node: "[a"}, {TTL: -1}, {TTL: 1000 * time.Hour}, {Uses: 1 << 31}, {Replace: true}} {
		if _, _, err := b.CreateJoinToken(ctx, req); !errors.Is(err, registry.ErrTokenRequest) {
			t.Errorf("%+v: %v", req, err)
		}
	}
}

func TestFailedIssueUndoesEnrolment(t *testing.T) {
	b := newBench(t)
	boom := errors.New("boom")
	req := registry.EnrolRequest{Token: b.token(registry.TokenRequest{Node: "api-1"}), Node: "api-1", SPKI: random32(), WireGuardKey: wireguard(t),
		Issue: func(store.Tx, registry.Node) error { return boom }}
	if _, _, err := b.Enrol(context.Background(), req); !errors.Is(err, boom) {
		t.Fatalf("got %v", err)
	}
	if len(b.State().Nodes) != 0 {
		t.Error("a node stands there without a certificate")
	}
	req.Issue = nil
	if _, already, err := b.Enrol(context.Background(), req); err != nil || already {
		t.Errorf("again: %t %v", already, err)
	}
}

func TestPendingUntilApproved(t *testing.T) {
	b := newBench(t)
	b.apply(`{"workloads": {"app/api-server": ["*"]}}`)
	n, _, err := b.Enrol(context.Background(), registry.EnrolRequest{Token: b.token(registry.TokenRequest{}), Node: "claims", SPKI: random32(), WireGuardKey: wireguard(t)})
	if err != nil || n.Status != registry.NodePending {
		t.Fatalf("%+v %v", n, err)
	}
	if len(b.State().Instances) != 0 {
		t.Error("a pending node has workloads")
	}
	must[uint64](t)(b.Approve(context.Background(), "claims"))
	must[uint64](t)(b.Approve(context.Background(), "claims"))
	b.mustInstance("app/api-server", "claims")
	if got := b.State().Nodes["claims"]; got.Status != registry.NodeActive || got.IPv4 != n.IPv4 {
		t.Errorf("%+v", got)
	}
	if _, err := b.Approve(context.Background(), "nobody"); !errors.Is(err, registry.ErrNodeUnknown) {
		t.Errorf("approve nobody: %v", err)
	}
}

func TestRevokedNodeNeverComesBack(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	b.apply(`{"workloads": {"app/api-server": ["*"]}}`)
	req := registry.EnrolRequest{Token: b.token(registry.TokenRequest{Node: "api-1"}), Node: "api-1", SPKI: random32(), WireGuardKey: wireguard(t)}
	n, _, err := b.Enrol(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	before := b.mustInstance("app/api-server", "api-1")
	must[uint64](t)(b.Revoke(ctx, "api-1"))
	must[uint64](t)(b.Revoke(ctx, "api-1"))
	if i := b.mustInstance("app/api-server", "api-1"); !i.Revoked || i.IPv4 != before.IPv4 {
		t.Errorf("tombstone: %+v", i)
	}
	for what, r := range map[string]registry.EnrolRequest{
		"same token":          req,
		"new token":           {Token: b.token(registry.TokenRequest{Node: "api-1", Replace: true}), Node: "api-1", SPKI: req.SPKI, WireGuardKey: wireguard(t)},
		"new name":            {Token: b.token(registry.TokenRequest{Node: "api-2"}), Node: "api-2", SPKI: req.SPKI, WireGuardKey: wireguard(t)},
		"its WireGuard key":   {Token: b.token(registry.TokenRequest{Node: "api-1", Replace: true}), Node: "api-1", SPKI: random32(), WireGuardKey: req.WireGuardKey},
		"name, plain token":   {Token: b.token(registry.TokenRequest{Node: "api-1"}), Node: "api-1", SPKI: random32(), WireGuardKey: wireguard(t)},
		"WireGuard elsewhere": {Token: b.token(registry.TokenRequest{Node: "api-3"}), Node: "api-3", SPKI: random32(), WireGuardKey: req.WireGuardKey},
	} {
		if _, _, err := b.Enrol(ctx, r); err == nil {
			t.Errorf("%s: enrolled", what)
		}
	}
	if _, err := b.Renew(ctx, registry.RenewRequest{ID: n.ID, SPKI: req.SPKI, NewSPKI: random32()}); !errors.Is(err, registry.ErrNodeRevoked) {
		t.Errorf("renew: %v", err)
	}
	if _, err := b.CheckNode(n.ID, req.SPKI); !errors.Is(err, registry.ErrNodeRevoked) {
		t.Errorf("check: %v", err)
	}
	// A new host under the name, on purpose, gets the Number but none of the addresses.
	fresh, _, err := b.Enrol(ctx, registry.EnrolRequest{Token: b.token(registry.TokenRequest{Node: "api-1", Replace: true}), Node: "api-1", SPKI: random32(), WireGuardKey: wireguard(t)})
	if err != nil {
		t.Fatal(err)
	}
	after := b.mustInstance("app/api-server", "api-1")
	if fresh.Number != n.Number || fresh.IPv4 == n.IPv4 || fresh.IPv6 == n.IPv6 || after.Revoked || after.IPv4 == before.IPv4 || after.IPv6 == before.IPv6 {
		t.Errorf("replacement: node %+v, was %+v; instance %+v, was %+v", fresh, n, after, before)
	}
	if _, err := b.CheckNode(n.ID, req.SPKI); !errors.Is(err, registry.ErrKeyRetired) {
		t.Errorf("check of the old key: %v", err)
	}
}

func TestReplaceKeepsAddresses(t *testing.T) {
	b := newBench(t)
	b.apply(`{"workloads": {"app/api-server": ["*"]}}`)
	n := b.join("api-1")
	before := b.mustInstance("app/api-server", "api-1")
	again, _, err := b.Enrol(context.Background(), registry.EnrolRequest{Token: b.token(registry.TokenRequest{Node: "api-1", Replace: true}), Node: "api-1", SPKI: random32(), WireGuardKey: wireguard(t)})
	if err != nil || again.IPv4 != n.IPv4 || again.Number != n.Number || again.Key == n.Key {
		t.Errorf("%+v %v, was %+v", again, err, n)
	}
	if after := b.mustInstance("app/api-server", "api-1"); after != before {
		t.Errorf("instance %+v, was %+v", after, before)
	}
	if _, err := b.CheckNode(n.ID, n.SPKI); !errors.Is(err, registry.ErrKeyRetired) {
		t.Errorf("old key: %v", err)
	}
}

func TestRenewSurvivesLostReplies(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	n := b.join("api-1")
	<-b.Changed()
	k1, k2 := random32(), random32()
	renew := func(with, to [32]byte) error {
		_, err := b.Renew(ctx, registry.RenewRequest{ID: n.ID, SPKI: with, NewSPKI: to})
		return err
	}
	for i, step := range []struct {
		with, to [32]byte
		want     error
	}{
		{n.SPKI, k1, nil},     // the reply is lost
		{n.SPKI, k1, nil},     // so the host asks again with the key that it has
		{n.SPKI, n.SPKI, nil}, // or stays with that
		{n.SPKI, k2, nil},     // or makes another
		{k1, random32(), registry.ErrKeyRetired},
		{k2, k1, registry.ErrKeyRetired}, // what was given up is spent
		{k2, n.SPKI, registry.ErrKeyRetired},
		{k2, k2, nil}, // the reply came: now the first key is spent too
		{n.SPKI, random32(), registry.ErrKeyRetired},
		{random32(), random32(), registry.ErrKeyRetired},
	} {
		if err := renew(step.with, step.to); !errors.Is(err, step.want) {
			t.Errorf("step %d: %v, want %v", i, err, step.want)
		}
	}
	select {
	case <-b.Changed():
		t.Error("a renewal woke the readers, though no other node sees it")
	default:
	}
	if got := b.State().Nodes["api-1"].Revision; got != n.Revision {
		t.Errorf("revision of what others see: %d, was %d", got, n.Revision)
	}
	other := b.join("api-2")
	if _, err := b.Renew(ctx, registry.RenewRequest{ID: other.ID, SPKI: other.SPKI, NewSPKI: n.SPKI}); !errors.Is(err, registry.ErrKeyTaken) {
		t.Errorf("another node's key: %v", err)
	}
}
