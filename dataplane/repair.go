package dataplane

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/signet-overlay/signet/dataplane/link"
)

// settle is how long changes gather before the host is looked at: network managers make several at once.
const settle = 50 * time.Millisecond

// errDeviceGone ends Repair: only a new start makes the device anew.
var errDeviceGone = errors.New("the tunnel's device was removed by somebody else")

// Repair watches devices, addresses and routes and puts back what others removed, until ctx ends. Each repair is
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
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-d.tunnel.Done():
			return errDeviceGone
		case <-w.Done():
			return w.Close()
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

// repairOnce guards new devices and makes the device's addresses and routes right again.
func (d *Dataplane) repairOnce(ctx context.Context, report func(string)) {
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
