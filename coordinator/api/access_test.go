package api

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/danielgtaylor/huma/v2"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/store"
)

// wantRoutes is the contract's list (section 5) with the roles that may call each, written by hand: the table in
// routes.go cannot vouch for itself.
var wantRoutes = map[string]string{
	"GET /nodes":                           "viewer operator policy-admin owner",
	"GET /nodes/{name}":                    "viewer operator policy-admin owner",
	"POST /nodes/{name}/approve":           "operator owner",
	"POST /nodes/{name}/revoke":            "operator owner",
	"POST /join-tokens":                    "operator owner",
	"GET /workloads":                       "viewer operator policy-admin owner",
	"GET /workloads/{zone}/{name}":         "viewer operator policy-admin owner",
	"POST /workloads/{zone}/{name}/revoke": "operator owner",
	"GET /resolve":                         "viewer operator policy-admin owner",
	"GET /policy":                          "viewer operator policy-admin owner",
	"PUT /policy":                          "policy-admin owner",
	"POST /policy/check":                   "viewer operator policy-admin owner",
	"POST /policy/plan":                    "viewer operator policy-admin owner",
	"GET /policy/revisions":                "viewer operator policy-admin owner",
	"GET /policy/revisions/{n}":            "viewer operator policy-admin owner",
	"GET /policy/revisions/{n}/rollout":    "viewer operator policy-admin owner",
	"POST /policy/rollback":                "policy-admin owner",
	"POST /explain":                        "viewer operator policy-admin owner",
	"GET /flows":                           "viewer operator policy-admin owner",
	"GET /flows/stream":                    "viewer operator policy-admin owner",
	"GET /audit":                           "viewer operator policy-admin owner",
	"GET /audit/verify":                    "viewer operator policy-admin owner",
	"GET /authorities":                     "viewer operator policy-admin owner",
	"POST /authorities/rotate":             "owner",
	"GET /tokens":                          "owner",
	"POST /tokens":                         "owner",
	"DELETE /tokens/{id}":                  "owner",
	"GET /stats":                           "viewer operator policy-admin owner",
}

// operations lists what the OpenAPI document has, by method and path.
func operations(s *server) map[string]*huma.Operation {
	out := map[string]*huma.Operation{}
	for path, item := range s.api.OpenAPI().Paths {
		for method, op := range map[string]*huma.Operation{
			"GET": item.Get, "POST": item.Post, "PUT": item.Put, "DELETE": item.Delete, "PATCH": item.Patch,
			"HEAD": item.Head, "OPTIONS": item.Options, "TRACE": item.Trace,
		} {
			if op != nil {
				out[method+" "+path] = op
			}
		}
	}
	return out
}

func TestEveryRouteDeclaresAPermission(t *testing.T) {
	ops := operations(newBench(t).server)
	for route, op := range ops {
		perm, _ := op.Extensions["x-signet-permission"].(string)
		if perm == "" || op.Metadata[metaPermission] != permission(perm) || len(op.Security) == 0 {
			t.Errorf("%s declares permission %q, metadata %v, security %v", route, perm, op.Metadata[metaPermission], op.Security)
		}
		if _, ok := wantRoutes[route]; !ok {
			t.Errorf("%s is not in the list of routes with their roles", route)
		}
	}
	for route := range wantRoutes {
		if ops[route] == nil {
			t.Errorf("%s is missing", route)
		}
	}
}

func TestRouteWithoutPermissionIsRefused(t *testing.T) {
	b := newBench(t)
	huma.Register(b.server.api, huma.Operation{OperationID: "forgotten", Method: "GET", Path: "/forgotten"}, func(context.Context, *nothing) (*output[string], error) {
		return &output[string]{"secret"}, nil
	})
	for _, token := range []string{"", "viewer" + tail, "owner" + tail} {
		if w := b.send(ask{method: "GET", path: "forgotten", token: token}); w.Code != http.StatusUnauthorized && w.Code != http.StatusForbidden {
			t.Errorf("token %.6q: status %d", token, w.Code)
		}
	}
}

// fill puts something into the parameters of a path.
func fill(path string) string {
	return strings.NewReplacer("{name}", "nobody", "{zone}", "app", "{n}", "7", "{id}", "x").Replace(path)
}

// call sends a request that reaches the handler, if the role lets it through.
func call(b *bench, route, token string) *httptest.ResponseRecorder {
	method, path, _ := strings.Cut(route, " ")
	q := ask{method: method, path: strings.TrimPrefix(fill(path), "/"), token: token}
	if path == "/resolve" {
		q.path += "?id=app/nobody"
	}
	if method == "POST" || method == "PUT" {
		q.body = "{}"
	}
	return b.send(q)
}

func TestRoleMatrix(t *testing.T) {
	b := newBench(t)
	for route := range operations(b.server) {
		// The bucket of audited refusals is not what this test is about.
		allowed := strings.Fields(wantRoutes[route])
		for _, role := range []string{"viewer", "operator", "policy-admin", "owner"} {
			w := call(b, route, role+tail)
			may := false
			for _, r := range allowed {
				may = may || r == role
			}
			switch {
			case may && (w.Code == 401 || w.Code == 403):
				t.Errorf("%s as %s: status %d, want it to reach the handler", route, role, w.Code)
			case !may:
				b.refused(w, http.StatusForbidden, apitypes.CodeForbidden)
			}
			if w.Code == 500 {
				t.Errorf("%s as %s: internal error: %s", route, role, b.log.String())
			}
		}
	}
}

func TestBadTokens(t *testing.T) {
	b := newBench(t)
	good := "owner" + tail
	bad := map[string]string{
		"none": "", "garbage": "garbage", "expired": "expired" + tail, "revoked": "revoked" + tail, "unknown role": "strange" + tail,
		"trailing": good + "x", "leading": "x" + good, "upper": strings.ToUpper(good), "space inside": "owner " + tail, "long": good + strings.Repeat("a", 1000),
		"sql": "' OR 1=1 --", "percent": "%", "null": "\x00",
	}
	var first string
	for route := range operations(b.server) {
		for name, token := range bad {
			w := call(b, route, token)
			p := b.refused(w, http.StatusUnauthorized, apitypes.CodeUnauthorized)
			if first == "" {
				first = w.Body.String()
			}
			if w.Body.String() != first {
				t.Errorf("%s, token %s: the answer tells them apart: %+v", route, name, p)
			}
			if w.Header().Get("WWW-Authenticate") == "" {
				t.Errorf("%s, token %s: no WWW-Authenticate", route, name)
			}
		}
	}
}

func TestTruncatedTokens(t *testing.T) {
	b := newBench(t)
	good := "owner" + tail
	for i := range len(good) {
		b.refused(b.send(ask{method: "GET", path: "stats", token: good[:i]}), http.StatusUnauthorized, apitypes.CodeUnauthorized)
	}
}

func TestAuthorizationHeaderForms(t *testing.T) {
	b := newBench(t)
	good := "owner" + tail
	for value, want := range map[string]int{
		"Bearer " + good: 200, "bearer " + good: 200, "Basic " + good: 401, good: 401, "Bearer": 401, "Bearer  " + good: 401, "Bearer " + good + " x": 401, "Bearer " + good + ",": 401,
	} {
		if w := b.send(ask{method: "GET", path: "stats", header: map[string]string{"Authorization": value}}); w.Code != want {
			t.Errorf("%.12q…: status %d, want %d", value, w.Code, want)
		}
	}
	r := httptest.NewRequest("GET", Prefix+"/stats", nil)
	r.Host = "localhost"
	r.Header.Add("Authorization", "Bearer "+good)
	r.Header.Add("Authorization", "Bearer "+good)
	w := httptest.NewRecorder()
	b.handler.ServeHTTP(w, r)
	b.refused(w, 401, apitypes.CodeUnauthorized)
	// A token in the address would stand in logs and histories.
	if w := b.send(ask{method: "GET", path: "stats?token=" + good}); w.Code != 401 {
		t.Errorf("token in the query: status %d", w.Code)
	}
}

func TestTokenTakesEffectAtOnce(t *testing.T) {
	b := newBench(t)
	b.get("stats", nil)
	_, err := b.store.Update(context.Background(), func(tx store.Tx) error { return tx.RevokeAPIToken("owner", epoch) })
	if err != nil {
		t.Fatal(err)
	}
	b.refused(b.send(ask{method: "GET", path: "stats", token: "owner" + tail}), 401, apitypes.CodeUnauthorized)
}

// TestRefusalsAreAudited: each refusal leaves one record, with the socket's peer, up to a bound.
func TestRefusalsAreAudited(t *testing.T) {
	b := newBench(t)
	before := uint64(len(b.audited(0)))
	b.send(ask{method: "PUT", path: "policy", token: "viewer" + tail, body: "{}", remote: "192.0.2.7:999", header: map[string]string{
		"X-Forwarded-For": "198.51.100.1", "Forwarded": "for=198.51.100.1", "X-Real-IP": "198.51.100.1",
	}})
	b.send(ask{method: "GET", path: "nodes", token: "garbage"})
	got := b.audited(before)
	if len(got) != 2 || got[0].Who != "token:viewer" || got[0].Outcome != "forbidden" || !strings.Contains(got[0].What, "PUT") ||
		got[1].Who != "anonymous" || got[1].Outcome != "unauthorized" {
		t.Fatalf("audit: %+v", got)
	}
	if !strings.Contains(got[0].Detail, "192.0.2.7") || strings.Contains(got[0].Detail, "198.51.100.1") {
		t.Errorf("detail %q, want the socket's peer alone", got[0].Detail)
	}
	for range 10 * refusalBurst {
		b.send(ask{method: "GET", path: "nodes", token: "garbage"})
	}
	if n := len(b.audited(before)); n > refusalBurst {
		t.Errorf("%d records of refusals, want at most %d", n, refusalBurst)
	}
	b.now.Add(int64(refusalRefill))
	b.send(ask{method: "GET", path: "nodes", token: "garbage"})
	got = b.audited(before)
	if last := got[len(got)-1]; !strings.Contains(last.Detail, "were not recorded") {
		t.Errorf("the next record does not say how many were left out: %q", last.Detail)
	}
}
