package api

import (
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
)

func TestPolicyLife(t *testing.T) {
	b := newBench(t)
	var p apitypes.Policy
	if w := b.do("GET", "policy", "", 200, &p); w.Header().Get("ETag") != `"0"` || p.Revision != 0 || p.Files == nil {
		t.Errorf("before the first: %s %+v", w.Header().Get("ETag"), p)
	}
	var a apitypes.PolicyApplied
	w := b.do("PUT", "policy", policyBody(t, goodPolicy), 200, &a)
	if a.Revision != 1 || a.Tests != 2 || a.Warnings == nil || w.Header().Get("ETag") != `"1"` {
		t.Errorf("applied %+v, ETag %s", a, w.Header().Get("ETag"))
	}
	w = b.send(ask{method: "PUT", path: "policy", body: goodPolicy + "# again\n", kind: "text/yaml; charset=utf-8", token: "policy-admin" + tail})
	if w.Code != 200 || w.Header().Get("ETag") != `"2"` {
		t.Fatalf("YAML: %d %s", w.Code, w.Body)
	}
	b.get("policy", &p)
	if p.Revision != 2 || len(p.Files) != 1 || p.Files[0].Data != goodPolicy+"# again\n" {
		t.Errorf("policy %+v", p)
	}
	b.get("policy/revisions/1", &p)
	if p.Revision != 1 || p.Files[0].Data != goodPolicy {
		t.Errorf("revision 1: %+v", p)
	}
	w = b.send(ask{method: "GET", path: "policy", token: "viewer" + tail, header: map[string]string{"If-None-Match": `"2"`}})
	if w.Code != http.StatusNotModified || w.Body.Len() > 0 || w.Header().Get("ETag") != `"2"` {
		t.Errorf("not modified: %d %q", w.Code, w.Body)
	}
	b.do("POST", "policy/rollback", "", 200, &a)
	if a.Revision != 3 {
		t.Errorf("rollback gives revision %d", a.Revision)
	}
	b.get("policy", &p)
	if p.Files[0].Data != goodPolicy {
		t.Error("rollback did not bring the first document back")
	}
	b.do("POST", "policy/rollback", `{"revision":2}`, 200, &a)
	var h apitypes.RevisionList
	b.get("policy/revisions?limit=3", &h)
	if len(h.Revisions) != 3 || h.Revisions[0].Revision != 4 || !h.Revisions[0].Current || h.Revisions[0].By != "token:owner" || h.Revisions[0].Note == "" || h.NextCursor == "" {
		t.Errorf("history %+v", h)
	}
	cursor := h.NextCursor
	h = apitypes.RevisionList{}
	b.get("policy/revisions?limit=3&cursor="+cursor, &h)
	if len(h.Revisions) != 1 || h.Revisions[0].Revision != 1 || h.NextCursor != "" {
		t.Errorf("second page %+v", h)
	}
}

func TestRollbackToNowhere(t *testing.T) {
	b := newBench(t)
	b.refused(b.send(ask{method: "POST", path: "policy/rollback", token: "owner" + tail}), 409, apitypes.CodeConflict)
	b.do("PUT", "policy", policyBody(t, goodPolicy), 200, nil)
	b.refused(b.send(ask{method: "POST", path: "policy/rollback", token: "owner" + tail}), 409, apitypes.CodeConflict)
	b.refused(b.send(ask{method: "POST", path: "policy/rollback", body: `{"revision":9}`, token: "owner" + tail}), 404, apitypes.CodeNotFound)
	b.refused(b.send(ask{method: "GET", path: "policy/revisions/0", token: "owner" + tail}), 404, apitypes.CodeNotFound)
	b.refused(b.send(ask{method: "GET", path: "policy/revisions/9", token: "owner" + tail}), 404, apitypes.CodeNotFound)
}

func TestPreconditions(t *testing.T) {
	b := newBench(t)
	put := func(match string) int {
		return b.send(ask{method: "PUT", path: "policy", body: policyBody(t, goodPolicy), token: "owner" + tail, header: map[string]string{"If-Match": match}}).Code
	}
	for _, c := range []struct {
		match string
		want  int
	}{
		{`"1"`, 412}, {`"0"`, 200}, {`"0"`, 412}, {`"1"`, 200}, {`W/"2"`, 400}, {`2`, 400}, {`"02"`, 400}, {`"2", "3"`, 400}, {`"-1"`, 400}, {"*", 200}, {`"3"`, 200}, {"", 200},
	} {
		if got := put(c.match); got != c.want {
			t.Errorf("If-Match %s: status %d, want %d", c.match, got, c.want)
		}
	}
	w := b.send(ask{method: "PUT", path: "policy", body: policyBody(t, goodPolicy), token: "owner" + tail, header: map[string]string{"If-Match": `"1"`}})
	if p := b.refused(w, 412, apitypes.CodePrecondition); !strings.Contains(p.Detail, "revision 1") || !strings.Contains(p.Detail, "5 is in force") {
		t.Errorf("%q", p.Detail)
	}
}

// TestOneOfManyWins: of many documents made from one revision exactly one is committed.
func TestOneOfManyWins(t *testing.T) {
	b := newBench(t)
	const rivals = 16
	codes := make(chan int, rivals)
	var wg sync.WaitGroup
	for i := range rivals {
		body := policyBody(t, goodPolicy+fmt.Sprintf("# %d\n", i))
		wg.Go(func() {
			codes <- b.send(ask{method: "PUT", path: "policy", body: body, token: "owner" + tail, header: map[string]string{"If-Match": `"0"`}}).Code
		})
	}
	wg.Wait()
	close(codes)
	count := map[int]int{}
	for c := range codes {
		count[c]++
	}
	if count[200] != 1 || count[412] != rivals-1 {
		t.Errorf("outcomes %v", count)
	}
}

// TestAuditIsSaid: a test that passes only because of mode audit says so.
func TestAuditIsSaid(t *testing.T) {
	b := newBench(t)
	audited := strings.Replace(goodPolicy, "rules:\n", "rules:\n  - {id: dry, from: [app/api-server], to: [data/postgres], deny: [tcp/5000-6000], mode: audit}\n", 1)
	var check apitypes.PolicyCheck
	b.do("POST", "policy/check", policyBody(t, audited), 200, &check)
	if !check.OK || len(check.Tests) == 0 || check.Tests[0].Got != "audit" || check.Tests[0].Rule != "dry" || !strings.Contains(check.Tests[0].Text, "in mode audit") {
		t.Errorf("%+v", check)
	}
	b.do("PUT", "policy", policyBody(t, audited), 200, nil)
	var x apitypes.Explanation
	b.do("POST", "explain", `{"from":"app/api-server","to":"data/postgres","port":"tcp/5432"}`, 200, &x)
	if x.Verdict != "audit" || x.Code != "POLICY_DENY" || x.Rule != "dry" || x.Remedy == "" {
		t.Errorf("%+v", x)
	}
}

func TestBadDocumentsChangeNothing(t *testing.T) {
	b := newBench(t)
	b.do("PUT", "policy", policyBody(t, goodPolicy), 200, nil)
	failing := strings.Replace(goodPolicy, "expect: deny", "expect: allow", 1)
	for _, c := range []struct{ name, body, code, text string }{
		{"syntax", policyBody(t, "zones: ["), apitypes.CodePolicyInvalid, "policy.yaml:1:"},
		{"unknown key", policyBody(t, "zoness: []\n"), apitypes.CodePolicyInvalid, "policy.yaml:1:1"},
		{"undefined workload", policyBody(t, "zones: [{name: app}]\nrules: [{id: r, from: [app/a], to: [app/b], allow: [any]}]\n"), apitypes.CodePolicyInvalid, "app/a"},
		{"not built", policyBody(t, strings.Replace(goodPolicy, "allow: [tcp/5432]}", "allow: [tcp/5432], when: 'true'}", 1)), apitypes.CodePolicyInvalid, "not built"},
		{"mode", policyBody(t, strings.Replace(goodPolicy, "allow: [tcp/5432]}", "allow: [tcp/5432], mode: observe}", 1)), apitypes.CodePolicyInvalid, "expected enforce or audit"},
		{"empty", policyBody(t, ""), apitypes.CodePolicyInvalid, "empty"},
		{"failing test", policyBody(t, failing), apitypes.CodePolicyTests, "expected allow, got deny"},
	} {
		w := b.send(ask{method: "PUT", path: "policy", body: c.body, token: "policy-admin" + tail})
		p := b.refused(w, 422, c.code)
		if len(p.Errors) == 0 || !strings.Contains(p.Errors[0].Text, c.text) {
			t.Errorf("%s: %+v, want %q", c.name, p.Errors, c.text)
		}
		var check apitypes.PolicyCheck
		b.do("POST", "policy/check", c.body, 200, &check)
		if check.OK || c.code == apitypes.CodePolicyInvalid && len(check.Errors) == 0 {
			t.Errorf("%s: check %+v", c.name, check)
		}
	}
	var p apitypes.Policy
	b.get("policy", &p)
	if p.Revision != 1 || p.Files[0].Data != goodPolicy {
		t.Errorf("a refused document left its trace: revision %d", p.Revision)
	}
}

func TestCheckShowsTests(t *testing.T) {
	b := newBench(t)
	var check apitypes.PolicyCheck
	b.do("POST", "policy/check", policyBody(t, strings.Replace(goodPolicy, "expect: deny", "expect: allow", 1)), 200, &check)
	if check.OK || len(check.Tests) != 2 || !check.Tests[0].OK || check.Tests[1].OK || check.Tests[1].Got != "deny" || check.Tests[1].Code != "NO_RULE" || check.Tests[1].Remedy == "" ||
		!strings.HasPrefix(check.Tests[1].At, "policy.yaml:10:") {
		t.Errorf("%+v", check)
	}
	b.get("policy", nil)
}

func TestDocumentForms(t *testing.T) {
	b := newBench(t)
	for _, c := range []struct {
		name, body, kind string
		status           int
	}{
		{"two files", `{"files":[{"name":"a.yaml","data":"zones: [{name: app}]\n"},{"name":"sub/b.yaml","data":"rules: []\n"}]}`, "", 200},
		{"no files", `{"files":[]}`, "", 422},
		{"no key", `{}`, "", 422},
		{"unknown key", `{"files":[],"force":true}`, "", 400},
		{"two values", `{"files":[{"name":"a","data":"rules: []"}]}{}`, "", 400},
		{"name with line end", `{"files":[{"name":"a\nb","data":""}]}`, "", 422},
		{"name upwards", `{"files":[{"name":"../a","data":""}]}`, "", 422},
		{"absolute name", `{"files":[{"name":"/etc/passwd","data":""}]}`, "", 422},
		{"dot name", `{"files":[{"name":"a/./b","data":""}]}`, "", 422},
		{"empty name", `{"files":[{"name":"","data":""}]}`, "", 422},
		{"long name", `{"files":[{"name":"` + strings.Repeat("a", 256) + `","data":""}]}`, "", 422},
		{"same name twice", `{"files":[{"name":"a","data":""},{"name":"a","data":""}]}`, "", 422},
		{"YAML", "rules: []\n", "application/yaml", 200},
		{"empty YAML", "", "text/yaml", 400},
	} {
		w := b.send(ask{method: "POST", path: "policy/check", body: c.body, kind: c.kind, token: "viewer" + tail})
		if w.Code != c.status {
			t.Errorf("%s: status %d, want %d: %s", c.name, w.Code, c.status, w.Body)
		}
	}
}

// FuzzDocumentBody: whatever the body, it is refused with a problem or gives files whose names are harmless.
func FuzzDocumentBody(f *testing.F) {
	f.Add("application/json", []byte(`{"files":[{"name":"a.yaml","data":"rules: []"}]}`))
	f.Add("text/yaml", []byte("rules: []"))
	f.Add("application/json", []byte(`{"files":[{"name":"../a","data":""}]}`))
	f.Fuzz(func(t *testing.T, kind string, body []byte) {
		files, err := DocumentInput{ContentType: kind, RawBody: body}.files()
		var p *apitypes.Problem
		if err != nil && !errors.As(err, &p) {
			t.Fatalf("an error that is no problem: %v", err)
		}
		for _, file := range files {
			if !filepath.IsLocal(file.Name) || strings.ContainsFunc(file.Name, func(c rune) bool { return c <= ' ' || c > '~' }) {
				t.Fatalf("file name %q", file.Name)
			}
		}
	})
}
