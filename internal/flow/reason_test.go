package flow

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/reasons.md anew")

const reasonsPage = "../../docs/reasons.md"

// page is what docs/reasons.md must hold.
func page() string {
	var b strings.Builder
	b.WriteString("# Reason codes\n\nEvery verdict has one. They stand in flow records, in `signet flows` and in `signet explain`.\n\n| code | number | meaning | what to do |\n|---|---|---|---|\n")
	for _, r := range Reasons() {
		if r.Code != ReasonNone {
			fmt.Fprintf(&b, "| `%s` | %d | %s | %s |\n", r.Name, r.Code, r.Meaning, r.Remedy)
		}
	}
	return b.String()
}

func TestReasonsPageIsTheTable(t *testing.T) {
	if *update {
		if err := os.WriteFile(reasonsPage, []byte(page()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(reasonsPage)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != page() {
		t.Errorf("docs/reasons.md differs from the table; run: go test ./internal/flow -update")
	}
}

func TestReasonTableIsComplete(t *testing.T) {
	seen := map[string]bool{}
	for i, r := range Reasons() {
		if int(r.Code) != i || r.Name == "" || r.Meaning == "" || seen[r.Name] {
			t.Errorf("row %d is %+v", i, r)
		}
		seen[r.Name] = true
		var back Reason
		if err := back.UnmarshalText([]byte(r.Name)); err != nil || back != r.Code {
			t.Errorf("%s reads back as %v, %v", r.Name, back, err)
		}
		denies := r.Code != ReasonNone && r.Code != PolicyAllow
		if denies && r.Remedy == "" {
			t.Errorf("%s has no remedy", r.Name)
		}
	}
	var none Reason
	if none.UnmarshalText([]byte("NO_SUCH")) == nil || Reason(200).String() != "REASON_200" {
		t.Error("an unknown reason passes for a known one")
	}
}
