package vm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// emulator puts a program of that name before the real one: what Run does with an emulator that misbehaves cannot be
// tried with one that does not.
func emulator(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	name := filepath.Join(dir, "qemu-system-x86_64")
	write(t, name, "#!/bin/sh\n"+script+"\n")
	if err := os.Chmod(name, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestEmulatePorts(t *testing.T) {
	emulator(t, `echo to the console > /dev/fd/3; echo "$*" > /dev/fd/4`)
	var live bytes.Buffer
	console, results, err := emulate(t.Context(), Kernel{Image: "/k"}, "/i", Options{CPUs: 3, Memory: 77, Console: &live, Output: io.Discard})
	if err != nil || string(console) != "to the console\n" || live.String() != string(console) {
		t.Errorf("console %q, copied %q, %v", console, &live, err)
	}
	for _, want := range []string{"-accel tcg ", "-smp 3 ", "-m 77 ", "-kernel /k ", "-initrd /i ", "-no-reboot "} {
		if !strings.Contains(string(results), want) {
			t.Errorf("arguments %s lack %q", results, want)
		}
	}
}

func TestEmulateFails(t *testing.T) {
	emulator(t, `echo half > /dev/fd/4; echo something >&2; echo no such machine >&2; exit 3`)
	_, results, err := emulate(t.Context(), Kernel{}, "", Options{}.withDefaults())
	if err == nil || !strings.Contains(err.Error(), "exit status 3: no such machine") || string(results) != "half\n" {
		t.Errorf("results %q, %v", results, err)
	}
}

// TestEmulateIsBounded: a guest that hangs ends with the context, and one that prints without end ends by itself.
func TestEmulateIsBounded(t *testing.T) {
	emulator(t, `echo before > /dev/fd/4; exec sleep 600`)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, _, err := emulate(ctx, Kernel{}, "", Options{}.withDefaults())
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hangs: %v", err)
	}
	emulator(t, `exec yes > /dev/fd/3`)
	console, _, err := emulate(t.Context(), Kernel{}, "", Options{}.withDefaults())
	if !errors.Is(err, errTooMuch) || len(console) != maxPort {
		t.Errorf("prints without end: %d bytes, %v", len(console), err)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("it took %v", took)
	}
}

func TestTail(t *testing.T) {
	for _, c := range []struct {
		text, want string
		n          int
	}{{"", "", 3}, {"a", "a", 1}, {"a\nb\r\n", "b", 1}, {"a\nb\nc\n\n", "b\nc", 2}, {"a\nb", "a\nb", 5}} {
		if got := string(tail([]byte(c.text), c.n)); got != c.want {
			t.Errorf("last %d of %q: %q", c.n, c.text, got)
		}
	}
	if got := lastLine("a\n b \n\n"); got != ": b" {
		t.Error(got)
	}
}

// TestBase: what the guest's tests take for granted is in the lists.
func TestBase(t *testing.T) {
	for _, m := range []string{"wireguard", "tun", "veth", "sch_ingress", "cls_bpf", "nf_tables"} {
		if !slices.Contains(BaseModules(), m) {
			t.Errorf("module %s is missing", m)
		}
	}
	for _, p := range []string{"ip", "nft", "nsenter", "ping"} {
		if !slices.Contains(BasePrograms(), p) {
			t.Errorf("program %s is missing", p)
		}
	}
}
