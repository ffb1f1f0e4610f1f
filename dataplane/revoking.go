package dataplane

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"time"

	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/dataplane/revoke"
)

const (
	// revokeGap is the least time between two sweeps of all sockets, however often the policy changes.
	revokeGap = 100 * time.Millisecond
	// revokeSettled is how long a view must have stood before its own ends are looked for, which takes a walk over it.
	revokeSettled = time.Second
	// revokeLag is how much later than the wall clock says the kernel may see the end of a rule.
	revokeLag = 50 * time.Millisecond
	// revokeEvery is when sockets are swept though nothing has changed.
	revokeEvery = 30 * time.Second
)

// revoking ends the sockets of flows that were taken back. The judge has stopped their packets already; this is so that
// programs learn at once, and not by a timeout.
type revoking struct {
	revoker *revoke.Revoker
	wake    chan struct{} // holds one signal: more of them mean the same
	cancel  context.CancelFunc
	done    sync.WaitGroup
}

// startRevoking opens the revoker for the judge's maps, which must be open.
func (d *Dataplane) startRevoking() error {
	r, err := revoke.Open(revoke.Config{
		Maps: filepath.Join(d.cfg.BPFFS, enforce.ABI, "maps"), Overlay4: d.cfg.Overlay4, Overlay6: d.cfg.Overlay6,
		Judge: func(s revoke.Socket) bool { return revoke.Allowed(d.judge.View(), s, time.Now()) },
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background()) // its life ends with Close, not with the opening call
	d.revoking = &revoking{revoker: r, wake: make(chan struct{}, 1), cancel: cancel}
	d.revoking.done.Go(func() { d.routineRevoke(ctx) })
	return nil
}

// close ends the routine before the judge's maps are closed.
func (r *revoking) close() error {
	if r == nil {
		return nil
	}
	r.cancel()
	r.done.Wait()
	return r.revoker.Close()
}

// changed says that another view is in force.
func (r *revoking) changed() {
	if r != nil {
		wake(r.wake)
	}
}

// why says what programs see when their flows are taken back and nothing can end their sockets; empty when it can.
func (r *revoking) why() string {
	switch {
	case r == nil:
		return "not started"
	case r.revoker.Kind() == revoke.KindNone:
		return r.revoker.Why()
	}
	return ""
}

// routineRevoke sweeps soon after each change, when a view by itself takes something back, and now and then.
func (d *Dataplane) routineRevoke(ctx context.Context) {
	timer := time.NewTimer(revokeEvery)
	defer timer.Stop()
	var swept time.Time
	look := false // the view's own ends are not known yet
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.revoking.wake:
			if err := sleep(ctx, time.Until(swept.Add(revokeGap))); err != nil {
				return
			}
			look = true
		case <-timer.C:
		}
		d.sweepSockets(ctx)
		swept = time.Now()
		next := revokeEvery
		if look && len(d.revoking.wake) == 0 {
			next = revokeSettled
			look = false
		} else if due := revoke.Due(d.judge.View(), swept); !due.IsZero() {
			next = min(next, time.Until(due)+revokeLag)
		}
		timer.Reset(max(next, revokeGap))
	}
}

func (d *Dataplane) sweepSockets(ctx context.Context) {
	n, err := d.revoking.revoker.Sweep(ctx)
	if err != nil && !errors.Is(err, context.Canceled) {
		d.cfg.Logger.Warn("sockets of flows that were taken back were not ended", "error", err)
	}
	if n > 0 {
		d.cfg.Logger.Info("sockets of flows that were taken back were ended", "sockets", n)
	}
}
