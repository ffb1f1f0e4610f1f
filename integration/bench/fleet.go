package main

import (
	"context"
	"fmt"
	"time"

	"github.com/signet-overlay/signet/integration/scenario"
)

const (
	fleetSize = 20
	// idleWatch is how long the idle fleet is watched.
	idleWatch = 20 * time.Second
)

// idle measures convergence, memory and CPU of a fleet that has nothing to do.
func (b *bench) idle(ctx context.Context) error {
	f, err := scenario.StartFleet(ctx, scenario.Options{Prefix: "benchidle", Dir: b.dir, Bin: b.bin}, fleetSize)
	if err != nil {
		return err
	}
	defer f.Close()
	b.atMost("fleet=20/converge", f.Converged.Seconds(), "s", 20)
	// Handshakes and the first garbage collections are behind after a pause.
	if err := pause(ctx, 5*time.Second); err != nil {
		return err
	}
	before, err := fleetCPU(f)
	if err != nil {
		return err
	}
	if err := pause(ctx, idleWatch); err != nil {
		return err
	}
	after, err := fleetCPU(f)
	if err != nil {
		return err
	}
	b.atMost("fleet=20/idle/cpu", (after-before)/idleWatch.Seconds()*100, "% of a core", 5)
	worst := 0.0
	for _, a := range f.Agents {
		rss, err := rssMiB(a.Proc.PID())
		if err != nil {
			return err
		}
		worst = max(worst, rss)
	}
	b.atMost("agent/idle/rss", worst, "MiB", 40)
	return nil
}

func fleetCPU(f *scenario.Fleet) (float64, error) {
	sum := 0.0
	for _, a := range f.Agents {
		s, err := cpuSeconds(a.Proc.PID())
		if err != nil {
			return 0, err
		}
		sum += s
	}
	return sum, nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait: %w", ctx.Err())
	}
}
