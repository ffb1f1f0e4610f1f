package compile

import (
	"fmt"
	"time"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// maxExplained bounds how many failing tests are explained at length; the others carry their verdict and reason.
const maxExplained = 20

// TestResult is what one test of a document came to.
type TestResult struct {
	Test policydoc.Test
	// Pass: what passes on record only (verdict audit) passes, as far as a test that expects allow or deny can tell.
	Pass        bool
	Verdict     flow.Verdict
	Code        flow.Reason
	Rule        string
	Explanation *Explanation // of a failing test; nil for the others, and beyond the first 20
}

// String is one line: the position, the question, and how it came out.
func (t TestResult) String() string {
	q := fmt.Sprintf("%v: %s to %s on %v", t.Test.At, name(t.Test.From), name(t.Test.To), t.Test.Service)
	by := t.Code.String()
	if t.Rule != "" {
		by += " by rule " + t.Rule
	}
	switch {
	case t.Pass && t.Verdict == flow.Audit:
		return fmt.Sprintf("%s: ok, in mode audit; enforced, it would be denied (%s)", q, by)
	case t.Pass:
		return q + ": ok"
	}
	return fmt.Sprintf("%s: expected %v, got %v (%s)", q, t.Test.Expect, t.Verdict, by)
}

// Candidate makes a State of a document that is not applied: temporary numbers, no nodes. Its numbers must never leave
// the process.
func Candidate(doc *policydoc.Document) *registry.State {
	s := &registry.State{
		Policy: doc, Nodes: map[string]registry.Node{},
		Numbers:     make(map[identity.ID]identity.Number, len(doc.Workloads)),
		RuleNumbers: make(map[string]uint32, len(doc.Rules)),
	}
	for i, w := range doc.Workloads {
		s.Numbers[w.ID] = identity.FirstNumber + identity.Number(i)
		s.TrustDomain = w.ID.TrustDomain()
	}
	for i, r := range doc.Rules {
		s.RuleNumbers[r.ID] = uint32(i + 1)
	}
	return s
}

// RunTests runs the tests of a document, applied or not, as of now; an error means that it does not compile. A document
// may be committed when every result passes.
func RunTests(doc *policydoc.Document, now time.Time) ([]TestResult, error) {
	s := Candidate(doc)
	c, err := Compile(s)
	if err != nil {
		return nil, err
	}
	out := make([]TestResult, 0, len(doc.Tests))
	explained := 0
	for _, t := range doc.Tests {
		ans := c.judge(s.Numbers[t.From], s.Numbers[t.To], t.Service, now)
		r := TestResult{Test: t, Verdict: ans.Verdict, Code: ans.Reason, Rule: c.Rules[ans.Rule],
			Pass: (ans.Verdict == flow.Deny) == (t.Expect == flow.Deny)}
		if !r.Pass && explained < maxExplained {
			explained++
			x := Explain(s, c, t.From, t.To, t.Service, now)
			x.Warnings = nil // a candidate is placed nowhere
			r.Explanation = &x
		}
		out = append(out, r)
	}
	return out, nil
}
