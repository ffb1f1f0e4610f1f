package main

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
)

func TestGarbageIsCollectedEarlyUnlessToldOtherwise(t *testing.T) {
	was := debug.SetGCPercent(100)
	defer debug.SetGCPercent(was)
	t.Setenv("GOGC", "200")
	tuneMemory()
	if got := debug.SetGCPercent(100); got != 100 {
		t.Errorf("GOGC was overridden by %d", got)
	}
	t.Setenv("GOGC", "")
	tuneMemory()
	if got := debug.SetGCPercent(100); got != gcPercent {
		t.Errorf("GC percent %d, expected %d", got, gcPercent)
	}
}

func TestFlags(t *testing.T) {
	good, bad := filepath.Join(t.TempDir(), "good.yaml"), filepath.Join(t.TempDir(), "bad.yaml")
	for path, text := range map[string]string{good: "node: api-1\n", bad: "node: api-1\nnonsense: 1\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"--version", 0, "dev"},
		{"--help", 0, "Usage: signetd"},
		{"--no-such-flag", 2, "Usage: signetd"},
		{"extra", 2, "unexpected argument"},
		{"--check-config --config " + good, 0, "is correct"},
		{"--check-config --config " + bad, 1, bad + ":2:1: \"nonsense\""},
		{"--config /nonexistent.yaml", 1, "signetd: read configuration"},
	} {
		var out, errs bytes.Buffer
		code := run(strings.Fields(c.args), &out, &errs)
		if got := out.String() + errs.String(); code != c.code || !strings.Contains(got, c.says) {
			t.Errorf("signetd %s: exit %d, %q", c.args, code, got)
		}
	}
}
