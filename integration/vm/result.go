package vm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// Outcome is how a test ended.
type Outcome string

// The outcomes. A test that began and did not end, since its binary died or was killed, is Unfinished.
const (
	Passed     Outcome = "pass"
	Failed     Outcome = "fail"
	Skipped    Outcome = "skip"
	Unfinished Outcome = "unfinished"
)

// Test is one test or subtest.
type Test struct {
	Name    string // with the names of its parents, for example "TestJudge/deny"
	Outcome Outcome
	Elapsed time.Duration // by the guest's clock
	Output  string        // what it printed, without its subtests; a skipped test's holds the reason
}

// Package is one binary's run.
type Package struct {
	Name   string // as Binary.Package
	Tests  []Test // in the order in which they began
	Begun  bool   // false when the guest never came to it
	Ended  bool   // false when the guest died in it
	Exit   int    // status of the binary; 128 and more is a signal
	Output string // what belongs to no test, for example a panic outside of tests
}

// OK reports whether the binary came to its end, said that all is well, and no test of it failed. Skipped tests are no
// failure; to have run none at all is one.
func (p Package) OK() bool {
	failed, unfinished := p.count(Failed), p.count(Unfinished)
	return p.Begun && p.Ended && p.Exit == 0 && len(p.Tests) > 0 && failed+unfinished == 0
}

// String is one line, for example "dataplane/enforce: 40 passed, 3 failed, 1 skipped".
func (p Package) String() string {
	if !p.Begun {
		return p.Name + ": not run"
	}
	line := p.Name + ": " + counts(p.Tests)
	if !p.Ended {
		line += ", the guest ended in the middle"
	} else if p.Exit != 0 && p.count(Failed) == 0 {
		line += fmt.Sprintf(", exit status %d", p.Exit)
	}
	return line
}

func (p Package) count(o Outcome) int { return count(p.Tests, o) }

func count(tests []Test, o Outcome) int {
	n := 0
	for _, t := range tests {
		if t.Outcome == o {
			n++
		}
	}
	return n
}

// counts says how tests ended, the two rare outcomes only when there are any.
func counts(tests []Test) string {
	text := fmt.Sprintf("%d passed, %d failed", count(tests, Passed), count(tests, Failed))
	if n := count(tests, Skipped); n > 0 {
		text += fmt.Sprintf(", %d skipped", n)
	}
	if n := count(tests, Unfinished); n > 0 {
		text += fmt.Sprintf(", %d not finished", n)
	}
	return text
}

// Report is what one guest said.
type Report struct {
	Kernel   Kernel
	Elapsed  time.Duration // from the start of the emulator to its end
	Packages []Package     // one for each binary, in order
	Console  []byte        // the kernel's messages
	broken   error         // why the guest did not come to its end
}

// OK reports whether every package is.
func (r *Report) OK() bool {
	for _, p := range r.Packages {
		if !p.OK() {
			return false
		}
	}
	return r.broken == nil && len(r.Packages) > 0
}

// String has one line for each package, each with the kernel before it, and no newline at the end.
func (r *Report) String() string {
	lines := make([]string, 0, len(r.Packages))
	for _, p := range r.Packages {
		lines = append(lines, r.Kernel.short()+": "+p.String())
	}
	return strings.Join(lines, "\n")
}

// Summary is the one line for all packages together, for example "6.1.0-56 (Linux 6.1.192-2): 117 passed, 0 failed, 3m52s".
func (r *Report) Summary() string {
	var all []Test
	for _, p := range r.Packages {
		all = append(all, p.Tests...)
	}
	line := fmt.Sprintf("%s (Linux %s): %s, %v", r.Kernel.short(), r.Kernel.Version, counts(all), r.Elapsed.Round(time.Second))
	if r.broken != nil {
		line += ", the guest ended early"
	}
	return line
}

var errEarly = errors.New("the guest ended before it was finished")

// section is what one binary wrote to the port.
type section struct {
	text  []byte
	ended bool
	exit  int
}

// read takes the second port's text apart: marks of init.sh, and between "begin" and "end" the output of a binary.
func (r *Report) read(ctx context.Context, text []byte, binaries []Binary) error {
	sections, broken := split(text)
	r.broken = broken
	for _, b := range binaries {
		p := Package{Name: b.Package}
		if s, ok := sections[b.Package]; ok {
			p.Begun, p.Ended, p.Exit = true, s.ended, s.exit
			if err := p.parse(ctx, s.text); err != nil {
				return fmt.Errorf("read output of %s: %w", b.Package, err)
			}
		}
		r.Packages = append(r.Packages, p)
	}
	return nil
}

const mark = "##signet-vm "

// split cuts the text at the marks. Without the mark "finished" the guest is broken.
func split(text []byte) (map[string]*section, error) {
	sections := map[string]*section{}
	var open *section
	broken := errEarly
	for line := range bytes.Lines(text) {
		words, ok := strings.CutPrefix(string(line), mark)
		if !ok {
			if open != nil {
				open.text = append(open.text, line...)
			}
			continue
		}
		verb, rest, _ := strings.Cut(strings.TrimSpace(words), " ")
		switch verb {
		case "begin":
			open = &section{}
			sections[rest] = open
		case "end":
			_, status, _ := strings.Cut(rest, " ")
			exit, err := strconv.Atoi(status)
			if open != nil && err == nil {
				open.exit, open.ended = exit, true
			}
			open = nil
		case "broken":
			broken = fmt.Errorf("%w: failed in the guest: %s", errEarly, rest)
		case "finished":
			broken = nil
		}
	}
	return sections, broken
}

// event is one line of go tool test2json.
type event struct {
	Action  string
	Test    string
	Output  string
	Elapsed float64 // seconds
}

// parse lets the go command take the output of a test binary apart.
func (p *Package) parse(ctx context.Context, text []byte) error {
	cmd := exec.CommandContext(ctx, "go", "tool", "test2json", "-t")
	cmd.Stdin = bytes.NewReader(text)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go tool test2json: %w%s", err, lastLine(stderr.String()))
	}
	at := map[string]int{}
	output := map[string]*strings.Builder{"": {}}
	lines := bufio.NewScanner(bytes.NewReader(out))
	lines.Buffer(nil, maxPort)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("go tool test2json: %w", err)
		}
		if _, known := output[e.Test]; !known {
			output[e.Test] = &strings.Builder{}
			at[e.Test] = len(p.Tests)
			p.Tests = append(p.Tests, Test{Name: e.Test, Outcome: Unfinished})
		}
		if e.Action == "output" {
			output[e.Test].WriteString(e.Output)
		} else if i, ok := at[e.Test]; ok {
			p.Tests[i].take(e)
		}
	}
	for i := range p.Tests {
		p.Tests[i].Output = output[p.Tests[i].Name].String()
	}
	p.Output = output[""].String()
	return lines.Err()
}

// take notes how a test went on. With -test.count a name comes several times: a failure stays.
func (t *Test) take(e event) {
	if t.Outcome == Failed {
		return
	}
	switch e.Action {
	case "run":
		t.Outcome = Unfinished
	case "pass", "fail", "skip":
		t.Outcome, t.Elapsed = Outcome(e.Action), time.Duration(e.Elapsed*float64(time.Second))
	}
}
