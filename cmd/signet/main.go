// Command signet is the operator's and developer's tool: it asks the agent of this host, and the coordinator's web API.
//
// This file owns the process: signals and exit codes. Start at root.go for the tree of commands; local.go asks the
// agent, node.go, workload.go, policy.go and explain.go ask the API, and unbuilt.go refuses by name what the contract
// promises and this version lacks.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, environment{Args: os.Args[1:], In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Getenv: os.Getenv})
	stop()
	os.Exit(code)
}
