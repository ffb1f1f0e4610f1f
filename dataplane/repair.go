package dataplane

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/dataplane/link"
)

// settle is how long changes gather before the host is looked at: network managers make several at once.
const settle = 50 * time.Millisecond

// hookTick is how often the judge's hooks are looked at: nothing tells when another tool detaches one.
const hookTick = 5 * time.Second

// errDeviceGone ends Repair: only a new start makes the device anew.
var errDeviceGone = errors.New("the tunnel's device was removed by somebody else")

// Repair watches devices, addresses, routes and the judge's hooks and puts back what others removed, until ctx ends. Each repair is
// reported by a sentence that names what was missing.
func (d *Dataplane) Repair(ctx context.Context, report func(string)) error {
	changed := make(chan struct{}, 1) // one signal stands for any number of changes
	underlay := make(chan struct{}, 1)
	w, err := link.Watch(ctx, func(e link.Event) {
		wake(changed)
		if e.Kind != link.LinkChanged && !e.Ours {
			wake(underlay)
		}
	})
	if err != nil {
		return fmt.Errorf("watch devices: %w", err)
	}
	defer w.Close()
	hooks := time.NewTicker(hookTick)
	defer hooks.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-d.tunnel.Done():
			return errDeviceGone
		case <-w.Done():
			return w.Close()
		case <-hooks.C:
			d.repairHooks(report)
			continue
		case <-changed:
		}
		if err := sleep(ctx, settle); err != nil {
			return err
		}
		d.repairOnce(ctx, report)
		select {
		case <-underlay:
			if err := d.tunnel.RoutesChanged(ctx); err != nil {
				report("the tunnel could not look for new routes: " + err.Error())
			}
		default:
		}
	}
}

// repairHooks attaches again what others detached. What cannot be attached is told once, not with every tick.
func (d *Dataplane) repairHooks(report func(string)) {
	repaired, err := d.judge.Ensure()
	for _, name := range repaired {
		report("the judge's hook " + name + " was missing and was attached again")
	}
	told := d.hooks
	d.hooks = ""
	if err == nil || errors.Is(err, enforce.ErrClosed) {
		return
	}
	d.hooks = err.Error()
	if d.hooks != told {
		report("a hook of the judge is missing and cannot be attached: " + d.hooks)
	}
}

// repairOnce guards new devices and makes the device's addresses and routes right again. The hooks come first, since
// guarding would put a guard back without a word.
func (d *Dataplane) repairOnce(ctx context.Context, report func(string)) {
	d.repairHooks(report)
	if err := d.guardLinks(); err != nil {
		report("a device is not guarded: " + err.Error())
	}
	d.host.mu.Lock()
	defer d.host.mu.Unlock()
	if d.host.spec.Interface == "" {
		return
	}
	if err := d.applyHost(ctx, d.host.spec); err != nil {
		report("addresses and routes of " + d.cfg.Interface + " could not be put back: " + err.Error())
	}
}

func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
