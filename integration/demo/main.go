// Command demo runs Signet's main job on one machine: a coordinator and three hosts made of namespaces, PostgreSQL, and
// the programs that may and may not reach it.
//
//	demo          leaves it running until Ctrl-C and prints what to try
//	demo -check   asserts every promised outcome, slice by slice, and stops
//
// The promises are in checks*.go, one function each.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/scenario"
)

// checkLimit bounds the whole of demo-check.
const checkLimit = 5 * time.Minute

func main() {
	check := flag.Bool("check", false, "assert every promised outcome and stop")
	upto := flag.Int("upto", lastSlice, "with -check: the last slice to assert")
	bin := flag.String("bin", "bin", "folder with the built programs")
	flag.Parse()
	if missing := netlab.Missing(); len(missing) > 0 {
		fmt.Fprintf(os.Stderr, "the demo makes hosts of network namespaces and needs %v; run it as root\n", missing)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *check, *upto, *bin); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, check bool, upto int, bin string) (err error) {
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "signet-demo-")
	if err != nil {
		return fmt.Errorf("make work folder: %w", err)
	}
	defer os.RemoveAll(dir)
	// PostgreSQL runs as its own user and must be able to enter; secrets below have their own modes.
	if err := os.Chmod(dir, 0o755); err != nil {
		return fmt.Errorf("make work folder: %w", err)
	}
	if check {
		limited, cancel := context.WithTimeout(ctx, checkLimit)
		defer cancel()
		ctx = limited
	}
	start := time.Now()
	fmt.Println("starting a coordinator and three hosts …")
	prefix := "demo"
	if check {
		prefix = "democheck"
	}
	d, err := scenario.StartDemo(ctx, scenario.Options{Prefix: prefix, Dir: dir, Bin: bin})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	fmt.Printf("three hosts enrolled and connected after %.1f s\n", time.Since(start).Seconds())
	if check {
		return runChecks(ctx, &checker{d: d}, upto)
	}
	return show(ctx, d)
}

// show brings the demo to the state that people try things in, and waits.
func show(ctx context.Context, d *scenario.Demo) error {
	if err := d.StartPostgres(ctx); err != nil {
		return err
	}
	if err := d.ApplyPolicy(ctx, scenario.Workloads+scenario.Rules); err != nil {
		return err
	}
	v4, _, err := d.Data.Address(ctx, "data/postgres")
	if err != nil {
		return err
	}
	psql := func(cgroup string) string {
		return d.App.Host.Enter(cgroup, "psql", "-h", v4.String(), "-U", "postgres", "-c", "select version()")
	}
	fmt.Printf(`
PostgreSQL is data/postgres on %s, at overlay address %v. Try, in another terminal:

  as app/api-server, which a rule allows:
    %s
  as app/webhook, on the same host, which no rule allows:
    %s
  from a process without an identity:
    %s
  why not:
    %s
  what the host thinks of itself:
    %s

Ctrl-C ends it and removes everything.
`, d.Data.Host.Name(), v4, psql(scenario.APIServer), psql(scenario.Webhook), psql(scenario.Stranger),
		d.AdminCommand("explain", "--from", "app/webhook", "--to", "data/postgres", "--port", "tcp/5432"),
		d.SignetCommand(d.App, "status"))
	<-ctx.Done()
	return nil
}
