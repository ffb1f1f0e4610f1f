package policydoc

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// ErrDocument is wrapped by every refusal of a document. A refusal of something that is known and not built yet wraps
// policy.ErrNotBuilt too.
var ErrDocument = errors.New("invalid document")

// maxErrors bounds what one document reports; reading stops to collect there.
const maxErrors = 20

// maxQuoted bounds the part of an offending value that is repeated in an error.
const maxQuoted = 70

// Error is one refusal: where, what stands there, what is wrong with it, what was expected, and what to do.
type Error struct {
	Pos     Position
	Value   string // as in the source; may be empty
	Problem string // continues the value: "is not a service"
	Want    string // continues "expected"
	Hint    string // a whole clause; may be empty
	kind    error
}

// Error is one line: `policy.yaml:12:5: "tcp/99999" is not a service: expected tcp/PORT; HINT`. Values are written in
// ASCII, so that letters that only look alike can be told apart, and a value cannot forge a line.
func (e Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Pos.String())
	b.WriteString(": ")
	if e.Value != "" {
		b.WriteString(quote(e.Value))
		b.WriteByte(' ')
	}
	b.WriteString(e.Problem)
	if e.Want != "" {
		b.WriteString(": expected ")
		b.WriteString(e.Want)
	}
	if e.Hint != "" {
		b.WriteString("; ")
		b.WriteString(e.Hint)
	}
	return b.String()
}

// Unwrap gives ErrDocument and the kind of the refusal.
func (e Error) Unwrap() []error {
	if e.kind == nil {
		return []error{ErrDocument}
	}
	return []error{ErrDocument, e.kind}
}

// Errors is everything that is wrong with a document, in the order of the source, at most 20.
type Errors []Error

// Error is one line for each error.
func (e Errors) Error() string {
	lines := make([]string, 0, len(e)+1)
	for _, one := range e {
		lines = append(lines, one.Error())
	}
	if len(e) >= maxErrors {
		lines = append(lines, fmt.Sprintf("only the first %d errors are shown", maxErrors))
	}
	return strings.Join(lines, "\n")
}

// Unwrap gives every error.
func (e Errors) Unwrap() []error {
	out := make([]error, len(e))
	for i, one := range e {
		out[i] = one
	}
	return out
}

// Warning says that something is legal and probably not meant.
type Warning struct {
	Pos  Position
	Text string
}

// String is one line.
func (w Warning) String() string { return w.Pos.String() + ": warning: " + w.Text }

// String is file:line:column.
func (p Position) String() string {
	if p.Line == 0 {
		return p.File
	}
	return p.File + ":" + strconv.Itoa(p.Line) + ":" + strconv.Itoa(p.Column)
}

// problems collects the errors of one document.
type problems struct{ list Errors }

func (p *problems) full() bool { return len(p.list) >= maxErrors }

func (p *problems) add(e Error) {
	if !p.full() {
		p.list = append(p.list, e)
	}
}

// err is the collected errors, in the order of the source, or nil.
func (p *problems) err(order map[string]int) error {
	if len(p.list) == 0 {
		return nil
	}
	slices.SortStableFunc(p.list, func(a, b Error) int {
		return cmp.Or(cmp.Compare(order[a.Pos.File], order[b.Pos.File]), cmp.Compare(a.Pos.Line, b.Pos.Line),
			cmp.Compare(a.Pos.Column, b.Pos.Column))
	})
	return p.list
}

func quote(s string) string {
	if len(s) > maxQuoted {
		return strconv.QuoteToASCII(strings.ToValidUTF8(s[:maxQuoted], "")) + "..."
	}
	return strconv.QuoteToASCII(s)
}

// maxNearest is the longest text that near compares; longer ones have no neighbour.
const maxNearest = 128

// near is a hint with the known word closest to s, or "" when none is close.
func near(s string, known []string) string {
	best, bestDist := "", min(3, 1+len(s)/3)+1
	for _, k := range known {
		if abs(len(k)-len(s)) >= bestDist {
			continue
		}
		if d := distance(s, k); d < bestDist {
			best, bestDist = k, d
		}
	}
	if best == "" {
		return ""
	}
	return "did you mean " + quote(best) + "?"
}

// distance is Levenshtein's.
func distance(a, b string) int {
	if len(a) > maxNearest || len(b) > maxNearest {
		return maxNearest
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			next := diagonal
			if a[i] != b[j] {
				next = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}

func abs(n int) int { return max(n, -n) }
