package tunnel

import (
	"context"
	"fmt"
	"time"

	"github.com/tailscale/wireguard-go/device"

	"github.com/signet-overlay/signet/internal/key"
)

const (
	// lookGap is the least time between two looks at all peers, so that a burst of updates costs a few, not one each.
	lookGap = 20 * time.Millisecond
	// soonGap is how long an event of the engine may wait; what it reports has its own timers of seconds.
	soonGap = time.Second
	// maxInitiations bounds what one look sends; the rest go with the next look. Each costs about 0.1 ms of one core.
	maxInitiations = 64
	// handshakePoll is how often Handshake looks whether its initiation may go, and whether the answer is there.
	handshakePoll = 10 * time.Millisecond
	// reportEvery is the share of those looks that ask the engine about sessions that the peer began.
	reportEvery = 10
)

// routineEndpoints tries peers at their endpoints. Close ends it and waits for it.
func (u *Userspace) routineEndpoints(ctx context.Context) { lookUntil(ctx, u.now, u.soon, u.look) }

// lookUntil calls look when it is due, which look itself says, or when it is woken: at once by wakeNow, within soonGap by
// wakeSoon. It returns when ctx ends.
func lookUntil(ctx context.Context, wakeNow, wakeSoon <-chan struct{}, look func(now time.Time) (wait time.Duration)) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var looked, due time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-wakeNow:
			due = earlier(due, looked.Add(lookGap))
		case <-wakeSoon:
			due = earlier(due, looked.Add(soonGap))
		case <-timer.C:
		}
		now := time.Now()
		if !now.Before(due) {
			wait := look(now)
			looked, due = now, now.Add(min(max(wait, lookGap), soonGap*3600))
		}
		timer.Reset(time.Until(due))
	}
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// look observes all peers, takes the steps that are due, and returns how long nothing will be due.
func (u *Userspace) look(now time.Time) time.Duration {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.table.up {
		return noDeadline
	}
	if _, err := u.observeLocked(now); err != nil {
		u.log.Debug("look at peers", "err", err)
		return rekeyTimeout
	}
	wait, sent := noDeadline, 0
	for k, e := range u.table.peers {
		p, s := next(now, e.path)
		if s.initiate && sent == maxInitiations {
			wait = 0 // e keeps its place and goes with the next look
			continue
		}
		e.path = p
		wait = min(wait, s.wait)
		if s.initiate {
			sent++
			u.initiateLocked(k, e, s)
		}
	}
	return wait
}

// observeLocked brings what is known of the peers up to date.
func (u *Userspace) observeLocked(now time.Time) (report, error) {
	r, err := u.reportLocked()
	if err != nil {
		return r, err
	}
	for k, e := range u.table.peers {
		w, m := r.peers[k], u.events.at(e.peer)
		e.path.heard = u.events.time(m.heard.Load())
		if m.silent.Swap(false) {
			e.path = e.path.quiet(now)
		}
		// A handshake that is newer than the silence ends it, so it is observed last.
		e.path = e.path.observe(now, w.endpoint, w.handshake)
	}
	return r, nil
}

// initiateLocked carries out a step. WireGuard's own retry stays armed: it repeats what was sent here after 5 s, to
// the same endpoint, should nothing be tried before.
func (u *Userspace) initiateLocked(k key.Public, e *entry, s step) {
	if s.set.IsValid() {
		u.bind.move(k, s.set)
	}
	if s.force {
		// The engine sends no initiation within 5 s of another, which is too slow for going through candidates. Ending
		// the session lifts that; there is none that works, or this step would not be.
		e.peer.ExpireCurrentKeypairs()
	}
	if err := e.peer.SendHandshakeInitiation(false); err != nil {
		u.log.Debug("initiate", "peer", k.Short(), "endpoint", e.path.endpoint, "err", err)
	}
}

// Handshake makes a new handshake with a peer and returns how long it took on the wire. A live session is not
// disturbed; because WireGuard sends no two initiations within 5 s, the call then may wait that long before it begins,
// and ctx should allow 10 s. Without an answer it fails with ErrNoHandshake.
func (u *Userspace) Handshake(ctx context.Context, k key.Public) (time.Duration, error) {
	start := u.events.now()
	e, live, err := u.beginHandshake(ctx, k)
	if err != nil {
		return 0, err
	}
	m := u.events.at(e)
	tick := time.NewTicker(handshakePoll)
	defer tick.Stop()
	for n := 1; ; n++ {
		sent, answered := m.sent.Load(), m.answered.Load()
		if answered >= start && answered >= sent {
			return time.Duration(answered - sent), nil
		}
		if n%reportEvery == 0 && u.handshakeSince(k, u.events.time(start)) {
			return time.Duration(u.events.now() - max(start, sent)), nil // the peer's initiation was faster than ours
		}
		if live && sent < start {
			_ = e.SendHandshakeInitiation(false) // does nothing while the engine's pause lasts; a failure shows as silence
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("%w with peer %s: %w", ErrNoHandshake, k.Short(), context.Cause(ctx))
		case <-u.engine.Wait():
			return 0, fmt.Errorf("handshake with peer %s: %w", k.Short(), ErrClosed)
		case <-tick.C:
		}
	}
}

// beginHandshake finds the peer, and reports whether it has a live session. If not, the endpoint routine tries it now.
func (u *Userspace) beginHandshake(ctx context.Context, k key.Public) (peer *device.Peer, live bool, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.usableLocked(ctx); err != nil {
		return nil, false, err
	}
	e, ok := u.table.peers[k]
	if !ok {
		return nil, false, fmt.Errorf("%w: %s", ErrNoPeer, k.Short())
	}
	if !u.table.up {
		return nil, false, fmt.Errorf("handshake with peer %s: the tunnel is not up", k.Short())
	}
	now := time.Now()
	if _, err := u.observeLocked(now); err != nil {
		return nil, false, err
	}
	// What was sent a moment ago, or is about to be, will do. Another initiation would make the engine forget the first,
	// the peer refuses two within 20 ms, and a follower that hurries crosses the other end's.
	recent := now.Sub(u.events.time(u.events.at(e.peer).sent.Load())) < wait1
	soon := !e.path.due.IsZero() && e.path.due.Sub(now) <= wait1+followerLag
	if live = e.path.live(now); !live && !recent && !soon {
		e.path = e.path.restart(now, e.desc.Endpoints)
		signal(u.now)
	}
	return e.peer, live, nil
}

// handshakeSince reports whether a session with the peer began after t.
func (u *Userspace) handshakeSince(k key.Public, t time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	r, err := u.reportLocked()
	return err == nil && r.peers[k].handshake.After(t.Round(0))
}
