package agent

import (
	"context"
	"runtime/debug"
	"time"
)

// trimAfter is how long nothing may be taken in before memory is given back: a start, or a mesh that comes up, is a
// burst of snapshots.
const trimAfter = 3 * time.Second

// took notes that a snapshot was taken in.
func (a *Agent) took() {
	select {
	case a.grown <- struct{}{}:
	default:
	}
}

// trimMemory gives back what taking in a snapshot needed, once it is over. To parse, verify and compile one takes
// several times of what is kept, and the Go runtime alone would hold that for minutes: an agent shares its host with
// what the host is for.
func (a *Agent) trimMemory(ctx context.Context, free func()) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-a.grown:
		}
		if err := a.quiet(ctx); err != nil {
			return err
		}
		free()
	}
}

// quiet waits until nothing was taken in for trimAfter.
func (a *Agent) quiet(ctx context.Context) error {
	timer := time.NewTimer(trimAfter)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-a.grown:
			timer.Reset(trimAfter)
		case <-timer.C:
			return nil
		}
	}
}

// freeMemory collects and returns everything that is free to the kernel, at once.
func freeMemory() { debug.FreeOSMemory() }
