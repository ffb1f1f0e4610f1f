// Command testsum reads "go test -json" on standard input and says what a person wants to know: every failure in full, one
// line for each package, each test that did not run with its reason, and a last line "N passed, N failed, N skipped".
//
// It exits with 1 when anything failed, when a package did not come to its end, and when no test ran at all. A test with
// subtests counts as one more test; a package that failed outside of its tests (it did not build, or died) counts as one
// failure.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// maxLine bounds one line of input; go test cuts long output into several events, so that more is not to be expected.
const maxLine = 16 << 20

func main() {
	ok, err := run(os.Stdin, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testsum: cannot read test output:", err)
	}
	if !ok || err != nil {
		os.Exit(1)
	}
}

// event is one line of "go test -json".
type event struct {
	Action     string
	Package    string
	ImportPath string // of build events, instead of Package
	Test       string
	Output     string
	Elapsed    float64
}

// id names a test, or with an empty test a package.
type id struct{ pkg, test string }

// summary is what was read so far.
type summary struct {
	out     io.Writer
	text    map[id]*strings.Builder // output of what is not finished
	build   map[string]*strings.Builder
	open    map[string]bool // packages that have started and not ended
	failed  map[string]int  // failed tests of each package
	reasons map[string][]string
	passes  int
	fails   int
	skips   int
}

func run(in io.Reader, out io.Writer) (ok bool, err error) {
	s := &summary{
		out: out, text: map[id]*strings.Builder{}, build: map[string]*strings.Builder{},
		open: map[string]bool{}, failed: map[string]int{}, reasons: map[string][]string{},
	}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Action == "" {
			// Not from a test: what the go command itself says.
			fmt.Fprintln(out, lines.Text())
			continue
		}
		s.take(e)
	}
	s.finish()
	return s.fails == 0 && s.passes > 0, lines.Err()
}

func (s *summary) take(e event) {
	key := id{e.Package, e.Test}
	switch e.Action {
	case "start":
		s.open[e.Package] = true
	case "output":
		if s.text[key] == nil {
			s.text[key] = &strings.Builder{}
		}
		s.text[key].WriteString(e.Output)
	case "build-output":
		if s.build[e.ImportPath] == nil {
			s.build[e.ImportPath] = &strings.Builder{}
		}
		s.build[e.ImportPath].WriteString(e.Output)
	case "build-fail":
		if b := s.build[e.ImportPath]; b != nil {
			fmt.Fprint(s.out, b)
			delete(s.build, e.ImportPath)
		}
	case "pass", "fail", "skip":
		if e.Test != "" {
			s.endTest(e.Action, key)
		} else {
			s.endPackage(e)
		}
	}
}

func (s *summary) endTest(how string, key id) {
	text := ""
	if b := s.text[key]; b != nil {
		text = b.String()
		delete(s.text, key)
	}
	switch how {
	case "pass":
		s.passes++
	case "fail":
		s.fails++
		s.failed[key.pkg]++
		fmt.Fprintf(s.out, "FAILED %s %s\n%s", key.pkg, key.test, indent(text))
	case "skip":
		s.skips++
		why := reason(text)
		s.reasons[why] = append(s.reasons[why], key.pkg+" "+key.test)
	}
}

func (s *summary) endPackage(e event) {
	delete(s.open, e.Package)
	switch e.Action {
	case "pass":
		fmt.Fprintf(s.out, "ok      %s (%.1fs)\n", e.Package, e.Elapsed)
	case "fail":
		fmt.Fprintf(s.out, "FAIL    %s (%.1fs)\n", e.Package, e.Elapsed)
		if s.failed[e.Package] == 0 {
			s.fails++
			s.spill(e.Package)
		}
	}
	for key := range s.text {
		if key.pkg == e.Package {
			delete(s.text, key)
		}
	}
}

// spill prints all that is known of a package which failed without a failed test: it did not build, or died in the middle.
func (s *summary) spill(pkg string) {
	var all []id
	for key := range s.text {
		if key.pkg == pkg {
			all = append(all, key)
		}
	}
	slices.SortFunc(all, func(a, b id) int { return strings.Compare(a.test, b.test) })
	for _, key := range all {
		fmt.Fprintf(s.out, "%s %s\n%s", key.pkg, key.test, indent(s.text[key].String()))
	}
}

func (s *summary) finish() {
	for _, pkg := range sortedKeys(s.open) {
		s.fails++
		fmt.Fprintf(s.out, "FAIL    %s did not come to its end\n", pkg)
		s.spill(pkg)
	}
	if len(s.reasons) > 0 {
		fmt.Fprintln(s.out, "\nnot run:")
	}
	for _, why := range sortedKeys(s.reasons) {
		fmt.Fprintf(s.out, "  %s\n", why)
		for _, name := range s.reasons[why] {
			fmt.Fprintf(s.out, "    %s\n", name)
		}
	}
	if s.passes+s.fails == 0 {
		fmt.Fprintln(s.out, "no test ran")
	}
	fmt.Fprintf(s.out, "%d passed, %d failed, %d skipped\n", s.passes, s.fails, s.skips)
}

// reason is what a skipped test said, without the lines and the position that go test adds.
func reason(text string) string {
	var said []string
	for line := range strings.SplitSeq(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "===") || strings.HasPrefix(line, "---") {
			continue
		}
		if at, rest, ok := strings.Cut(line, ": "); ok && strings.Contains(at, ".go:") {
			line = rest
		}
		said = append(said, line)
	}
	if len(said) == 0 {
		return "no reason given"
	}
	return strings.Join(said, " ")
}

func indent(text string) string {
	if text == "" {
		return ""
	}
	return "    " + strings.ReplaceAll(strings.TrimSuffix(text, "\n"), "\n", "\n    ") + "\n"
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
