// Command signet-coordinator is the certificate authority, the registry and the policy authority of a Signet mesh.
//
// This file owns the process: signals and exit codes. The commands are in commands.go; what they do is in package
// coordinator.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// The first signal stops in order; after that a second one ends the process at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	code := run(ctx, process{args: os.Args[1:], out: os.Stdout, err: os.Stderr, getenv: os.Getenv, hup: hup})
	stop()
	os.Exit(code)
}
