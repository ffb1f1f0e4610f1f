package api

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/api/client"
)

// dial makes a client of b's API as one role.
func dial(b *bench, role string) *client.Client {
	b.t.Helper()
	srv := httptest.NewServer(b.handler)
	b.t.Cleanup(srv.Close)
	return must(client.New(client.Options{Address: srv.URL, Token: role + tail}))(b.t)
}

// TestClientStory walks through the client's calls against the real API.
func TestClientStory(t *testing.T) {
	b, ctx := newBench(t), context.Background()
	c := dial(b, "owner")
	files := []apitypes.File{{Name: "policy.yaml", Data: goodPolicy}}
	if check := must(c.CheckPolicy(ctx, files))(t); !check.OK || len(check.Tests) != 2 {
		t.Errorf("check %+v", check)
	}
	base := uint64(0)
	if a := must(c.ApplyPolicy(ctx, files, &base))(t); a.Revision != 1 {
		t.Errorf("applied %+v", a)
	}
	var p *apitypes.Problem
	if _, err := c.ApplyPolicy(ctx, files, &base); !errors.As(err, &p) || p.Code != apitypes.CodePrecondition {
		t.Errorf("second commit on revision 0: %v", err)
	}
	b.enrol("api-1", true)
	b.enrol("stray", false)
	if err := c.ApproveNode(ctx, "stray"); err != nil {
		t.Error(err)
	}
	if err := c.RevokeNode(ctx, "stray"); err != nil {
		t.Error(err)
	}
	if nodes := must(c.Nodes(ctx))(t); len(nodes) != 2 || nodes[1].Status != "revoked" {
		t.Errorf("nodes %+v", nodes)
	}
	if n := must(c.Node(ctx, "api-1"))(t); n.Name != "api-1" {
		t.Errorf("node %+v", n)
	}
	if list := must(c.Workloads(ctx))(t); len(list) != 3 {
		t.Errorf("%d workloads", len(list))
	}
	if r := must(c.Resolve(ctx, "app/webhook"))(t); len(r.Instances) != 1 {
		t.Errorf("resolved %+v", r)
	}
	if err := c.RevokeWorkload(ctx, "app/webhook", "api-1"); err != nil {
		t.Error(err)
	}
	if wl := must(c.Workload(ctx, "app/webhook"))(t); !wl.Instances[0].Revoked {
		t.Errorf("workload %+v", wl)
	}
	if token := must(c.CreateJoinToken(ctx, apitypes.JoinTokenRequest{Node: "db-1", TTL: "5m", Uses: 1}))(t); token.Token == "" {
		t.Error("no token")
	}
	if x := must(c.Explain(ctx, apitypes.ExplainRequest{From: "app/webhook", To: "data/postgres", Port: "tcp/5432"}))(t); x.Code != "NO_RULE" && x.Code != "REVOKED" {
		t.Errorf("explained %+v", x)
	}
	must(c.ApplyPolicy(ctx, files, nil))(t)
	if a := must(c.Rollback(ctx, 0))(t); a.Revision != 3 {
		t.Errorf("rolled back %+v", a)
	}
	if h := must(c.History(ctx))(t); len(h) != 3 || h[0].Revision != 3 {
		t.Errorf("history %+v", h)
	}
	if r := must(c.Rollout(ctx, 3))(t); len(r.Hosts) != 1 {
		t.Errorf("rollout %+v", r)
	}
	if p := must(c.Policy(ctx))(t); p.Revision != 3 || must(c.PolicyAt(ctx, 1))(t).Files[0].Data != goodPolicy {
		t.Errorf("policy %+v", p)
	}
}

func TestClientSeesRefusals(t *testing.T) {
	b, ctx := newBench(t), context.Background()
	var p *apitypes.Problem
	if err := dial(b, "viewer").ApproveNode(ctx, "x"); !errors.As(err, &p) || p.Code != apitypes.CodeForbidden || p.Status != 403 {
		t.Errorf("viewer approves: %v", err)
	}
	if _, err := dial(b, "nobody").Nodes(ctx); !errors.As(err, &p) || p.Code != apitypes.CodeUnauthorized || strings.Contains(err.Error(), tail) {
		t.Errorf("unknown token: %v", err)
	}
	// A name cannot lead to another route.
	if _, err := dial(b, "owner").Node(ctx, "../policy"); !errors.As(err, &p) || p.Code != apitypes.CodeNotFound {
		t.Errorf("name with a path: %v", err)
	}
}

func TestClientAddresses(t *testing.T) {
	for address, ok := range map[string]bool{
		"https://coord.example:7480": true, "https://coord.example/": true, "http://127.0.0.1:7480": true, "http://localhost:7480": true, "http://[::1]:7480": true,
		"http://coord.example:7480": false, "http://10.0.0.1": false, "http://localhost.evil.example": false, "coord.example:7480": false, "": false, "ftp://x": false,
		"https://user:pass@coord.example": false, "https://coord.example/api/v1": false, "https://coord.example?x=1": false, "unix:///x": false,
	} {
		if _, err := client.New(client.Options{Address: address}); (err == nil) != ok {
			t.Errorf("%q: %v", address, err)
		}
	}
}

// TestClientKeepsItsToken: an answer cannot send the client, and with it the token, elsewhere.
func TestClientKeepsItsToken(t *testing.T) {
	stolen := false
	thief := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { stolen = true }))
	defer thief.Close()
	srv := httptest.NewServer(http.RedirectHandler(thief.URL, http.StatusTemporaryRedirect))
	defer srv.Close()
	c := must(client.New(client.Options{Address: srv.URL, Token: "secret"}))(t)
	if _, err := c.Nodes(context.Background()); !errors.Is(err, client.ErrAnswer) || stolen {
		t.Errorf("followed a redirect: %v", err)
	}
}

func TestClientEndsEndlessLists(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"nodes":[],"next_cursor":"again"}`))
	}))
	defer srv.Close()
	c := must(client.New(client.Options{Address: srv.URL, Token: "x"}))(t)
	if _, err := c.Nodes(context.Background()); !errors.Is(err, client.ErrAnswer) {
		t.Errorf("an endless list: %v", err)
	}
}
