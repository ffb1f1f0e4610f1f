// Command bench measures Signet beside its peers, in one run, and prints one JSON line for each figure:
//
//	{"name":"tcp/entries=10/ratio","value":0.99,"unit":"x"}
//
// A figure that is a promise carries its bound and whether it holds; the command fails when one does not. Throughput is
// compared in interleaved pairs with wireguard-go as it is, between the same namespaces.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/signet-overlay/signet/integration/netlab"
)

// figure is one line of output.
type figure struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	Bound string  `json:"bound,omitempty"` // "<= 80", ">= 0.95"
	Holds *bool   `json:"holds,omitempty"`
	Note  string  `json:"note,omitempty"`
}

// bench is one run.
type bench struct {
	dir, bin string
	pairs    int
	seconds  int
	only     string // one of the numbers of entries; empty for all
	failed   []string
}

func main() {
	only := flag.String("only", "", "comma-separated names of benchmarks; empty runs all: judge, tcp, ping, idle, policy, enrol")
	pairs := flag.Int("pairs", 10, "interleaved pairs of each throughput comparison")
	seconds := flag.Int("seconds", 4, "length of one throughput measurement")
	entries := flag.String("entries", "", "measure throughput only at this many policy entries: 10, 100000 or 1000000")
	bin := flag.String("bin", "bin", "folder with the built programs")
	flag.Parse()
	if missing := netlab.Missing(); len(missing) > 0 {
		fmt.Fprintf(os.Stderr, "bench makes hosts of network namespaces and needs %v; run it as root\n", missing)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if flag.Arg(0) == meshVerb {
		h, err := readMeshHost(os.Stdin)
		if err == nil {
			err = h.serve(ctx, os.Stdout)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	if err := run(ctx, *only, *bin, bench{pairs: *pairs, seconds: *seconds, only: *entries}); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only, bin string, b bench) error {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "signet-bench-")
	if err != nil {
		return fmt.Errorf("make work folder: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return fmt.Errorf("make work folder: %w", err)
	}
	b.dir, b.bin = dir, bin
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{{"judge", b.judge}, {"tcp", b.tcp}, {"tcp", b.million}, {"ping", b.ping}, {"idle", b.idle}, {"policy", b.policy}, {"enrol", b.enrol}} {
		if only != "" && !strings.Contains(","+only+",", ","+part.name+",") {
			continue
		}
		b.dir = filepath.Join(dir, part.name) // each leaves a coordinator's folder behind
		if err := os.Mkdir(b.dir, 0o755); err != nil {
			return fmt.Errorf("make work folder: %w", err)
		}
		if err := part.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	if len(b.failed) > 0 {
		return fmt.Errorf("these figures miss their bound: %s", strings.Join(b.failed, ", "))
	}
	return nil
}

// atMost prints a figure that promises to stay at or below its bound.
func (b *bench) atMost(name string, value float64, unit string, bound float64) {
	b.promise(name, value, unit, fmt.Sprintf("<= %g", bound), value <= bound)
}

// atLeast prints a figure that promises to reach its bound.
func (b *bench) atLeast(name string, value float64, unit string, bound float64) {
	b.promise(name, value, unit, fmt.Sprintf(">= %g", bound), value >= bound)
}

func (b *bench) promise(name string, value float64, unit, bound string, holds bool) {
	if !holds {
		b.failed = append(b.failed, name)
	}
	emit(figure{Name: name, Value: value, Unit: unit, Bound: bound, Holds: &holds})
}

// tell prints a figure without a promise.
func (b *bench) tell(name string, value float64, unit string) {
	emit(figure{Name: name, Value: value, Unit: unit})
}

func emit(f figure) {
	line, err := json.Marshal(f)
	if err != nil {
		panic("internal error: " + err.Error())
	}
	fmt.Println(string(line))
}

var errNoSample = errors.New("no sample")
