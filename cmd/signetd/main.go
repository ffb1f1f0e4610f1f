// Command signetd is the agent of one host.
//
// It reads flags and the configuration, and turns signals into orders; everything else is package agent.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/signet-overlay/signet/agent"
	"github.com/signet-overlay/signet/internal/task"
	"github.com/signet-overlay/signet/internal/version"
)

const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("signetd", flag.ContinueOnError)
	flags.SetOutput(stderr)
	path := flags.String("config", agent.DefaultConfigFile, "configuration `FILE`")
	showVersion := flags.Bool("version", false, "print the version and exit")
	check := flags.Bool("check-config", false, "check the configuration and exit")
	verbose := flags.Bool("verbose", false, "log details")
	flags.Usage = func() {
		fmt.Fprintf(stderr, "signetd is the Signet agent of one host.\n\nUsage: signetd [--config FILE] [--check-config] [--verbose] [--version]\n\n")
		flags.PrintDefaults()
	}
	switch err := flags.Parse(args); {
	case err == flag.ErrHelp:
		return exitOK
	case err != nil:
		return exitUsage
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "signetd: unexpected argument %q\nhint: signetd --help\n", flags.Arg(0))
		return exitUsage
	}
	if *showVersion {
		fmt.Fprintln(stdout, version.Version)
		return exitOK
	}
	cfg, err := agent.LoadConfig(*path)
	if err != nil {
		return fail(stderr, err)
	}
	if *check {
		fmt.Fprintf(stdout, "%s is correct\n", *path)
		return exitOK
	}
	if err := serve(cfg, *path, logger(stderr, *verbose)); err != nil {
		return fail(stderr, err)
	}
	return exitOK
}

// gcPercent lets the heap grow by half between collections. An agent's heap is small and rarely changes, so that this
// costs next to no time, and the host has better use for the memory. There is no memory limit: beyond it, a large mesh
// would collect all the time.
const gcPercent = 50

// tuneMemory leaves an operator's GOGC as it is.
func tuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}

func serve(cfg agent.Config, path string, log *slog.Logger) error {
	tuneMemory()
	a, err := agent.New(cfg, agent.RealDeps(), log)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)
	g := task.New(ctx)
	g.Go("signetd", func(ctx context.Context) error {
		if err := a.Run(ctx); err != nil {
			return err
		}
		g.Stop(nil)
		return nil
	})
	g.Go("reload", func(ctx context.Context) error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-reload:
			}
			next, err := agent.LoadConfig(path)
			if err == nil {
				err = a.Reload(next)
			}
			if err != nil {
				log.Error("configuration not reloaded, the old one stays", "error", err)
			}
		}
	})
	return g.Wait()
}

// logger leaves the time to journald where that collects the output.
func logger(w io.Writer, verbose bool) *slog.Logger {
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if verbose {
		opts.Level = slog.LevelDebug
	}
	if os.Getenv("JOURNAL_STREAM") != "" {
		opts.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

func fail(w io.Writer, err error) int {
	fmt.Fprintf(w, "signetd: %v\n", err)
	return exitError
}
