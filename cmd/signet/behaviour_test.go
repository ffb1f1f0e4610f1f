package main

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/coordinator/api/apitypes"
)

// walk visits every command of the tree, those that cobra adds included.
func walk(c *cobra.Command, visit func(*cobra.Command)) {
	visit(c)
	for _, child := range c.Commands() {
		walk(child, visit)
	}
}

func TestEveryCommandExplainsItself(t *testing.T) {
	b := newBench(t)
	root := newApp(environment{Getenv: func(string) string { return "" }}).root()
	count := 0
	walk(root, func(c *cobra.Command) {
		count++
		if c.Short == "" || c.Example == "" {
			t.Errorf("%s: short %q, example %q", c.CommandPath(), c.Short, c.Example)
		}
		args := append(strings.Fields(c.CommandPath())[1:], "--help")
		out, errs, code := b.run("", args...)
		if code != exitOK || errs != "" || !strings.Contains(out, "Usage:") {
			t.Errorf("%s --help: exit %d, %q", c.CommandPath(), code, errs)
		}
	})
	if count < 40 {
		t.Errorf("only %d commands", count)
	}
}

func TestCompletion(t *testing.T) {
	b := newBench(t)
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if out, errs, code := b.run("", "completion", shell); code != exitOK || len(out) < 500 {
			t.Errorf("%s: exit %d, %d bytes, %s", shell, code, len(out), errs)
		}
	}
	if out, _, _ := b.run("", "__complete", "policy", ""); !strings.Contains(out, "rollback") {
		t.Errorf("completion of policy: %q", out)
	}
}

// TestMachineOutputIsOneDocument: whatever a command prints with -o json is one JSON value, and with jsonl one a line.
func TestMachineOutputIsOneDocument(t *testing.T) {
	b := newBench(t)
	b.withAPI()
	good := filepath.Join(b.dir, "good.yaml")
	for _, args := range [][]string{
		{"status"}, {"peers"}, {"workloads"}, {"netcheck"}, {"ping", "db-1"}, {"up"}, {"down"}, {"flows"}, {"version"}, {"node", "list"}, {"node", "show", "api-1"}, {"node", "approve", "stray"},
		{"node", "token", "create"}, {"workload", "list"}, {"workload", "show", "data/postgres"}, {"workload", "revoke", "app/webhook"}, {"resolve", "data/postgres"}, {"policy", "get"},
		{"policy", "check", good}, {"policy", "test", good}, {"policy", "apply", good}, {"policy", "history"}, {"policy", "rollback"}, {"explain", "--from", "a/b", "--to", "c/d", "--port", "tcp/1"},
	} {
		for _, format := range []string{"json", "jsonl"} {
			out, errs, code := b.run("", append([]string{"--socket", b.socket, "-o", format}, args...)...)
			if code != exitOK {
				t.Errorf("%v: exit %d: %s", args, code, errs)
				continue
			}
			if strings.ContainsAny(out, "\x1b\u202e") {
				t.Errorf("%v: the output would act on a terminal", args)
			}
			dec := json.NewDecoder(strings.NewReader(out))
			values := 0
			for dec.More() {
				var v any
				if err := dec.Decode(&v); err != nil {
					t.Fatalf("%v: %v: %s", args, err, out)
				}
				values++
			}
			if lines := strings.Count(out, "\n"); format == "json" && values != 1 || format == "jsonl" && values != lines {
				t.Errorf("%v -o %s: %d values in %d lines", args, format, values, lines)
			}
		}
	}
}

func TestRequestsThatAreSent(t *testing.T) {
	b := newBench(t)
	b.withAPI()
	good := filepath.Join(b.dir, "good.yaml")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"node", "token", "create", "--node", "api-*", "--ttl", "30m", "--uses", "5", "--replace"}, `POST /api/v1/join-tokens  {"node":"api-*","ttl":"30m0s","uses":5,"replace":true}`},
		{[]string{"node", "token", "create"}, `POST /api/v1/join-tokens  {"ttl":"1h0m0s","uses":1}`},
		{[]string{"workload", "revoke", "spiffe://settler.example/app/webhook", "--node", "api-1"}, `POST /api/v1/workloads/app/webhook/revoke  {"node":"api-1"}`},
		{[]string{"policy", "apply", good}, `PUT /api/v1/policy  {"files":[{"name":"good.yaml","data":"zones: [{name: app}]\n"}]}`},
		{[]string{"policy", "apply", good, "--base", "0"}, `PUT /api/v1/policy "0" {"files":[{"name":"good.yaml","data":"zones: [{name: app}]\n"}]}`},
		{[]string{"policy", "check", filepath.Join(b.dir, "many")}, `POST /api/v1/policy/check  {"files":[{"name":"bad_name.yaml","data":"zoness: []\n"},{"name":"one.yaml","data":"zones: [{name: app}]\n"},{"name":"sub/two.yml","data":"rules: []\n"}]}`},
		{[]string{"policy", "rollback", "2"}, `POST /api/v1/policy/rollback  {"revision":2}`},
		{[]string{"node", "show", "../policy"}, `GET /api/v1/nodes/..%2Fpolicy`},
		{[]string{"--socket", b.socket, "up", "--coordinator", "a:1,b:2", "--node", "n", "--join-file", "-"}, `POST /v1/up  {"coordinators":["a:1","b:2"],"token":"signet-join-abc","node":"n"}`},
		{[]string{"--socket", b.socket, "down", "--release"}, `POST /v1/down  {"release":true}`},
	} {
		_, errs, _ := b.run("signet-join-abc\n", c.args...)
		sent := b.sent()
		if len(sent) == 0 || strings.ReplaceAll(sent[len(sent)-1], "  ", " ") != strings.ReplaceAll(c.want, "  ", " ") {
			t.Errorf("%v: sent %q, want %q; %s", c.args, sent[len(sent)-1:], c.want, errs)
		}
	}
}

func TestUnhealthyAgentsFail(t *testing.T) {
	b := newBench(t)
	healthy, ok := b.answers["GET /v1/status"].(localapi.Status)
	if !ok {
		t.Fatal("no canned status")
	}
	for _, c := range []struct {
		name   string
		change func(*localapi.Status)
		hint   string
		code   int
	}{
		{"healthy", func(*localapi.Status) {}, "", exitOK},
		{"coordinator away", func(s *localapi.Status) { s.Connected, s.Session = false, "connection refused" }, "", exitOK},
		{"not enrolled", func(s *localapi.Status) { s.State = localapi.StateNeedsEnrolment }, "signet up --coordinator", exitFailure},
		{"pending", func(s *localapi.Status) { s.State = localapi.StatePending }, "signet node approve api-1", exitFailure},
		{"down", func(s *localapi.Status) { s.State = localapi.StateDown }, "signet up", exitFailure},
		{"degraded", func(s *localapi.Status) { s.State = localapi.StateDegraded }, "warnings", exitFailure},
		{"does not enforce", func(s *localapi.Status) { s.Enforcement.Healthy = false }, "warnings", exitFailure},
	} {
		s := healthy
		c.change(&s)
		b.answers["GET /v1/status"] = s
		for _, args := range [][]string{{"status"}, {"status", "-o", "json"}, {"status", "--check", "ready"}, {"status", "--check", "live"}} {
			out, errs, code := b.run("", append([]string{"--socket", b.socket}, args...)...)
			want := c.code
			if slices.Contains(args, "live") {
				want = exitOK
			}
			if code != want || out == "" || want != exitOK && !strings.Contains(errs, c.hint) {
				t.Errorf("%s, %v: exit %d, want %d: %s%s", c.name, args, code, want, out, errs)
			}
		}
	}
	for _, check := range []string{"", "--check=live", "--check=ready"} {
		args := slices.DeleteFunc([]string{"--socket", filepath.Join(b.dir, "none"), "status", check}, func(s string) bool { return s == "" })
		if out, errs, code := b.run("", args...); code != exitFailure || out != "" || !strings.Contains(errs, "not running") {
			t.Errorf("no agent, %s: exit %d: %s%s", check, code, out, errs)
		}
	}
}

// TestSecretsStaySecret: no output holds a token, whatever goes wrong with it.
func TestSecretsStaySecret(t *testing.T) {
	b := newBench(t)
	const secret = "v3ry-secret-t0ken"
	base := []string{"--api", b.api.URL, "--socket", b.socket}
	for name, c := range map[string]struct {
		data string
		mode os.FileMode
		want string
	}{
		"wrong":          {secret, 0o600, "refused the token"},
		"world readable": {secret, 0o604, "others on this host"},
		"world writable": {secret, 0o602, "others on this host"},
		"two words":      {secret + " " + secret, 0o600, "does not hold one token"},
		"binary":         {secret + "\x00", 0o600, "does not hold one token"},
		"too long":       {secret + strings.Repeat("x", maxSecret), 0o600, "does not hold one token"},
		"empty":          {"\n", 0o600, "is empty"},
	} {
		path := b.file("secret-"+strings.ReplaceAll(name, " ", "-"), c.data, c.mode)
		for _, args := range [][]string{{"--token-file", path, "node", "list"}, {"up", "--join-file", path}} {
			out, errs, code := b.run("", append(slices.Clone(base), args...)...)
			if strings.Contains(out+errs, secret) {
				t.Errorf("%s, %v: the secret shows: %s%s", name, args, out, errs)
			}
			if name == "wrong" && args[0] == "up" {
				continue // to the agent it is as good as any
			}
			if code != exitFailure || !strings.Contains(errs, c.want) {
				t.Errorf("%s, %v: exit %d, %q", name, args, code, errs)
			}
		}
	}
	out, errs, code := b.run("", append(slices.Clone(base), "up", secret)...)
	if code != exitUsage || strings.Contains(out+errs, secret) {
		t.Errorf("a token on the command line: exit %d: %s%s", code, out, errs)
	}
	out, errs, _ = b.run("", append(slices.Clone(base), "--token-file", b.dir, "node", "list")...)
	if !strings.Contains(errs, "is not a file") {
		t.Errorf("a directory as token file: %s%s", out, errs)
	}
	group := b.file("group", apiToken, 0o640)
	if _, errs, code := b.run("", append(slices.Clone(base), "--token-file", group, "node", "list")...); code != exitOK {
		t.Errorf("a file that the group can read: exit %d: %s", code, errs)
	}
}

func TestContexts(t *testing.T) {
	b := newBench(t)
	b.file(".config/signet/config.yaml", fmt.Sprintf("context: prod\ncontexts:\n  prod: {api: %q, token_file: %q}\n  lab: {api: %q, token_file: /nowhere}\n", b.api.URL, filepath.Join(b.dir, "token"), b.api.URL), 0o600)
	if _, errs, code := b.run("", "node", "list"); code != exitOK {
		t.Errorf("default context: exit %d: %s", code, errs)
	}
	if _, errs, code := b.run("", "node", "list", "--context", "lab"); code != exitFailure || !strings.Contains(errs, "/nowhere") {
		t.Errorf("other context: exit %d: %s", code, errs)
	}
	if _, errs, code := b.run("", "node", "list", "--context", "nope"); code != exitUsage || !strings.Contains(errs, "nope") {
		t.Errorf("unknown context: exit %d: %s", code, errs)
	}
	if _, _, code := b.run("", "node", "list", "--context", "lab", "--api", b.api.URL); code != exitUsage {
		t.Errorf("context and API: exit %d", code)
	}
	// The token of a context never goes to an address from elsewhere.
	if _, errs, code := b.run("", "node", "list", "--api", "http://127.0.0.1:1"); code != exitFailure || !strings.Contains(errs, "no API token was named") {
		t.Errorf("context's token for another API: exit %d: %s", code, errs)
	}
	b.env["SIGNET_API"] = "http://127.0.0.1:1"
	if _, errs, code := b.run("", "node", "list", "--context", "prod"); code != exitOK {
		t.Errorf("--context over SIGNET_API: exit %d: %s", code, errs)
	}
	delete(b.env, "SIGNET_API")
	b.file(".config/signet/config.yaml", "contexts: {prod: {api: x, tokn_file: y}}\n", 0o600)
	if _, errs, code := b.run("", "node", "list"); code != exitFailure || !strings.Contains(errs, "config.yaml:1:") || !strings.Contains(errs, "tokn_file") {
		t.Errorf("broken configuration: exit %d: %s", code, errs)
	}
}

func TestPrivateCertificate(t *testing.T) {
	b := newBench(t)
	secure := httptest.NewUnstartedServer(b.api.Config.Handler)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0) // it complains about the client that does not trust it
	secure.StartTLS()
	defer secure.Close()
	ca := b.file("ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})), 0o644)
	args := []string{"--api", secure.URL, "--token-file", filepath.Join(b.dir, "token"), "node", "list"}
	if _, errs, code := b.run("", args...); code != exitFailure || !strings.Contains(errs, "certificate") {
		t.Errorf("unknown authority: exit %d: %s", code, errs)
	}
	if n := len(b.sent()); n != 0 {
		t.Errorf("%d requests went to an API that was not trusted", n)
	}
	if _, errs, code := b.run("", append(args, "--ca-file", ca)...); code != exitOK {
		t.Errorf("with --ca-file: exit %d: %s", code, errs)
	}
	if _, errs, code := b.run("", append(args, "--ca-file", filepath.Join(b.dir, "good.yaml"))...); code == exitOK || !strings.Contains(errs, "PEM") {
		t.Errorf("a CA file without certificate: exit %d: %s", code, errs)
	}
}

func TestRefusedDocuments(t *testing.T) {
	b := newBench(t)
	b.withAPI()
	path := filepath.Join(b.dir, "many")
	b.answers["PUT /api/v1/policy"] = &apitypes.Problem{Status: 422, Code: apitypes.CodePolicyInvalid, Detail: "the policy document has errors; nothing was changed", Errors: []apitypes.Issue{
		{File: "bad_name.yaml", Line: 1, Column: 1, Text: `bad_name.yaml:1:1: "zoness" is an unknown key`},
	}}
	out, errs, code := b.run("", "policy", "apply", path)
	if code != exitFailure || out != "" || !strings.Contains(errs, filepath.Join(path, "bad name.yaml")+":1:1: ") {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
	b.answers["POST /api/v1/policy/check"] = apitypes.PolicyCheck{Errors: []apitypes.Issue{}, Tests: []apitypes.TestResult{
		{OK: true, From: "a/b"}, {From: "a/b", To: "c/d", Port: "tcp/1", Expect: "allow", Got: "deny", Code: "NO_RULE", At: "good.yaml:1:1", Text: "good.yaml:1:1: a/b to c/d on tcp/1: expected allow, got deny (NO_RULE)"},
	}}
	for _, verb := range []string{"check", "test"} {
		out, errs, code = b.run("", "policy", verb, filepath.Join(b.dir, "good.yaml"))
		if code != exitFailure || !strings.Contains(errs, "1 of 2 tests") || !strings.Contains(out+errs, filepath.Join(b.dir, "good.yaml")+":1:1") {
			t.Errorf("%s: exit %d: %s%s", verb, code, out, errs)
		}
	}
}

func TestAnswersOfStrangers(t *testing.T) {
	b := newBench(t)
	b.withAPI()
	for name, answer := range map[string]any{
		"refusal without a code": &apitypes.Problem{Status: 418, Detail: "x"},
		"other shape":            []string{"x"},
	} {
		b.answers["GET /api/v1/nodes"] = answer
		if _, errs, code := b.run("", "node", "list"); code != exitFailure || !strings.Contains(errs, "not the coordinator's API") {
			t.Errorf("%s: exit %d: %s", name, code, errs)
		}
	}
	b.env["SIGNET_API"] = "http://127.0.0.1:1"
	if _, errs, code := b.run("", "node", "list"); code != exitFailure || !strings.Contains(errs, "cannot be reached at http://127.0.0.1:1") || !strings.Contains(errs, "hint: ") {
		t.Errorf("nobody there: exit %d: %s", code, errs)
	}
}

func TestHostsFileRefusesHostileAnswers(t *testing.T) {
	b := newBench(t)
	b.withAPI()
	for _, bad := range []string{"spiffe://settler.example/data/post_gres", "spiffe://settler.example/data/Postgres", "spiffe://x/a/b\n127.0.0.1 bank", "evil"} {
		b.answers["GET /api/v1/resolve"] = apitypes.Resolution{ID: bad, Instances: []apitypes.Instance{{Node: "n", Addresses: addrs("198.18.0.9")}}}
		if out, _, code := b.run("", "resolve", "data/postgres", "--hosts-file"); code != exitFailure || out != "" {
			t.Errorf("%q: exit %d: %s", bad, code, out)
		}
	}
	b.answers["GET /api/v1/resolve"] = apitypes.Resolution{ID: "spiffe://settler.example/data/postgres", Instances: []apitypes.Instance{{Node: "n\n127.0.0.1 bank", Addresses: addrs("198.18.0.9")}}}
	if out, _, _ := b.run("", "resolve", "data/postgres", "--hosts-file"); strings.Count(out, "\n") != 1 {
		t.Errorf("a node's name made a line of its own: %q", out)
	}
}

func TestInterruptedWait(t *testing.T) {
	b := newBench(t)
	b.withAPI()
	b.answers["GET /api/v1/policy/revisions/4/rollout"] = apitypes.Rollout{Revision: 4, Waiting: 1, Hosts: []apitypes.RolloutHost{{Node: "db-1", Connected: true}}}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	var out, errs strings.Builder
	a := newApp(environment{Args: []string{"policy", "apply", filepath.Join(b.dir, "good.yaml"), "--wait"}, Out: &out, Err: &errs, Getenv: func(k string) string { return b.env[k] }})
	a.poll = time.Millisecond
	if code := a.run(ctx); code != exitFailure || strings.TrimSpace(out.String()) != "4" || !strings.Contains(errs.String(), "was applied") {
		t.Errorf("exit %d: %s%s", code, out.String(), errs.String())
	}
}

func TestSafe(t *testing.T) {
	for in, want := range map[string]string{
		"plain ü 漢": "plain ü 漢", "\x1b[2J": `\x1b[2J`, "a\tb\nc": `a\x09b\x0ac`, "\u202eevil": `\u202eevil`, "\u200b": `\u200b`, "\x7f": `\x7f`, "\xff": `\ufffd`, "\U000e0001": `\U000e0001`, "": "",
	} {
		if got := safe(in); got != want {
			t.Errorf("safe(%q) = %q, want %q", in, got, want)
		}
	}
	if got := safeText("a\tb\n\x1bc\n"); got != "a\tb\n\\x1bc\n" {
		t.Errorf("safeText: %q", got)
	}
}

func FuzzSafe(f *testing.F) {
	f.Add("x\x1b]0;evil\x07")
	f.Fuzz(func(t *testing.T, s string) {
		for _, c := range safe(s) {
			if c < ' ' || c == 0x7f || c >= 0x80 && c < 0xa0 || c == 0x202e {
				t.Fatalf("safe(%q) lets %q through", s, c)
			}
		}
	})
}

func TestWaitWithoutHosts(t *testing.T) {
	b := newBench(t)
	b.withAPI()
	b.answers["GET /api/v1/policy/revisions/4/rollout"] = apitypes.Rollout{Revision: 4, Hosts: []apitypes.RolloutHost{}}
	if _, errs, code := b.run("", "policy", "apply", filepath.Join(b.dir, "good.yaml"), "--wait"); code != exitOK || !strings.Contains(errs, "no host is connected") {
		t.Errorf("exit %d: %s", code, errs)
	}
}
