package agent

import (
	"context"
	"time"
)

const (
	clockTick = 5 * time.Second
	// clockJump is how far the wall clock may drift from the running time before everything is looked at again.
	clockJump = 2 * time.Second
)

// watchClock calls jumped when the wall clock was set, or when the host slept: certificates, Bindings and the lease
// end by the wall clock, and timers run by another.
func watchClock(ctx context.Context, jumped func(by time.Duration)) error {
	t := time.NewTicker(clockTick)
	defer t.Stop()
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		now := time.Now()
		if by := drift(last, now); by.Abs() > clockJump {
			jumped(by)
		}
		last = now
	}
}

// drift is how much further the wall clock went than the monotonic one, between two readings that hold both.
func drift(last, now time.Time) time.Duration {
	return now.Round(0).Sub(last.Round(0)) - now.Sub(last)
}
