package api

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/policydoc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var epoch = time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)

// Tokens that every bench knows; the text of a good one is its role with a long tail.
const tail = "-0123456789abcdef0123456789abcdef"

// bench is the API over a real registry and a real store, with a clock of its own.
type bench struct {
	t        *testing.T
	store    *store.SQLite
	registry *registry.Registry
	server   *server
	handler  http.Handler
	sessions map[string]time.Time
	log      strings.Builder
	now      atomic.Int64 // nanoseconds after epoch
	keys     byte
}

// Connected makes bench a Sessions.
func (b *bench) Connected() map[string]time.Time { return b.sessions }

func (b *bench) clock() time.Time { return epoch.Add(time.Duration(b.now.Load())) }

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, sessions: map[string]time.Time{}}
	td := must(identity.ParseTrustDomain("settler.example"))(t)
	b.store = must(store.OpenSQLite(context.Background(), filepath.Join(t.TempDir(), "data")))(t)
	t.Cleanup(func() { _ = b.store.Close() })
	parse := func(files []store.SourceFile) (*policydoc.Document, error) {
		in := make([]policydoc.File, 0, len(files))
		for _, f := range files {
			in = append(in, policydoc.File{Name: f.Name, Data: f.Data})
		}
		doc, _, err := policydoc.Parse(td, in)
		return doc, err
	}
	b.registry = must(registry.Open(context.Background(), b.store, registry.Options{
		TrustDomain: td, Now: b.clock, Parse: parse, Pin: func() [32]byte { return [32]byte{1} },
	}))(t)
	for _, role := range []string{"viewer", "operator", "policy-admin", "owner"} {
		b.token(store.APIToken{ID: role, Role: role}, role+tail)
	}
	b.token(store.APIToken{ID: "expired", Role: "owner", Expires: epoch.Add(-time.Second)}, "expired"+tail)
	b.token(store.APIToken{ID: "revoked", Role: "owner", Revoked: epoch.Add(-time.Hour)}, "revoked"+tail)
	b.token(store.APIToken{ID: "strange", Role: "root"}, "strange"+tail)
	access := OverStore(b.store)
	b.server = newServer(Deps{
		Mesh: b.registry, Policies: b.registry, Tokens: access, Audit: access, Sessions: b, Version: "test", Now: b.clock,
		HostNames: []string{"coord.settler.example"}, Log: slog.New(slog.NewTextHandler(&b.log, nil)),
	})
	b.handler = b.server.guard(b.server.mux)
	return b
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func (b *bench) token(row store.APIToken, text string) {
	b.t.Helper()
	row.Hash, row.Created, row.Name, row.By = sha256.Sum256([]byte(text)), epoch, row.ID, "test"
	if _, err := b.store.Update(context.Background(), func(tx store.Tx) error { return tx.PutAPIToken(row) }); err != nil {
		b.t.Fatal(err)
	}
}

// enrol makes a node; bound ones are active at once.
func (b *bench) enrol(name string, bound bool) {
	b.t.Helper()
	r := registry.TokenRequest{}
	if bound {
		r.Node = name
	}
	text, _, err := b.registry.CreateJoinToken(context.Background(), r)
	if err != nil {
		b.t.Fatal(err)
	}
	token := must(identity.ParseJoinToken(text))(b.t)
	b.keys++
	private := must(key.NewPrivate())(b.t)
	_, _, err = b.registry.Enrol(context.Background(), registry.EnrolRequest{Token: token, Node: name, SPKI: [32]byte{b.keys}, WireGuardKey: private.Public()})
	if err != nil {
		b.t.Fatal(err)
	}
}

// ask is one request; change it before it is sent.
type ask struct {
	method, path, token, body, kind string
	header                          map[string]string
	reader                          io.Reader
	host, remote                    string
}

func (b *bench) send(q ask) *httptest.ResponseRecorder {
	b.t.Helper()
	var body io.Reader
	if q.body != "" {
		body = strings.NewReader(q.body)
	}
	if q.reader != nil {
		body = q.reader
	}
	path := q.path
	if !strings.HasPrefix(path, "/") {
		path = Prefix + "/" + path
	}
	r := httptest.NewRequest(q.method, path, body)
	r.Host = "127.0.0.1:7480"
	if q.host != "" {
		r.Host = q.host
	}
	if q.remote != "" {
		r.RemoteAddr = q.remote
	}
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	if q.kind != "" {
		r.Header.Set("Content-Type", q.kind)
	}
	if q.token != "" {
		r.Header.Set("Authorization", "Bearer "+q.token)
	}
	for k, v := range q.header {
		r.Header.Set(k, v)
	}
	w := httptest.NewRecorder()
	b.handler.ServeHTTP(w, r)
	return w
}

// get asks as owner and reads the answer into out.
func (b *bench) get(path string, out any) {
	b.t.Helper()
	b.do("GET", path, "", http.StatusOK, out)
}

// do asks as owner and wants a status.
func (b *bench) do(method, path, body string, want int, out any) *httptest.ResponseRecorder {
	b.t.Helper()
	w := b.send(ask{method: method, path: path, token: "owner" + tail, body: body})
	if w.Code != want {
		b.t.Fatalf("%s %s: status %d, want %d: %s\nlog: %s", method, path, w.Code, want, w.Body, b.log.String())
	}
	if out != nil {
		if err := json.Unmarshal(w.Body.Bytes(), out); err != nil {
			b.t.Fatalf("%s %s: %v: %s", method, path, err, w.Body)
		}
	}
	return w
}

// refused wants a problem document with a code.
func (b *bench) refused(w *httptest.ResponseRecorder, status int, code string) apitypes.Problem {
	b.t.Helper()
	var p apitypes.Problem
	if w.Code != status {
		b.t.Fatalf("status %d, want %d: %s", w.Code, status, w.Body)
	}
	if kind := w.Header().Get("Content-Type"); kind != apitypes.ProblemType {
		b.t.Fatalf("content type %q", kind)
	}
	if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
		b.t.Fatal(err)
	}
	if p.Code != code || p.Status != status || p.Title != http.StatusText(status) {
		b.t.Fatalf("problem %+v, want code %s and status %d", p, code, status)
	}
	return p
}

// audited lists what the log says after seq.
func (b *bench) audited(after uint64) []apitypes.AuditRecord {
	b.t.Helper()
	return must(b.server.deps.Audit.List(context.Background(), after, 1000))(b.t)
}

const goodPolicy = `zones: [{name: app}, {name: data}]
workloads:
  - {id: app/api-server, selectors: ["unit:api-server.service"], nodes: ["api-*"]}
  - {id: app/webhook, selectors: ["unit:webhook.service"], nodes: ["api-*"]}
  - {id: data/postgres, selectors: ["unit:postgresql.service"], nodes: [db-1], serves: [tcp/5432]}
rules:
  - {id: api-to-postgres, from: [app/api-server], to: [data/postgres], allow: [tcp/5432]}
tests:
  - {from: app/api-server, to: data/postgres, port: tcp/5432, expect: allow}
  - {from: app/webhook, to: data/postgres, port: tcp/5432, expect: deny}
`

// policyBody is the JSON form of one document.
func policyBody(t *testing.T, text string) string {
	t.Helper()
	b := must(json.Marshal(apitypes.PolicyRequest{Files: []apitypes.File{{Name: "policy.yaml", Data: text}}}))(t)
	return string(b)
}
