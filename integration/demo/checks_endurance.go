package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/scenario"
)

// backWithin is how soon a restarted agent's traffic has to flow again, coordinator or not.
const backWithin = 2 * time.Second

func (c *checker) query(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err := c.d.PSQL(limited, c.d.App, scenario.APIServer, c.pg4.String(), "select 1").Output()
	return err
}

func (c *checker) coordinatorAway(ctx context.Context) (err error) {
	session, err := c.watchPSQL(ctx)
	if err != nil {
		return err
	}
	defer stop(session)
	if err := c.d.KillCoordinator(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.d.ServeCoordinator(ctx)) }()
	ticks := strings.Count(session.Text(), "tick")
	if err := eventually(ctx, 3*time.Second, func() error {
		if strings.Count(session.Text(), "tick") < ticks+20 {
			return errors.New("the live session stands still")
		}
		return nil
	}); err != nil {
		return err
	}
	if err := c.d.App.KillAgent(); err != nil {
		return err
	}
	if err := c.d.App.StartAgent(ctx); err != nil {
		return err
	}
	if err := eventually(ctx, backWithin, func() error { return c.query(ctx) }); err != nil {
		return fmt.Errorf("agent restarted without a coordinator: %w\n%s", err, c.d.App.Proc.Text())
	}
	return nil
}

// tampered changes one byte of the sealed snapshot while the coordinator is away.
func (c *checker) tampered(ctx context.Context) error {
	if err := c.d.App.WaitConnected(ctx); err != nil {
		return err
	}
	if err := c.d.KillCoordinator(); err != nil {
		return err
	}
	if err := c.d.App.KillAgent(); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(c.d.App.StateDir(), "*snapshot*"))
	if err != nil || len(files) != 1 {
		return fmt.Errorf("snapshot files %v: %w", files, err)
	}
	good, err := os.ReadFile(files[0])
	if err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	bad := append([]byte(nil), good...)
	bad[len(bad)/2] ^= 1
	if err := os.WriteFile(files[0], bad, 0o600); err != nil {
		return fmt.Errorf("edit state: %w", err)
	}
	if err := c.d.App.StartAgent(ctx); err != nil {
		return err
	}
	if err := c.d.App.WaitStatus(ctx, "refuse its snapshot", func(s scenario.Status) bool {
		return strings.Contains(strings.Join(s.Warnings, " "), "snapshot")
	}); err != nil {
		return err
	}
	if err := c.query(ctx); err == nil {
		return errors.New("traffic passes on a snapshot that was edited")
	}
	// With the coordinator back the host heals by itself.
	if err := c.d.ServeCoordinator(ctx); err != nil {
		return err
	}
	if err := c.d.App.WaitConnected(ctx); err != nil {
		return err
	}
	return eventually(ctx, 10*time.Second, func() error { return c.query(ctx) })
}

// killed kills the receiver's agent again and again while forbidden senders keep on: an identity without a rule and a
// stranger on the sender's host, and plaintext from the underlay. demo-check runs a few cycles; the test of the same
// name in integration/endurance runs a minute, with a rogue that has valid keys.
func (c *checker) killed(ctx context.Context) error {
	// The allowed flow is the database; the forbidden one goes to another port of the same workload, where it would be
	// seen at once.
	forbidden := netip.AddrPortFrom(c.pg4, 7777)
	server, err := c.serve(ctx, c.d.Data, scenario.Postgres, "udp", forbidden)
	if err != nil {
		return err
	}
	defer stop(server)
	for _, from := range []struct {
		a      *scenario.Agent
		cgroup string
	}{{c.d.App, scenario.Webhook}, {c.d.App, scenario.APIServer}, {c.d.Data, scenario.Stranger}, {c.d.Agent("outsider"), ""}} {
		cmd := c.d.Probe(ctx, from.a, from.cgroup, "flood", "udp", forbidden.String(), "1ms")
		if err := cmd.Start(); err != nil {
			return err
		}
		defer stop(cmd)
	}
	for cycle := range 5 {
		if err := c.d.Data.KillAgent(); err != nil {
			return err
		}
		if err := c.d.Data.StartAgent(ctx); err != nil {
			return err
		}
		if err := eventually(ctx, 2*backWithin, func() error { return c.query(ctx) }); err != nil {
			return fmt.Errorf("cycle %d: the allowed flow did not come back: %w", cycle, err)
		}
	}
	if strings.Contains(server.Text(), "got") {
		return fmt.Errorf("forbidden packets were delivered: %.300s", server.Text())
	}
	return nil
}

// canary moves a text over the mesh and looks for it, and for anything unexpected, on the underlay.
func (c *checker) canary(ctx context.Context) error {
	const canary = "SIGNET-CANARY-7f3a9c51"
	var captures []*netlab.Capture
	for _, a := range []*scenario.Agent{c.d.App, c.d.Data} {
		capture, err := a.Host.Capture(ctx, a.If, []byte(canary))
		if err != nil {
			return err
		}
		captures = append(captures, capture)
	}
	inside, err := c.d.App.Host.Capture(ctx, "signet0", []byte(canary))
	if err != nil {
		return err
	}
	out, err := c.d.PSQL(ctx, c.d.App, scenario.APIServer, c.pg4.String(), "select repeat('"+canary+"', 50000)").Output()
	if err != nil || strings.Count(out, canary) != 50000 {
		return fmt.Errorf("the transfer itself failed: %w", err)
	}
	if rec := inside.Stop(); len(rec.Seen) == 0 {
		return errors.New("the canary was not seen inside the tunnel, so its absence outside proves nothing")
	}
	coordinator := c.d.CoordinatorAddr()
	for _, capture := range captures {
		rec := capture.Stop()
		if _, found, err := rec.Contains([]byte(canary)); found || err != nil {
			return fmt.Errorf("the canary is on the underlay, or the capture has holes: %v %w", found, err)
		}
		strange := rec.Except(func(f netlab.Flow) bool {
			toCoordinator := f.HasPort(6, coordinator.Port()) && (f.Src == coordinator.Addr() || f.Dst == coordinator.Addr())
			return f.Housekeeping() || f.HasPort(17, 51820) || toCoordinator
		})
		if len(strange) > 0 {
			return fmt.Errorf("something else is on the underlay: %v", strange)
		}
	}
	return nil
}
