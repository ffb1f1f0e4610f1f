package dataplane

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/dataplane/link"
	"github.com/signet-overlay/signet/dataplane/tunnel"
)

// settle is how long changes gather before the host is looked at: network managers make several at once.
const settle = 50 * time.Millisecond

// aheadEvery is the share of looks that ask for programs that others put before ours: every three seconds.
const aheadEvery = 4

// hookTick is how often the judge's hooks are looked at, because nothing tells when another tool detaches one: what is
// missing is back within a second. A look is some microseconds for each hook (BenchmarkLook).
const hookTick = 750 * time.Millisecond

// Repair watches devices, addresses, routes, filters and the judge's hooks and puts back what others removed, the tunnel's
// device too, until ctx ends. Each repair is reported by a sentence that names what was missing, where, and what stood
// in its place.
func (d *Dataplane) Repair(ctx context.Context, report func(string)) error {
	changed := make(chan struct{}, 1) // one signal stands for any number of changes
	underlay := make(chan struct{}, 1)
	w, err := link.Watch(ctx, func(e link.Event) {
		wake(changed)
		if e.Kind != link.LinkChanged && e.Kind != link.FilterChanged && !e.Ours {
			wake(underlay)
		}
	})
	if err != nil {
		return fmt.Errorf("watch devices: %w", err)
	}
	defer w.Close()
	hooks := time.NewTicker(hookTick)
	defer hooks.Stop()
	gone := d.tunnel().Done()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-gone:
			gone = d.deviceGone(ctx, report)
			continue
		case <-w.Done():
			return w.Close()
		case <-hooks.C:
			if gone == nil { // it could not be made anew
				gone = d.deviceGone(ctx, report)
			}
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
			d.underlayChanged(ctx, report)
		default:
		}
	}
}

func (d *Dataplane) underlayChanged(ctx context.Context, report func(string)) {
	err := d.tunnel().RoutesChanged(ctx)
	if errors.Is(err, tunnel.ErrClosed) {
		return // the device went with it, which is told by itself
	}
	if err != nil {
		report("the tunnel could not look for new routes: " + err.Error())
	}
}

// deviceGone makes the tunnel's device anew. It returns what tells that the new one is gone, or nil when there is none.
func (d *Dataplane) deviceGone(ctx context.Context, report func(string)) <-chan struct{} {
	if ctx.Err() != nil {
		return nil
	}
	err := d.renewTunnel(ctx)
	d.tell(report, "tunnel", err, "device "+d.cfg.Interface+" was removed by somebody else and cannot be made anew, so that nothing passes")
	if err != nil {
		return nil
	}
	report("device " + d.cfg.Interface + " was removed by somebody else and was made anew")
	return d.tunnel().Done()
}

// renewTunnel puts another engine, on a new device, into the place of one whose device is gone. What stands by itself, the
// routes that catch overlay traffic and the hooks at the cgroup, has denied everything meanwhile. The order is that of a
// start: the judge is attached before the device is up.
func (d *Dataplane) renewTunnel(ctx context.Context) error {
	d.mu.Lock() // peers wait, and reach the new engine
	defer d.mu.Unlock()
	d.host.mu.Lock()
	defer d.host.mu.Unlock()
	old := d.tunnel()
	if err := old.Close(); err != nil {
		d.cfg.Logger.Debug("close the engine of a device that is gone", "error", err)
	}
	err := d.openTunnel(ctx)
	if err == nil {
		err = d.fillTunnel(ctx)
	}
	if next := d.tunnel(); err != nil && next != old {
		err = errors.Join(err, next.Close())
	}
	return err
}

// fillTunnel tells a new engine and device what the one before knew.
func (d *Dataplane) fillTunnel(ctx context.Context) error {
	for _, p := range d.peers {
		if err := d.tunnel().Update(ctx, p); err != nil {
			return err
		}
	}
	if d.host.spec.Interface == "" {
		return nil
	}
	return d.applyHost(ctx, d.host.spec)
}

// tell reports an error once, and not with every look; and again after it was gone.
func (d *Dataplane) tell(report func(string), about string, err error, what string) {
	if d.told == nil {
		d.told = map[string]string{}
	}
	if err == nil {
		delete(d.told, about)
		return
	}
	if text := err.Error(); d.told[about] != text {
		d.told[about] = text
		report(what + ": " + text)
	}
}

// repairHooks attaches again what others detached. What cannot be attached is told once, not with every tick.
func (d *Dataplane) repairHooks(report func(string)) {
	repaired, err := d.judge.Ensure()
	for _, r := range repaired {
		report(fmt.Sprintf("the judge's hook %s at %s was attached again: %v", r.Hook, r.Where, r.Cause))
	}
	if errors.Is(err, enforce.ErrClosed) {
		return
	}
	d.tell(report, "hooks", err, "a hook of the judge is missing and cannot be attached")
	// To ask every device for others' programs costs more than to look at our own, and mends nothing.
	if d.looks++; d.looks%aheadEvery != 1 {
		return
	}
	var ahead error
	if others := d.judge.Ahead(); len(others) > 0 {
		ahead = errors.New(strings.Join(others, "; "))
	}
	d.tell(report, "ahead", ahead, "packets can pass unjudged")
}

// repairOnce guards new devices and makes the device's addresses and routes right again. The hooks come first, since
// guarding would put a guard back without a word.
func (d *Dataplane) repairOnce(ctx context.Context, report func(string)) {
	d.repairHooks(report)
	d.tell(report, "guard", d.guardLinks(), "a device is not guarded")
	d.refreshHandshakeGuard(report)
	d.host.mu.Lock()
	defer d.host.mu.Unlock()
	if d.host.spec.Interface == "" {
		return
	}
	select {
	case <-d.tunnel().Done():
		return // with its device gone there is nothing to put right; deviceGone does
	default:
	}
	differs, err := link.Differences(ctx, d.host.spec)
	if err == nil {
		err = d.applyHost(ctx, d.host.spec)
	}
	if errors.Is(err, link.ErrNoInterface) || errors.Is(err, tunnel.ErrClosed) {
		return
	}
	what := "addresses and routes of " + d.cfg.Interface + " could not be put back"
	if len(differs) > 0 {
		what += " (" + strings.Join(differs, "; ") + ")"
	}
	d.tell(report, "host", err, what)
	if err != nil {
		return
	}
	for _, difference := range differs {
		report(difference + "; it was put right")
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
