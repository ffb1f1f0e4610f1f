package vm

import (
	"strings"
	"testing"
	"time"
)

// begin, good and bad are texts of a port: what init.sh says, with a binary's -test.v=test2json between it.
const begin = "\n##signet-vm booted 6.1.0-1\n"

const good = "\n##signet-vm begin a/b\n" +
	"\x16=== RUN   TestOne\n\x16=== RUN   TestOne/deep\n    x_test.go:9: words\n\x16=== NAME  TestOne\n" +
	"\x16--- PASS: TestOne (1.50s)\n    \x16--- PASS: TestOne/deep (0.25s)\n" +
	"\x16=== RUN   TestTwo\n    x_test.go:12: it lacks something\n\x16--- SKIP: TestTwo (0.00s)\n\x16PASS\n" +
	"\n##signet-vm end a/b 0\n"

const bad = "\n##signet-vm begin c\n" +
	"\x16=== RUN   TestBad\n    x_test.go:5: got 1\n\x16--- FAIL: TestBad (0.00s)\n\x16=== RUN   TestDies\npanic: oh\n" +
	"\n##signet-vm end c 2\n"

func report(t *testing.T, text string) *Report {
	t.Helper()
	r := &Report{Kernel: Kernel{Release: "6.1.0-1-" + flavour}}
	if err := r.read(t.Context(), []byte(text), []Binary{{Package: "a/b"}, {Package: "c"}}); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestReport(t *testing.T) {
	for _, c := range []struct {
		name, text, lines string
		ok, broken        bool
	}{
		{"all well", begin + good + strings.ReplaceAll(good, "a/b", "c") + "##signet-vm finished\n",
			"6.1.0-1: a/b: 2 passed, 0 failed, 1 skipped\n6.1.0-1: c: 2 passed, 0 failed, 1 skipped", true, false},
		{"one died", begin + good + bad + "##signet-vm finished\n",
			"6.1.0-1: a/b: 2 passed, 0 failed, 1 skipped\n6.1.0-1: c: 0 passed, 1 failed, 1 not finished", false, false},
		{"a status and no failed test", begin + good + strings.NewReplacer("a/b 0", "c 137", "a/b", "c").Replace(good) + "##signet-vm finished\n",
			"6.1.0-1: a/b: 2 passed, 0 failed, 1 skipped\n6.1.0-1: c: 2 passed, 0 failed, 1 skipped, exit status 137", false, false},
		{"repeated", begin + good + strings.ReplaceAll(bad, "TestDies", "TestBad") + "##signet-vm finished\n",
			"6.1.0-1: a/b: 2 passed, 0 failed, 1 skipped\n6.1.0-1: c: 0 passed, 1 failed", false, false},
		{"no test", begin + good + "\n##signet-vm begin c\ntesting: warning: no tests to run\n\x16PASS\n\n##signet-vm end c 0\n##signet-vm finished\n",
			"6.1.0-1: a/b: 2 passed, 0 failed, 1 skipped\n6.1.0-1: c: 0 passed, 0 failed", false, false},
		{"guest died", begin + good + "\n##signet-vm begin c\n\x16=== RUN   TestX\n",
			"6.1.0-1: a/b: 2 passed, 0 failed, 1 skipped\n6.1.0-1: c: 0 passed, 0 failed, 1 not finished, the guest ended in the middle", false, true},
		{"guest died between", begin + good, "6.1.0-1: a/b: 2 passed, 0 failed, 1 skipped\n6.1.0-1: c: not run", false, true},
		{"not finished", begin + good + strings.ReplaceAll(good, "a/b", "c"),
			"6.1.0-1: a/b: 2 passed, 0 failed, 1 skipped\n6.1.0-1: c: 2 passed, 0 failed, 1 skipped", false, true},
		{"did not boot", "", "6.1.0-1: a/b: not run\n6.1.0-1: c: not run", false, true},
		{"init failed", "\n##signet-vm broken insmod x\n", "6.1.0-1: a/b: not run\n6.1.0-1: c: not run", false, true},
	} {
		r := report(t, c.text)
		if r.String() != c.lines || r.OK() != c.ok || (r.broken != nil) != c.broken {
			t.Errorf("%s: ok %v, broken %v:\n%s\nwant:\n%s", c.name, r.OK(), r.broken, r, c.lines)
		}
	}
	r := report(t, begin+good+bad)
	r.Kernel.Version, r.Elapsed = "6.1.5-1", 90*time.Second
	if got := r.Summary(); got != "6.1.0-1 (Linux 6.1.5-1): 2 passed, 1 failed, 1 skipped, 1 not finished, 1m30s, the guest ended early" {
		t.Error(got)
	}
	if (&Report{}).OK() {
		t.Error("a report of nothing is well")
	}
}

func TestPackageTests(t *testing.T) {
	r := report(t, begin+good+bad+"##signet-vm finished\n")
	type line struct {
		name    string
		outcome Outcome
		seconds float64
		output  string
	}
	for i, want := range [][]line{
		{{"TestOne", Passed, 1.5, ""}, {"TestOne/deep", Passed, 0.25, "words"}, {"TestTwo", Skipped, 0, "it lacks something"}},
		{{"TestBad", Failed, 0, "got 1"}, {"TestDies", Unfinished, 0, "panic: oh"}},
	} {
		got := r.Packages[i].Tests
		if len(got) != len(want) {
			t.Fatalf("%d tests, want %d: %v", len(got), len(want), got)
		}
		for j, w := range want {
			if g := got[j]; g.Name != w.name || g.Outcome != w.outcome || g.Elapsed.Seconds() != w.seconds || !strings.Contains(g.Output, w.output) {
				t.Errorf("got %+v, want %+v", g, w)
			}
		}
	}
	if got := reason(r.Packages[0].Tests[2]); got != "it lacks something" {
		t.Errorf("reason %q", got)
	}
	if got := reason(Test{Output: "=== RUN   TestX\n--- SKIP: TestX (0.00s)\n"}); got != "no reason given" {
		t.Errorf("reason %q", got)
	}
}

func TestParent(t *testing.T) {
	tests := []Test{{Name: "TestA"}, {Name: "TestA/x"}, {Name: "TestA/x/y"}, {Name: "TestAB"}}
	for name, want := range map[string]string{
		"TestA": "", "TestAB": "", "TestA/x": "TestA", "TestA/x/y": "TestA/x", "TestA/v4/udp": "TestA", "TestA/x/y/z": "TestA/x/y",
	} {
		if got := parent(tests, name); got != want {
			t.Errorf("parent of %s is %q, want %q", name, got, want)
		}
	}
}
