package policydoc

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

var update = flag.Bool("update", false, "write the first error of each bad document into it")

func trustDomain(t testing.TB) identity.TrustDomain {
	t.Helper()
	td, err := identity.ParseTrustDomain("settler.example")
	if err != nil {
		t.Fatal(err)
	}
	return td
}

func parseText(t testing.TB, text string) (*Document, []Warning, error) {
	t.Helper()
	return Parse(trustDomain(t), []File{{"p.yaml", []byte(text)}})
}

const wantPrefix = "# want: "

// TestBadDocuments reads testdata/bad: the first line of each document is the first error that it must give.
func TestBadDocuments(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(files) < 40 {
		t.Fatalf("%d bad documents, %v", len(files), err)
	}
	for _, file := range files {
		name := filepath.Base(file)
		t.Run(strings.TrimSuffix(name, ".yaml"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			first, rest, _ := bytes.Cut(data, []byte("\n"))
			doc, _, err := Parse(trustDomain(t), []File{{name, data}})
			if err == nil || doc != nil || !errors.Is(err, ErrDocument) {
				t.Fatalf("got %v, %v", doc, err)
			}
			var list Errors
			if !errors.As(err, &list) || len(list) == 0 || len(list) > maxErrors {
				t.Fatalf("got %T of %d errors", err, len(list))
			}
			got := list[0].Error()
			if *update {
				text := append([]byte(wantPrefix+got+"\n"), rest...)
				if err := os.WriteFile(file, text, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want := strings.TrimPrefix(string(first), wantPrefix); got != want {
				t.Errorf("\n got %s\nwant %s", got, want)
			}
			if strings.Contains(got, "not built yet") != errors.Is(list[0], policy.ErrNotBuilt) {
				t.Errorf("%q wraps ErrNotBuilt: %v", got, errors.Is(list[0], policy.ErrNotBuilt))
			}
		})
	}
}

func TestGoodDocuments(t *testing.T) {
	files, err := filepath.Glob("testdata/good/*.yaml")
	if err != nil || len(files) < 4 {
		t.Fatalf("%d good documents, %v", len(files), err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		doc, _, err := Parse(trustDomain(t), []File{{file, data}})
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		checkConsistent(t, doc)
	}
}

func TestContractExample(t *testing.T) {
	data, err := os.ReadFile("testdata/good/contract.yaml")
	if err != nil {
		t.Fatal(err)
	}
	doc, warnings, err := parseText(t, string(data))
	if err != nil || len(warnings) != 1 || !strings.Contains(warnings[0].Text, "app/webhook is named by no rule") {
		t.Fatalf("warnings %v, error %v", warnings, err)
	}
	if len(doc.Zones) != 3 || len(doc.Workloads) != 6 || len(doc.Rules) != 4 || len(doc.Tests) != 2 {
		t.Fatalf("got %d zones, %d workloads, %d rules, %d tests", len(doc.Zones), len(doc.Workloads), len(doc.Rules), len(doc.Tests))
	}
	r := doc.Rules[1]
	if r.ID != "bastion" || r.Action != policy.ActionAllow || !r.Expires.Equal(time.Date(2027, 1, 31, 0, 0, 0, 0, time.UTC)) || r.At != (Position{"p.yaml", 27, 5}) {
		t.Errorf("got %+v", r)
	}
	if r := doc.Rules[2]; r.Action != policy.ActionDeny || r.From[0].Zone.String() != "edge" || r.Services[0] != (policy.Service{}) {
		t.Errorf("got %+v", r)
	}
	r = doc.Rules[3]
	if r.From[0].Labels["team"] != "payments" || r.To[0].String() != "labels: {team: payments}" ||
		r.Services[0] != (policy.Service{Proto: flow.TCP, First: 8080, Last: 8090}) {
		t.Errorf("got %+v", r)
	}
	if doc.Tests[0].Expect != flow.Allow || doc.Tests[1].Expect != flow.Deny || doc.Tests[1].From.String() != "spiffe://settler.example/app/webhook" {
		t.Errorf("got %+v", doc.Tests)
	}
	w := doc.Workloads[0]
	if !w.PlacedOn("api-1") || w.PlacedOn("db-1") || w.PlacedOn("api") || w.Labels["team"] != "payments" {
		t.Errorf("got %+v", w)
	}
}

func TestWarnings(t *testing.T) {
	data, err := os.ReadFile("testdata/good/warnings.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, warnings, err := parseText(t, string(data))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"p.yaml:10:4: warning: rule wide allows tcp/80-91, which app/a does not serve",
		"p.yaml:11:4: warning: rule nothing: empty/* in from selects no workload, so it matches nothing",
		"p.yaml:11:4: warning: rule nothing: labels: {team: none} in to selects no workload, so it matches nothing",
		"p.yaml:6:4: warning: workload app/a is selected by its user alone: every process of that user, however it was started, has its identity",
		"p.yaml:8:4: warning: workload app/c is named by no rule, so it can talk to nothing",
		"p.yaml:8:4: warning: workloads app/b and app/c have the same selectors on the same nodes: a process that matches both gets neither identity",
	}
	var got []string
	for _, w := range warnings {
		got = append(got, w.String())
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestTraits: mode, internet, listen, sctp, wide ranges and the selectors of containers and network devices.
func TestTraits(t *testing.T) {
	data, err := os.ReadFile("testdata/good/traits.yaml")
	if err != nil {
		t.Fatal(err)
	}
	doc, warnings, err := parseText(t, string(data))
	if err != nil {
		t.Fatal(err)
	}
	if z := doc.Zones; z[0].Confined || !z[1].Confined || z[1].Name.String() != "data" || z[1].At != (Position{"p.yaml", 3, 6}) {
		t.Errorf("zones %+v", z)
	}
	if w := doc.Workloads; w[0].OverlayOnly || !w[3].OverlayOnly || w[4].OverlayOnly || w[0].Selectors[0].Kind != policy.SelectContainer ||
		w[0].Selectors[0].Value != "com.docker.compose.service=web" || w[1].Selectors[0] != (policy.Selector{Kind: policy.SelectInterface, Value: "tap0"}) {
		t.Errorf("workloads %+v", w)
	}
	var audit []bool
	for _, r := range doc.Rules {
		audit = append(audit, r.Audit)
	}
	if !slices.Equal(audit, []bool{false, true, true, true}) || doc.Rules[3].Action != policy.ActionDeny ||
		doc.Rules[0].Services[0] != (policy.Service{Proto: flow.SCTP, First: 1, Last: 65535}) || doc.Rules[1].Services[0] != (policy.Service{Proto: flow.SCTP}) {
		t.Errorf("rules %+v", doc.Rules)
	}
	var got []string
	for _, w := range warnings {
		got = append(got, w.String())
	}
	want := []string{
		"p.yaml:13:6: warning: rule idle is in mode audit and has no condition that could withhold anything, so the mode changes nothing",
		"p.yaml:7:6: warning: workloads app/vm and app/vm2 have the same selectors on the same nodes: what arrives from the device gets neither identity",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestDirectory: what one file declares, another may use, and errors name the right one.
func TestDirectory(t *testing.T) {
	files := []File{
		{"10-rules.yaml", []byte("rules:\n- {id: r, from: [app/a], to: [app/*], allow: [any]}\n")},
		{"20-empty.yaml", []byte("# later\n")},
		{"00-workloads.yaml", []byte("zones: [{name: app}]\nworkloads:\n- {id: app/a, selectors: [\"uid:1\"], nodes: [\"*\"]}\n")},
	}
	doc, _, err := Parse(trustDomain(t), files)
	if err != nil || len(doc.Rules) != 1 || doc.Rules[0].At.File != "10-rules.yaml" {
		t.Fatalf("got %+v, %v", doc, err)
	}
	files = append(files, File{"30.yaml", []byte("zones: [{name: app}]\nrules:\n- {id: r, from: [app/b], to: [app/*], allow: [any]}\n")})
	_, _, err = Parse(trustDomain(t), files)
	var list Errors
	if !errors.As(err, &list) || len(list) != 3 {
		t.Fatalf("got %v", err)
	}
	if got := list[0].Error(); got != `30.yaml:1:16: "app" is a duplicate zone: expected each zone once; the first one stands at 00-workloads.yaml:1:16` {
		t.Error(got)
	}
}

// TestAllErrors: a document's errors come together, in the order of the source, and no more than 20.
func TestAllErrors(t *testing.T) {
	var b strings.Builder
	b.WriteString("zones:\n")
	for range 30 {
		b.WriteString("- {name: A}\n")
	}
	_, _, err := parseText(t, b.String())
	var list Errors
	if !errors.As(err, &list) || len(list) != maxErrors {
		t.Fatalf("got %v", err)
	}
	for i, e := range list {
		if e.Pos.Line != i+2 {
			t.Errorf("error %d stands at line %d", i, e.Pos.Line)
		}
	}
	if !strings.HasSuffix(err.Error(), "only the first 20 errors are shown") {
		t.Error(err)
	}
}

// TestHostileValue: a value can neither forge a line of output nor hide behind letters that look alike.
func TestHostileValue(t *testing.T) {
	_, _, err := parseText(t, "zones: [{name: \"a\\nb\\u202e\\x1b\"}]\n")
	if err == nil || strings.ContainsAny(err.Error(), "\n\x1b\u202e") {
		t.Errorf("got %q", err)
	}
}

// TestBombs is M-55: each is refused, or read, in bounded time and without a panic.
func TestBombs(t *testing.T) {
	bombs := map[string]string{
		"brackets":      strings.Repeat("[", 1<<20),
		"braces":        strings.Repeat("{a: ", 1<<18),
		"dashes":        strings.Repeat("- ", 1<<18),
		"closing":       strings.Repeat("]", 1<<18),
		"keys":          strings.Repeat("a:\n", 1<<18),
		"aliases":       "a: &a [x]\n" + strings.Repeat("b: [*a, *a]\n", 1000),
		"items":         "rules: [" + strings.Repeat("a,", 1<<20) + "]",
		"large":         strings.Repeat(" ", maxBytes+1),
		"port ranges":   "rules: [{id: r, from: [], to: [], allow: [" + strings.Repeat("tcp/1-2,", 100_000) + "]}]",
		"rules":         "rules:\n" + strings.Repeat("- 1\n", MaxRules+1),
		"block scalars": strings.Repeat("|\n", 1<<17),
		"cyclic labels": "rules: [{id: r, from: [labels: {labels: {labels: {a: b}}}]}]",
	}
	for name, text := range bombs {
		start := time.Now()
		_, _, err := parseText(t, text)
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("%s: took %v", name, took)
		}
	}
	if _, _, err := Parse(trustDomain(t), make([]File, MaxFiles+1)); err == nil {
		t.Error("too many files were accepted")
	}
	if _, _, err := Parse(identity.TrustDomain{}, nil); err == nil {
		t.Error("no trust domain was accepted")
	}
}

// TestConfusables is P-3: names that a pattern language would take for one another are different, or refused.
func TestConfusables(t *testing.T) {
	names := []string{"a.b", "aXb", "A.B", "a.b.c", "a", "a-b", "a_b", "ab"}
	var b strings.Builder
	b.WriteString("zones: [{name: app}]\nworkloads:\n")
	for _, n := range names {
		fmt.Fprintf(&b, "- {id: app/%s, selectors: [\"unit:%s.service\"], nodes: [n]}\n", n, n)
	}
	doc, _, err := parseText(t, b.String())
	if err != nil {
		t.Fatal(err)
	}
	ix := doc.Index()
	for i, w := range doc.Workloads {
		if got := ix.Match(Pattern{ID: w.ID}); len(got) != 1 || got[0] != i {
			t.Errorf("%s matches %v", w.ID.Short(), got)
		}
		for j := range doc.Workloads {
			if (Pattern{ID: w.ID}).Matches(&doc.Workloads[j]) != (i == j) {
				t.Errorf("%s and %s", w.ID.Short(), doc.Workloads[j].ID.Short())
			}
		}
	}
}

func checkConsistent(t *testing.T, d *Document) {
	t.Helper()
	zones := map[identity.Zone]bool{}
	for _, z := range d.Zones {
		if z.Name.IsZero() || z.Name == identity.ReservedZone || zones[z.Name] || z.At.Line == 0 {
			t.Fatalf("zone %+v", z)
		}
		zones[z.Name] = true
	}
	ids := map[identity.ID]bool{}
	for _, w := range d.Workloads {
		if w.ID.IsZero() || ids[w.ID] || !zones[w.ID.Zone()] || policy.CheckSelectors(w.Selectors) != nil || len(w.Nodes) == 0 || w.At.Line == 0 {
			t.Fatalf("workload %+v", w)
		}
		ids[w.ID] = true
	}
	rules := map[string]bool{}
	for _, r := range d.Rules {
		if identity.ParseName(r.ID) != nil || rules[r.ID] || len(r.From) == 0 || len(r.To) == 0 || len(r.Services) == 0 || r.At.Line == 0 {
			t.Fatalf("rule %+v", r)
		}
		rules[r.ID] = true
		for _, p := range append(append([]Pattern{}, r.From...), r.To...) {
			set := 0
			for _, is := range []bool{!p.ID.IsZero(), !p.Zone.IsZero(), len(p.Labels) > 0} {
				if is {
					set++
				}
			}
			if set != 1 || !p.ID.IsZero() && !ids[p.ID] || !p.Zone.IsZero() && !zones[p.Zone] {
				t.Fatalf("pattern %+v of rule %s", p, r.ID)
			}
		}
	}
	for _, x := range d.Tests {
		if !ids[x.From] || !ids[x.To] || !Single(x.Service) {
			t.Fatalf("test %+v", x)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, dir := range []string{"testdata/bad/*.yaml", "testdata/good/*.yaml"} {
		files, err := filepath.Glob(dir)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	td := trustDomain(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		start := time.Now()
		doc, warnings, err := Parse(td, []File{{"f.yaml", data}})
		if took := time.Since(start); took > 5*time.Second {
			t.Fatalf("took %v", took)
		}
		if (err == nil) != (doc != nil) || len(warnings) > maxWarnings+1 {
			t.Fatalf("document %v, %d warnings, error %v", doc, len(warnings), err)
		}
		if err != nil {
			if s := err.Error(); strings.ContainsAny(s, "\x00\x1b") {
				t.Fatalf("error %q", s)
			}
			return
		}
		checkConsistent(t, doc)
	})
}
