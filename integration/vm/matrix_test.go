package vm

import (
	"cmp"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What "make test-vm" sets; the last three narrow a run by hand.
const (
	optInEnv    = "SIGNET_VM"          // the absolute directory for summary and consoles; without it no guest is booted
	kernelsEnv  = "SIGNET_VM_KERNELS"  // series, instead of matrixKernels
	packagesEnv = "SIGNET_VM_PACKAGES" // package paths, instead of matrixPackages
	runEnv      = "SIGNET_VM_RUN"      // -test.run of every binary
)

// matrixKernels stands for what hosts run: 6.1 is the oldest that is supported and has neither tcx nor netkit, 6.12 is
// the newest that Debian 12 has.
var matrixKernels = []string{"6.1", "6.12"}

// matrixPackages are the packages whose tests meet the kernel. The first one looks at the guest itself.
var matrixPackages = []string{
	"integration/vm/smoke",
	"bpf",
	"dataplane/link",
	"dataplane/tunnel",
	"dataplane/enforce",
	"dataplane",
	"integration/netlab",
}

const (
	// matrixCPUs shows races between processors; on a machine with fewer the guest is only slower.
	matrixCPUs = 2
	// matrixMemory in MiB holds the image twice while the kernel unpacks it.
	matrixMemory = 1536
	// matrixLimit of one binary: the slowest takes a quarter of it, and more when others share the machine.
	matrixLimit = 20 * time.Minute
)

// TestMatrix boots each kernel once and shows every test of every package as a subtest
// TestMatrix/KERNEL/PACKAGE/TEST, with the output of those that failed and the reason of those that were skipped.
func TestMatrix(t *testing.T) {
	out := os.Getenv(optInEnv)
	if out == "" {
		t.Skip("boots other kernels in guests: run by make test-vm")
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		t.Fatal(err)
	}
	cache, err := Cache()
	if err != nil {
		t.Fatal(err)
	}
	binaries, err := Build(t.Context(), "../..", t.TempDir(), words(packagesEnv, matrixPackages)...)
	if err != nil {
		t.Fatal(err)
	}
	if pattern := os.Getenv(runEnv); pattern != "" {
		for i := range binaries {
			binaries[i].Args = append(binaries[i].Args, "-test.run="+pattern)
		}
	}
	img := Image{Binaries: binaries, Programs: BasePrograms(), Modules: BaseModules()}
	var lines, totals []string
	for _, series := range words(kernelsEnv, matrixKernels) {
		t.Run(series, func(t *testing.T) {
			report, err := matrix(t, cache, series, out, img)
			if report == nil {
				totals = append(totals, series+": not run")
			} else {
				lines = append(lines, report.String())
				totals = append(totals, report.Summary())
			}
			if err != nil {
				t.Fatal(err)
			}
		})
	}
	text := strings.Join(append(lines, "vm: "+strings.Join(totals, "; ")), "\n") + "\n"
	if err := os.WriteFile(filepath.Join(out, "summary"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func words(env string, otherwise []string) []string {
	if w := strings.Fields(os.Getenv(env)); len(w) > 0 {
		return w
	}
	return otherwise
}

// matrix runs one guest, shows what it said, and keeps all that it said in the directory out.
func matrix(t *testing.T, cache, series, out string, img Image) (*Report, error) {
	kernel, err := Fetch(t.Context(), cache, series)
	if err != nil {
		return nil, err
	}
	// The guest powers off by itself, or Run ends it: go test's own limit must not cut off what is known by then.
	ctx := t.Context()
	if end, ok := t.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, end.Add(-30*time.Second))
		defer cancel()
	}
	o := Options{CPUs: matrixCPUs, Memory: matrixMemory, Limit: matrixLimit}
	o.Console, o.Output = keep(t, out, "console-"+series), keep(t, out, "output-"+series)
	report, err := Run(ctx, kernel, img, o)
	if report != nil {
		for _, p := range report.Packages {
			t.Run(p.Name, func(t *testing.T) { show(t, p) })
		}
	}
	return report, err
}

// keep makes a file of what a guest says, to be watched while it runs and read after it failed.
func keep(t *testing.T, dir, name string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// show makes subtests of a package's tests.
func show(t *testing.T, p Package) {
	if !p.OK() && p.count(Failed) == 0 {
		t.Errorf("%s\n%s", p, p.Output)
	}
	showBelow(t, p.Tests, "")
}

// showBelow makes subtests of the tests whose name is the prefix and one name more. A name may hold any character but
// a blank; a subtest's parent is what stands before a slash and is itself a test.
func showBelow(t *testing.T, tests []Test, prefix string) {
	for i, test := range tests {
		name, ok := strings.CutPrefix(test.Name, prefix)
		if !ok || name == "" || parent(tests[:i], test.Name) != strings.TrimSuffix(prefix, "/") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			switch test.Outcome {
			case Failed:
				t.Error("in the guest:\n" + strings.Join(said(test), "\n"))
			case Unfinished:
				t.Error("in the guest, not finished:\n" + strings.Join(said(test), "\n"))
			case Skipped:
				t.Skip(reason(test))
			}
			showBelow(t, tests, test.Name+"/")
		})
	}
}

// parent is the longest name among earlier tests that, with a slash, begins the name.
func parent(earlier []Test, name string) string {
	longest := ""
	for _, e := range earlier {
		if len(e.Name) > len(longest) && strings.HasPrefix(name, e.Name+"/") {
			longest = e.Name
		}
	}
	return longest
}

// said is what a test printed, line by line and without what go test adds around it.
func said(test Test) []string {
	var out []string
	for line := range strings.Lines(test.Output) {
		word := strings.TrimSpace(line)
		if word != "" && !strings.HasPrefix(word, "=== ") && !strings.HasPrefix(word, "--- ") {
			out = append(out, strings.TrimRight(line, "\n"))
		}
	}
	return out
}

// reason is why a test was skipped, without the place in the source.
func reason(test Test) string {
	var out []string
	for _, line := range said(test) {
		line = strings.TrimSpace(line)
		if at, rest, ok := strings.Cut(line, ": "); ok && strings.Contains(at, ".go:") {
			line = rest
		}
		out = append(out, line)
	}
	return cmp.Or(strings.Join(out, " "), "no reason given")
}
