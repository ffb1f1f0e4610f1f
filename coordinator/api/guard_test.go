package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
)

func TestHostAndOrigin(t *testing.T) {
	b := newBench(t)
	for _, c := range []struct {
		name, host string
		header     map[string]string
		ok         bool
	}{
		{"address", "127.0.0.1:7480", nil, true},
		{"address without port", "10.1.2.3", nil, true},
		{"IPv6", "[::1]:7480", nil, true},
		{"IPv6 without port", "[::1]", nil, true},
		{"localhost", "localhost:7480", nil, true},
		{"own name", "coord.settler.example:7480", nil, true},
		{"own name, upper case and dot", "COORD.settler.example.:7480", nil, true},
		{"rebound name", "evil.example:7480", nil, false},
		{"suffix of own name", "coord.settler.example.evil.example", nil, false},
		{"prefix of own name", "evilcoord.settler.example", nil, false},
		{"localhost below another", "localhost.evil.example", nil, false},
		{"same origin", "localhost:7480", map[string]string{"Origin": "http://localhost:7480", "Sec-Fetch-Site": "same-origin"}, true},
		{"typed address", "localhost:7480", map[string]string{"Sec-Fetch-Site": "none"}, true},
		{"foreign origin", "localhost:7480", map[string]string{"Origin": "http://evil.example"}, false},
		{"other port", "localhost:7480", map[string]string{"Origin": "http://localhost:8080"}, false},
		{"other scheme", "localhost:7480", map[string]string{"Origin": "https://localhost:7480"}, false},
		{"null origin", "localhost:7480", map[string]string{"Origin": "null"}, false},
		{"no-cors fetch", "localhost:7480", map[string]string{"Sec-Fetch-Site": "cross-site"}, false},
		{"sibling site", "localhost:7480", map[string]string{"Sec-Fetch-Site": "same-site"}, false},
		{"forwarded host", "evil.example", map[string]string{"X-Forwarded-Host": "localhost"}, false},
	} {
		for _, path := range []string{"stats", "/healthz", "/nowhere", "openapi.json"} {
			w := b.send(ask{method: "GET", path: path, token: "owner" + tail, host: c.host, header: c.header})
			if refused := w.Code == http.StatusForbidden; refused == c.ok {
				t.Errorf("%s, %s: status %d", c.name, path, w.Code)
			}
			if !c.ok {
				b.refused(w, http.StatusForbidden, apitypes.CodeForeignOrigin)
			}
		}
	}
}

func TestAnswersAreHarmlessInABrowser(t *testing.T) {
	b := newBench(t)
	for _, q := range []ask{
		{method: "GET", path: "stats", token: "owner" + tail}, {method: "GET", path: "stats"}, {method: "GET", path: "/nowhere"}, {method: "GET", path: "/healthz"},
		{method: "GET", path: "stats", host: "evil.example"}, {method: "POST", path: "explain", body: "{", token: "owner" + tail}, {method: "OPTIONS", path: "stats"},
	} {
		h := b.send(q).Header()
		if h.Get("X-Content-Type-Options") != "nosniff" || h.Get("X-Frame-Options") != "DENY" || !strings.Contains(h.Get("Content-Security-Policy"), "default-src 'none'") ||
			h.Get("Cache-Control") != "no-store" {
			t.Errorf("%s %s: headers %v", q.method, q.path, h)
		}
		for name := range h {
			if strings.HasPrefix(name, "Access-Control-") {
				t.Errorf("%s %s: CORS header %s", q.method, q.path, name)
			}
		}
	}
}

// endless is a body that never ends, and counts what was taken of it.
type endless struct{ taken int64 }

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	e.taken += int64(len(p))
	return len(p), nil
}

func TestBodyCap(t *testing.T) {
	b := newBench(t)
	for route := range operations(b.server) {
		method, path, _ := strings.Cut(route, " ")
		if method != "POST" && method != "PUT" {
			continue
		}
		path = strings.TrimPrefix(fill(path), "/")
		// An announced size is refused before anybody is asked who they are, and nothing is read.
		body := &endless{}
		r := httptest.NewRequest(method, Prefix+"/"+path, body)
		r.Host, r.ContentLength = "localhost", apitypes.MaxBody+1
		w := httptest.NewRecorder()
		b.handler.ServeHTTP(w, r)
		b.refused(w, http.StatusRequestEntityTooLarge, apitypes.CodeTooLarge)
		if body.taken > 0 {
			t.Errorf("%s: %d bytes were read of an announced body over the cap", route, body.taken)
		}
		// Without a token nothing of an endless body is read either.
		body = &endless{}
		w = b.send(ask{method: method, path: path, reader: body})
		b.refused(w, http.StatusUnauthorized, apitypes.CodeUnauthorized)
		if body.taken > 0 {
			t.Errorf("%s: %d bytes were read before authentication", route, body.taken)
		}
	}
	// With one, reading stops at the cap.
	for _, q := range []ask{{method: "PUT", path: "policy"}, {method: "PUT", path: "policy", kind: "text/yaml"}, {method: "POST", path: "explain"}, {method: "POST", path: "join-tokens"}} {
		body := &endless{}
		q.reader, q.token = body, "owner"+tail
		b.refused(b.send(q), http.StatusRequestEntityTooLarge, apitypes.CodeTooLarge)
		if body.taken > apitypes.MaxBody+(1<<20) {
			t.Errorf("%s %s: %d bytes were read", q.method, q.path, body.taken)
		}
	}
}

func TestBodyOfExactlyTheCapIsRead(t *testing.T) {
	b := newBench(t)
	text := "# " + strings.Repeat("x", apitypes.MaxBody-len(goodPolicy)-3) + "\n" + goodPolicy
	if len(text) != apitypes.MaxBody {
		t.Fatalf("the test made %d bytes", len(text))
	}
	w := b.send(ask{method: "POST", path: "policy/check", kind: "text/yaml", body: text, token: "owner" + tail})
	if w.Code != http.StatusOK {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
}

func TestRequestForms(t *testing.T) {
	b := newBench(t)
	owner := "owner" + tail
	for _, c := range []struct {
		name   string
		q      ask
		status int
		code   string
	}{
		{"form", ask{method: "POST", path: "explain", body: "from=a", kind: "application/x-www-form-urlencoded"}, 415, apitypes.CodeMediaType},
		{"plain text", ask{method: "POST", path: "explain", body: "{}", kind: "text/plain"}, 415, apitypes.CodeMediaType},
		{"multipart", ask{method: "POST", path: "explain", body: "{}", kind: "multipart/form-data; boundary=x"}, 415, apitypes.CodeMediaType},
		{"no type", ask{method: "POST", path: "explain", body: "{}", kind: " "}, 415, apitypes.CodeMediaType},
		{"YAML where JSON is due", ask{method: "POST", path: "explain", body: "from: a", kind: "text/yaml", token: owner}, 415, apitypes.CodeMediaType},
		{"compressed", ask{method: "POST", path: "explain", body: "{}", header: map[string]string{"Content-Encoding": "gzip"}}, 415, apitypes.CodeMediaType},
		{"body of GET", ask{method: "GET", path: "nodes", body: "{}"}, 400, apitypes.CodeInvalid},
		{"broken JSON", ask{method: "POST", path: "explain", body: "{", token: owner}, 400, apitypes.CodeInvalid},
		{"JSON of another shape", ask{method: "POST", path: "explain", body: "[1]", token: owner}, 422, apitypes.CodeInvalid},
		{"unknown key", ask{method: "POST", path: "join-tokens", body: `{"role":"owner"}`, token: owner}, 422, apitypes.CodeInvalid},
		{"unknown query", ask{method: "GET", path: "nodes?sort=name", token: owner}, 422, apitypes.CodeInvalid},
		{"limit too large", ask{method: "GET", path: "nodes?limit=1001", token: owner}, 422, apitypes.CodeInvalid},
		{"limit of zero", ask{method: "GET", path: "nodes?limit=0", token: owner}, 422, apitypes.CodeInvalid},
		{"cursor with a line end", ask{method: "GET", path: "nodes?cursor=%0a", token: owner}, 422, apitypes.CodeInvalid},
		{"cursor of another kind", ask{method: "GET", path: "audit?cursor=!!", token: owner}, 422, apitypes.CodeInvalid},
		{"cursor that is no number", ask{method: "GET", path: "audit?cursor=eHh4", token: owner}, 422, apitypes.CodeInvalid},
		{"no body", ask{method: "POST", path: "explain", token: owner}, 400, apitypes.CodeInvalid},
		{"revision that is no number", ask{method: "GET", path: "policy/revisions/x", token: owner}, 422, apitypes.CodeInvalid},
		{"unknown route", ask{method: "GET", path: "nowhere"}, 404, apitypes.CodeNotFound},
		{"outside of the prefix", ask{method: "GET", path: "/etc/passwd"}, 404, apitypes.CodeNotFound},
		{"wrong method", ask{method: "DELETE", path: "nodes"}, 405, apitypes.CodeMethod},
		{"debug", ask{method: "GET", path: "/debug/pprof/"}, 404, apitypes.CodeNotFound},
		{"long path", ask{method: "GET", path: "nodes/" + strings.Repeat("a", 3000), token: owner}, 414, apitypes.CodeTooLarge},
	} {
		t.Run(c.name, func(t *testing.T) { b.t = t; b.refused(b.send(c.q), c.status, c.code) })
	}
}

func TestManyHeadersAreRefused(t *testing.T) {
	b := newBench(t)
	r := httptest.NewRequest("GET", Prefix+"/nodes", nil)
	r.Host = "localhost"
	for range maxHeaderFields + 1 {
		r.Header.Add("X-More", "x")
	}
	w := httptest.NewRecorder()
	b.handler.ServeHTTP(w, r)
	b.refused(w, http.StatusRequestHeaderFieldsTooLarge, apitypes.CodeTooLarge)
}

// TestRefusalsDoNotRepeatTheRequest: a body may hold a secret, and answers end up in logs.
func TestRefusalsDoNotRepeatTheRequest(t *testing.T) {
	b := newBench(t)
	const secret = "s3cr3t-t0ken"
	for _, q := range []ask{
		{method: "POST", path: "explain", body: `{"from":"` + secret},
		{method: "POST", path: "explain", body: `{"from":1,"to":["` + secret + `"],"port":"x"}`},
		{method: "POST", path: "policy/check", body: `{"` + secret + `":1}`},
		{method: "POST", path: "join-tokens", body: `{"ttl":{"a":"` + secret + `"}}`},
	} {
		q.token = "owner" + tail
		if w := b.send(q); w.Code < 400 || strings.Contains(w.Body.String(), secret) {
			t.Errorf("%s %s: %d %s", q.method, q.path, w.Code, w.Body)
		}
	}
	if strings.Contains(b.log.String(), tail) {
		t.Error("the log holds a token")
	}
}

func TestHostileStrings(t *testing.T) {
	b := newBench(t)
	b.do("PUT", "policy", policyBody(t, goodPolicy), 200, nil)
	b.enrol("db-1", true)
	for _, evil := range []string{"'", `"`, "' OR '1'='1", "%25", "*", "a%00b", "%0a", "..%2f..%2fetc", "%1b[31m", "$(id)", "%E2%80%AE", strings.Repeat("a", 300), "{{7*7}}", "-1", "\\"} {
		enc := strings.NewReplacer(" ", "%20", `"`, "%22", "\\", "%5c", "{", "%7b", "}", "%7d").Replace(evil)
		for _, path := range []string{"nodes/" + enc, "workloads/" + enc + "/" + enc, "resolve?id=" + enc, "nodes?cursor=" + enc, "policy/revisions/" + enc, "audit?cursor=" + enc} {
			w := b.send(ask{method: "GET", path: path, token: "viewer" + tail})
			if w.Code >= 500 || w.Code < 300 && (!strings.Contains(path, "cursor") || strings.Contains(w.Body.String(), "db-1")) {
				t.Errorf("GET %s: status %d: %s", path, w.Code, w.Body)
			}
		}
		body := string(must(json.Marshal(map[string]string{"from": evil, "to": evil, "port": evil}))(t))
		if w := b.send(ask{method: "POST", path: "explain", body: body, token: "viewer" + tail}); w.Code != 422 {
			t.Errorf("explain %q: status %d", evil, w.Code)
		}
		body = string(must(json.Marshal(map[string]string{"node": evil}))(t))
		if w := b.send(ask{method: "POST", path: "join-tokens", body: body, token: "operator" + tail}); w.Code >= 500 || w.Code == 201 && evil != "*" && evil != "-1" {
			t.Errorf("join token for %q: status %d", evil, w.Code)
		}
	}
}

func TestNotBuiltIsRefusedByName(t *testing.T) {
	b := newBench(t)
	for _, q := range []ask{
		{method: "POST", path: "policy/plan", body: "{}"}, {method: "GET", path: "flows?since=1h"}, {method: "GET", path: "flows/stream"}, {method: "GET", path: "authorities"},
		{method: "POST", path: "authorities/rotate", body: `{"x":1}`}, {method: "GET", path: "tokens"}, {method: "POST", path: "tokens", body: "{}"}, {method: "DELETE", path: "tokens/x"},
		{method: "GET", path: "/keys"}, {method: "GET", path: "/bundle"}, {method: "GET", path: "/"}, {method: "GET", path: "/.well-known/openid-configuration"},
		{method: "POST", path: "join-tokens", body: `{"node":"api-1","ephemeral":true}`},
	} {
		q.token = "owner" + tail
		if p := b.refused(b.send(q), http.StatusNotImplemented, apitypes.CodeNotBuilt); !strings.HasSuffix(p.Detail, "is not built yet") {
			t.Errorf("%s %s: %q", q.method, q.path, p.Detail)
		}
	}
}

func TestHealth(t *testing.T) {
	b := newBench(t)
	if w := b.send(ask{method: "GET", path: "/healthz"}); w.Code != 200 || w.Body.String() != "ok\n" {
		t.Errorf("healthz: %d %s", w.Code, w.Body)
	}
	if w := b.send(ask{method: "GET", path: "/readyz"}); w.Code != 200 {
		t.Errorf("readyz: %d", w.Code)
	}
	b.server.deps.Ready = func(context.Context) error { return errors.New("/secret/path is away") }
	w := b.send(ask{method: "GET", path: "/readyz"})
	if p := b.refused(w, 503, apitypes.CodeUnavailable); strings.Contains(p.Detail, "secret") {
		t.Errorf("readyz tells anybody: %q", p.Detail)
	}
}

func TestOpenAPI(t *testing.T) {
	b := newBench(t)
	w := b.send(ask{method: "GET", path: "openapi.json"})
	var doc struct {
		OpenAPI    string                    `json:"openapi"`
		Paths      map[string]map[string]any `json:"paths"`
		Components struct {
			Schemas map[string]any `json:"schemas"`
		} `json:"components"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &doc); err != nil || w.Code != 200 {
		t.Fatalf("status %d: %v", w.Code, err)
	}
	if doc.OpenAPI != "3.1.0" || len(doc.Paths) == 0 || doc.Components.Schemas["Problem"] == nil || doc.Components.Schemas["ErrorModel"] != nil {
		t.Errorf("document %s with %d paths, schemas %v", doc.OpenAPI, len(doc.Paths), doc.Components.Schemas)
	}
	if strings.Contains(w.Body.String(), "ErrorModel") {
		t.Error("the document refers to a form of errors that is never sent")
	}
}

func TestPanicBecomesAProblem(t *testing.T) {
	b := newBench(t)
	route(b.server, "GET", "/panic", permRead, "panic", "x", func(context.Context, *nothing) (*nothing, error) { panic("secret state") })
	w := b.send(ask{method: "GET", path: "panic", token: "owner" + tail})
	if p := b.refused(w, 500, apitypes.CodeInternal); strings.Contains(p.Detail, "secret") || !strings.Contains(b.log.String(), "secret state") {
		t.Errorf("answer %q, log %q", p.Detail, b.log.String())
	}
}

func TestUnknownErrorsStayInside(t *testing.T) {
	b := newBench(t)
	route(b.server, "GET", "/fails", permRead, "fails", "x", func(context.Context, *nothing) (*nothing, error) {
		return nil, errors.New("password in the connection string")
	})
	route(b.server, "GET", "/raw", permRead, "raw", "x", func(context.Context, *nothing) (*nothing, error) { return nil, io.ErrUnexpectedEOF })
	for _, path := range []string{"fails", "raw"} {
		w := b.send(ask{method: "GET", path: path, token: "owner" + tail})
		if p := b.refused(w, 500, apitypes.CodeInternal); strings.Contains(w.Body.String(), "password") || strings.Contains(w.Body.String(), "EOF") || p.Hint == "" {
			t.Errorf("%s: %s", path, w.Body)
		}
	}
}

func TestPlacesAreBounded(t *testing.T) {
	b := newBench(t)
	begun, finish := make(chan struct{}), make(chan struct{})
	route(b.server, "GET", "/slow", permRead, "slow", "x", func(context.Context, *nothing) (*nothing, error) {
		begun <- struct{}{}
		<-finish
		return nil, nil
	})
	ended := make(chan struct{})
	for range maxConcurrent {
		go func() {
			b.send(ask{method: "GET", path: "slow", token: "owner" + tail})
			ended <- struct{}{}
		}()
		<-begun
	}
	w := b.send(ask{method: "GET", path: "stats", token: "owner" + tail})
	b.refused(w, 503, apitypes.CodeUnavailable)
	close(finish)
	for range maxConcurrent {
		<-ended
	}
	b.get("stats", nil)
}

func TestMissingDependencyPanics(t *testing.T) {
	defer func() {
		if v, ok := recover().(string); !ok || !strings.HasPrefix(v, "internal error") {
			t.Errorf("panic %v", v)
		}
	}()
	New(Deps{})
}
