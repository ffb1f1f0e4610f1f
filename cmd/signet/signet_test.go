package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
)

var update = flag.Bool("update", false, "rewrite the transcripts in testdata")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const apiToken = "the-api-token-that-must-not-show"

var at = time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)

// bench is a coordinator and an agent that give canned answers, and a directory with files for commands.
type bench struct {
	t      *testing.T
	dir    string
	api    *httptest.Server
	socket string
	env    map[string]string

	mu       sync.Mutex
	answers  map[string]any // "METHOD path" to the answer; a *Problem or *localapi.Error refuses
	requests []string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir(), answers: map[string]any{}, env: map[string]string{}}
	b.api = httptest.NewServer(http.HandlerFunc(b.serve))
	t.Cleanup(b.api.Close)
	// A socket's path is short, and t.TempDir's need not be.
	short, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(short) })
	b.socket = filepath.Join(short, "agent.sock")
	l, err := net.Listen("unix", b.socket)
	if err != nil {
		t.Fatal(err)
	}
	agent := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(b.serve)}}
	agent.Start()
	t.Cleanup(agent.Close)
	b.env["HOME"] = b.dir
	b.file("token", apiToken+"\n", 0o600)
	b.cannedMesh()
	b.cannedPolicy()
	b.cannedAgent()
	return b
}

func (b *bench) file(name, data string, mode os.FileMode) string {
	b.t.Helper()
	path := filepath.Join(b.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), mode); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		b.t.Fatal(err)
	}
	return path
}

// serve is both servers: their paths differ.
func (b *bench) serve(w http.ResponseWriter, r *http.Request) {
	var body bytes.Buffer
	_, _ = body.ReadFrom(r.Body)
	b.mu.Lock()
	defer b.mu.Unlock()
	name := r.Method + " " + r.URL.EscapedPath()
	b.requests = append(b.requests, strings.TrimSpace(name+" "+r.Header.Get("If-Match")+" "+body.String()))
	w.Header().Set("Content-Type", "application/json")
	if strings.HasPrefix(r.URL.Path, "/api/") && r.Header.Get("Authorization") != "Bearer "+apiToken {
		w.Header().Set("Content-Type", apitypes.ProblemType)
		w.WriteHeader(http.StatusUnauthorized)
		_ = json.NewEncoder(w).Encode(apitypes.Problem{Status: 401, Code: apitypes.CodeUnauthorized, Detail: "a valid API token is needed"})
		return
	}
	answer, ok := b.answers[name]
	if list, isList := answer.([]any); isList { // one after another; the last stays
		answer = list[0]
		if len(list) > 1 {
			b.answers[name] = list[1:]
		}
	}
	switch v := answer.(type) {
	case *apitypes.Problem:
		w.Header().Set("Content-Type", apitypes.ProblemType)
		w.WriteHeader(v.Status)
	case *localapi.Error:
		w.WriteHeader(http.StatusBadRequest)
	case []flow.Record:
		for _, r := range v {
			_ = json.NewEncoder(w).Encode(r)
		}
		return
	case nil:
		if !ok {
			w.Header().Set("Content-Type", apitypes.ProblemType)
			w.WriteHeader(http.StatusNotFound)
			answer = apitypes.Problem{Status: 404, Code: apitypes.CodeNotFound, Detail: "there is no such thing"}
		} else {
			w.WriteHeader(http.StatusNoContent)
			return
		}
	}
	_ = json.NewEncoder(w).Encode(answer)
}

func (b *bench) sent() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]string(nil), b.requests...)
}

// run executes one command line, with the API named unless the environment says otherwise.
func (b *bench) run(stdin string, args ...string) (out, errs string, code int) {
	b.t.Helper()
	var o, e bytes.Buffer
	a := newApp(environment{Args: args, In: strings.NewReader(stdin), Out: &o, Err: &e, Getenv: func(k string) string { return b.env[k] }})
	a.poll = time.Millisecond
	code = a.run(context.Background())
	return o.String(), e.String(), code
}

func (b *bench) withAPI() {
	b.env["SIGNET_API"], b.env["SIGNET_TOKEN_FILE"] = b.api.URL, filepath.Join(b.dir, "token")
}

func addrs(list ...string) []netip.Addr {
	out := make([]netip.Addr, 0, len(list))
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func id(t *testing.T, s string) identity.ID {
	t.Helper()
	v, err := identity.ParseID(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

const evil = "evil\x1b[31m\nname\u202e"

func (b *bench) cannedMesh() {
	api1 := apitypes.Node{
		Name: "api-1", ID: "spiffe://settler.example/signet/node/api-1", Number: 256, Status: "active", Connected: true, Key: "a2V5", IPv4: netip.MustParseAddr("198.18.0.1"),
		IPv6: netip.MustParseAddr("fd00::1"), Created: at, LastSeen: at, PolicyRevision: 3, Workloads: []string{"spiffe://settler.example/app/api-server"},
	}
	b.answers["GET /api/v1/nodes"] = apitypes.NodeList{Nodes: []apitypes.Node{api1, {Name: evil, Status: "pending", Workloads: []string{}}}}
	b.answers["GET /api/v1/nodes/api-1"] = api1
	b.answers["POST /api/v1/nodes/stray/approve"] = nil
	b.answers["POST /api/v1/nodes/stray/revoke"] = nil
	b.answers["POST /api/v1/nodes/gone/approve"] = &apitypes.Problem{Status: 409, Code: apitypes.CodeConflict, Detail: "the node was revoked: its key is refused for good"}
	b.answers["POST /api/v1/join-tokens"] = apitypes.JoinToken{Token: "signet-join-abc", Node: "api-1", Expires: at}
	pg := apitypes.Workload{
		ID: "spiffe://settler.example/data/postgres", Zone: "data", Name: "postgres", Number: 259, Declared: true, Selectors: []string{"unit:postgresql.service"}, Nodes: []string{"db-*"},
		Serves: []string{"tcp/5432"}, Instances: []apitypes.Instance{{Node: "db-1", Addresses: addrs("198.18.0.9", "fd00::9")}, {Node: "db-2", Addresses: addrs("198.18.0.10", "fd00::a"), Revoked: true}},
	}
	b.answers["GET /api/v1/workloads"] = apitypes.WorkloadList{Workloads: []apitypes.Workload{
		{ID: "spiffe://settler.example/app/webhook", Zone: "app", Name: "webhook", Number: 258, Declared: true, Selectors: []string{}, Nodes: []string{}, Instances: []apitypes.Instance{}}, pg,
	}}
	b.answers["GET /api/v1/workloads/data/postgres"] = pg
	b.answers["POST /api/v1/workloads/app/webhook/revoke"] = nil
	b.answers["GET /api/v1/resolve"] = apitypes.Resolution{ID: pg.ID, Number: 259, Instances: pg.Instances}
	b.answers["POST /api/v1/explain"] = apitypes.Explanation{
		Verdict: "deny", Code: "NO_RULE", Stage: "egress", PolicyRevision: 3, From: apitypes.Peer{ID: "spiffe://settler.example/app/webhook", Number: 258, Node: "api-1", Nodes: []string{"api-1", "api-2"}},
		To: apitypes.Peer{ID: pg.ID, Number: 259}, Service: "tcp/5432", Observed: "no rule allows it", Expected: "an allow rule",
		Nearest: []apitypes.Near{{Rule: "api-to-postgres", Action: "allow", At: "policy.yaml:8:5", Fails: "from: app/webhook is not in [app/api-server]"}},
		Remedy:  "add a rule", Warnings: []string{"data/postgres is placed on no active node"},
	}
}

func (b *bench) cannedPolicy() {
	b.file("good.yaml", "zones: [{name: app}]\n", 0o644)
	b.file("bad.yaml", "zoness: []\n", 0o644)
	b.file("many/one.yaml", "zones: [{name: app}]\n", 0o644)
	b.file("many/sub/two.yml", "rules: []\n", 0o644)
	b.file("many/.hidden.yaml", "nonsense", 0o644)
	b.file("many/readme.txt", "nonsense", 0o644)
	b.file("many/bad name.yaml", "zoness: []\n", 0o644)
	b.file("empty/readme.txt", "", 0o644)
	b.answers["GET /api/v1/policy"] = apitypes.Policy{Revision: 3, Files: []apitypes.File{{Name: "policy.yaml", Data: "zones: []\n"}}}
	b.answers["GET /api/v1/policy/revisions/2"] = apitypes.Policy{Revision: 2, Files: []apitypes.File{{Name: "a.yaml", Data: "zones: []\n"}, {Name: "sub/b.yaml", Data: "rules: []\n"}}}
	b.answers["GET /api/v1/policy/revisions/66"] = apitypes.Policy{Revision: 66, Files: []apitypes.File{{Name: "../../escape.yaml", Data: "x"}}}
	b.answers["GET /api/v1/policy/revisions"] = apitypes.RevisionList{Revisions: []apitypes.Revision{
		{Revision: 3, Time: at, By: "token:ci", Note: "rollback to 1", Current: true}, {Revision: 2, Time: at, By: "token:ada"},
	}}
	b.answers["PUT /api/v1/policy"] = apitypes.PolicyApplied{Revision: 4, Warnings: []string{"good.yaml:1:8: warning: zone app has no workload"}, Tests: 2}
	b.answers["POST /api/v1/policy/rollback"] = apitypes.PolicyApplied{Revision: 5, Warnings: []string{}}
	b.answers["POST /api/v1/policy/check"] = apitypes.PolicyCheck{OK: true, Errors: []apitypes.Issue{}, Warnings: []string{"good.yaml:1:8: warning: zone app has no workload"}, Tests: []apitypes.TestResult{
		{OK: true, From: "app/a", To: "app/b", Port: "tcp/1", Expect: "allow", Got: "allow", Code: "POLICY_ALLOW", Rule: "r", At: "good.yaml:9:5", Text: "good.yaml:9:5: ok"},
	}}
	b.answers["GET /api/v1/policy/revisions/4/rollout"] = []any{
		apitypes.Rollout{Revision: 4, Waiting: 2, Hosts: []apitypes.RolloutHost{{Node: "api-1", Connected: true, Revision: 3}, {Node: "away", Revision: 1}, {Node: "db-1", Connected: true, Revision: 3}}},
		apitypes.Rollout{Revision: 4, Waiting: 1, Hosts: []apitypes.RolloutHost{{Node: "api-1", Connected: true, Revision: 4, Done: true}, {Node: "away", Revision: 1}, {Node: "db-1", Connected: true, Revision: 3}}},
		apitypes.Rollout{Revision: 4, Hosts: []apitypes.RolloutHost{{Node: "api-1", Connected: true, Revision: 4, Done: true}, {Node: "away", Revision: 1}, {Node: "db-1", Connected: true, Revision: 4, Done: true}}},
	}
	b.answers["GET /api/v1/policy/revisions/5/rollout"] = apitypes.Rollout{Revision: 5, Waiting: 1, Hosts: []apitypes.RolloutHost{{Node: "db-1", Connected: true, Revision: 4, Error: "map is full"}}}
}

func (b *bench) cannedAgent() {
	api := id(b.t, "spiffe://settler.example/app/api-server")
	node := localapi.Node{Name: "api-1", ID: id(b.t, "spiffe://settler.example/signet/node/api-1")}
	workloads := []localapi.Workload{
		{ID: api, Number: 257, Addresses: addrs("198.18.0.5", "fd00::5"), Selectors: []string{"unit:api-server.service"}, Matched: true, Cgroups: []string{"/system.slice/api-server.service"}},
		{ID: id(b.t, "spiffe://settler.example/app/webhook"), Number: 258, Addresses: addrs("198.18.0.6", "fd00::6"), Selectors: []string{"uid:33"}, Why: "no process of user 33"},
	}
	b.answers["GET /v1/status"] = localapi.Status{
		Version: "test", State: localapi.StateRunning, Node: node, Connected: true, Coordinator: "coord:7443", Revision: 3, Epoch: 7, LeaseEnds: at,
		Tunnel:      localapi.Tunnel{Kind: "userspace", Interface: "signet0", Port: 51820},
		Enforcement: localapi.Enforcement{Mode: "enforce", Healthy: true, Hooks: []localapi.Hook{{Name: "connect4", Attached: true}, {Name: "guard:eth0", Error: "no such device"}}},
		Peers:       localapi.PeerCount{Total: 2, Up: 1}, Workloads: workloads, SVIDs: []localapi.SVID{{ID: node.ID, Serial: "0a", Expires: at}}, Warnings: []string{"cgroup_root is below the real root" + evil},
		Details: localapi.Details{Clocks: localapi.Clocks{LeaseSeconds: 3600, SVIDSeconds: -1, SVIDExpires: at, OnLeaseEnd: "deny-all"}},
	}
	b.answers["GET /v1/workloads"] = workloads
	b.answers["GET /v1/peers"] = []localapi.Peer{{
		Node: "db-1", Key: "a2V5", Endpoint: netip.MustParseAddrPort("192.0.2.4:51820"), Up: true, LastHandshake: at, RxBytes: 10, TxBytes: 20, Addresses: addrs("198.18.0.9"),
		Identities: []identity.ID{id(b.t, "spiffe://settler.example/data/postgres")},
	}, {Node: "dark", Key: "a2V5", Addresses: addrs("198.18.0.7"), Identities: []identity.ID{}}}
	b.answers["GET /v1/resolve"] = localapi.Resolved{ID: api, Instances: []localapi.Instance{{Node: "api-1", Addresses: addrs("198.18.0.5", "fd00::5"), Local: true}}}
	b.answers["POST /v1/ping"] = localapi.PingReply{Target: "db-1", Node: "db-1", Endpoint: netip.MustParseAddrPort("192.0.2.4:51820"), RTTMs: 1.26}
	b.answers["GET /v1/netcheck"] = localapi.Netcheck{
		Node: "api-1", Candidates: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.3:51820")}, SeenAs: []netip.AddrPort{}, Keepalive: 25,
		Peers: []localapi.NetcheckPeer{{Node: "db-1", Endpoint: netip.MustParseAddrPort("192.0.2.4:51820"), Up: true, HandshakeSeconds: 4}, {Node: "dark", HandshakeSeconds: -1}},
		Notes: []string{"NAT traversal is not there yet."},
	}
	b.answers["POST /v1/explain"] = localapi.Explanation{
		Verdict: flow.Deny, Code: flow.NoRule, Stage: "egress", PolicyRevision: 3, From: localapi.ExplainedEnd{ID: id(b.t, "spiffe://settler.example/app/webhook"), Number: 258, Node: "api-1"},
		To: localapi.ExplainedEnd{ID: id(b.t, "spiffe://settler.example/data/postgres"), Number: 259, Node: "db-1"}, Service: "tcp/5432",
		Observed: "it would be denied at connect", Expected: "an allow rule", Nearest: []localapi.Near{{Rule: "api-to-postgres", Action: "allow", Fails: "allow: it does not allow tcp/5432 now"}},
		Remedy: "add a rule", Hooks: []localapi.ExplainedHook{{Hook: "connect", Verdict: flow.Deny, Code: flow.NoRule}},
	}
	b.answers["POST /v1/up"] = localapi.UpReply{Node: node, State: localapi.StatePending, Enrolled: true}
	b.answers["POST /v1/down"] = struct{}{}
	end := func(who string, ip string) flow.End {
		v := id(b.t, "spiffe://settler.example/"+who)
		return flow.End{ID: v, Zone: v.Zone().String(), IP: netip.MustParseAddr(ip), Port: 5432}
	}
	b.answers["GET /v1/flows"] = []flow.Record{
		{Schema: flow.Schema, Event: flow.EventStart, Time: at, Src: end("app/api-server", "198.18.0.5"), Dst: end("data/postgres", "198.18.0.9"), Proto: "tcp", Verdict: flow.Allow, Reason: flow.PolicyAllow, Rule: "api-to-postgres", PolicyRevision: 3, Count: 1},
		{Schema: flow.Schema, Event: flow.EventDeny, Time: at, Src: end("app/webhook", "198.18.0.6"), Dst: end("data/postgres", "198.18.0.9"), Proto: "tcp", Verdict: flow.Deny, Reason: flow.NoRule, PolicyRevision: 3, Count: 1, LostBefore: 2},
		{Schema: flow.Schema, Event: flow.EventDeny, Time: at, Src: flow.End{}, Dst: end("edge/admin", "198.18.0.8"), Proto: "udp", Verdict: flow.Deny, Reason: flow.NoIdentity, Count: 1},
	}
}

// TestTranscripts runs the commands of each file in testdata and compares everything that they print, and their exit
// codes. Lines of standard error begin with "! ". Run with -update to write the files anew, then read what changed.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			b := newBench(t)
			if strings.Contains(file, "api") {
				b.withAPI()
			}
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			for line := range strings.Lines(string(data)) {
				line = strings.TrimSuffix(line, "\n")
				if strings.HasPrefix(line, "## ") {
					fmt.Fprintf(&got, "%s\n\n", line)
				}
				if command, ok := strings.CutPrefix(line, "$ signet"); ok {
					b.transcribe(&got, command)
				}
			}
			if *update {
				if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got.String() != string(data) {
				t.Errorf("the transcript differs first at %s; run with -update and look at what changed", firstDifference(got.String(), string(data)))
			}
		})
	}
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(g), len(w)) {
		if g[i] != w[i] {
			return fmt.Sprintf("line %d: got %q, want %q", i+1, g[i], w[i])
		}
	}
	return "its end"
}

func (b *bench) transcribe(w *strings.Builder, command string) {
	replace := strings.NewReplacer("DIR", b.dir, "SOCKET", b.socket, "API", b.api.URL)
	restore := strings.NewReplacer(b.dir, "DIR", b.socket, "SOCKET", b.api.URL, "API")
	args := strings.Fields(replace.Replace(command))
	out, errs, code := b.run("signet-join-abc\n", append([]string{"--socket", b.socket}, args...)...)
	fmt.Fprintf(w, "$ signet%s\n", command)
	for line := range strings.Lines(restore.Replace(out)) {
		w.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
	for line := range strings.Lines(restore.Replace(errs)) {
		w.WriteString("! " + strings.TrimRight(line, " \n") + "\n")
	}
	fmt.Fprintf(w, "[exit %d]\n\n", code)
}
