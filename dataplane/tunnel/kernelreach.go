package tunnel

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/internal/key"
)

const (
	// kernelLook is how often the kernel's peers are looked at when nothing is due: it tells no events. What is found so is
	// that a peer has fallen silent, and what another program did to the device.
	kernelLook = rekeyTimeout
	// kernelSilence is how long a peer may answer nothing: WireGuard itself initiates then (Keepalive-Timeout and
	// Rekey-Timeout, WireGuard paper, section 6.5).
	kernelSilence = 15 * time.Second
	// kernelPause is how soon after an initiation the kernel is made to send another one by making its peer anew. Later its
	// own repetition after rekeyTimeout serves, which goes to whatever endpoint is set by then.
	kernelPause = rekeyTimeout - time.Second
	// kernelPoll is how often Handshake looks whether the answer is there.
	kernelPoll = 20 * time.Millisecond
	// keepaliveSize is an empty packet as the kernel counts it.
	keepaliveSize = 32
)

// signs is what the counters of a peer reveal, looked at now and then.
type signs struct {
	looked   time.Time
	rx, tx   uint64
	hands    time.Time     // of the handshake
	asked    time.Time     // since when something was sent that wants an answer, and nothing came; zero for never
	interval time.Duration // keepalive
}

// sign is what signs.observe finds.
type sign uint8

const (
	noSign sign = iota
	heard       // something came that made no session yet: an initiation, whose session the peer's next packet makes
	silent      // the peer answered nothing for kernelSilence
)

// observe compares the counters with those of the last look. Empty packets want no answer: there are at most two kinds
// between two looks, those of the interval and one that answers.
func (s signs) observe(now time.Time, w kernelPeer) (signs, sign) {
	found := noSign
	if w.rx != s.rx {
		s.asked = time.Time{}
		if w.handshake.Equal(s.hands) && !s.looked.IsZero() {
			found = heard
		}
	} else if s.asked.IsZero() && !s.looked.IsZero() {
		empty := uint64(2)
		if s.interval > 0 {
			empty += uint64(now.Sub(s.looked) / s.interval)
		}
		if w.tx > s.tx && w.tx-s.tx > empty*keepaliveSize {
			s.asked = now
		}
	}
	if !s.asked.IsZero() && now.Sub(s.asked) >= kernelSilence {
		s.asked, found = time.Time{}, silent
	}
	s.looked, s.rx, s.tx, s.hands, s.interval = now, w.rx, w.tx, w.handshake, w.keepalive
	return s, found
}

// look observes all peers, takes the steps that are due, and returns how long nothing will be due.
func (k *Kernel) look(now time.Time) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.table.up || k.usableLocked(context.Background()) != nil {
		return noDeadline
	}
	if up, _ := k.carrier.State(); !up {
		return kernelLook // there is no socket; Up is called when there may be one
	}
	r, err := k.observeLocked(now)
	if err != nil {
		k.log.Debug("look at peers", "err", err)
		return rekeyTimeout
	}
	k.mendLocked(r)
	wait, sent := kernelLook, 0
	for public, e := range k.table.peers {
		p, s := next(now, e.path)
		if s.initiate && sent == maxInitiations {
			wait = 0 // e keeps its place and goes with the next look
			continue
		}
		e.path = p
		wait = min(wait, s.wait)
		if s.initiate {
			sent++
			if err := k.initiateLocked(now, e, s, r.peers[public]); err != nil {
				k.log.Debug("initiate", "peer", public.Short(), "endpoint", e.path.endpoint, "err", err)
			}
		}
	}
	return wait
}

// observeLocked brings what is known of the peers up to date.
func (k *Kernel) observeLocked(now time.Time) (kernelReport, error) {
	r, err := k.control.read()
	if err != nil {
		return r, err
	}
	_, downs := k.carrier.State()
	for public, e := range k.table.peers {
		w, there := r.peers[public]
		if !there { // another program removed it, and its session with it; mendLocked makes it anew
			e.path.session = time.Time{}
			continue
		}
		if downs != k.table.downs { // the kernel forgot the session, but tells its time still
			e.path = e.path.lost(now, w.handshake)
		}
		var found sign
		e.signs, found = e.signs.observe(now, w)
		switch {
		case found == silent:
			e.path = e.path.quiet(now)
		case found == heard && !e.path.live(now):
			e.path.heard = now
		}
		// A handshake that is newer than the silence ends it, so it is observed last.
		e.path = e.path.observe(now, w.endpoint, w.handshake)
	}
	k.table.downs = downs
	return r, nil
}

// lost ends a session that WireGuard has forgotten, and begins anew. The handshake is the one that WireGuard still tells of.
func (p path) lost(now time.Time, handshake time.Time) path {
	p.session, p.silent, p.handshake = time.Time{}, false, handshake
	return p.restart(now, p.candidates)
}

// mendLocked puts back what another program did to the device: a peer that nobody signed goes, one that is missing comes,
// and each has exactly the addresses that are bound to it. The keepalive of a peer waits for its session.
func (k *Kernel) mendLocked(r kernelReport) {
	for public := range r.peers {
		if _, ours := k.table.peers[public]; !ours {
			k.toldLocked("a peer that nobody bound was removed", public, k.control.peers(peerChange{key: public, remove: true}))
		}
	}
	for public, e := range k.table.peers {
		w, there := r.peers[public]
		if !there {
			k.toldLocked("a peer that was removed was made anew", public, k.renewLocked(e, e.path.endpoint, false))
			continue
		}
		exact := len(w.allowed) == len(e.desc.AllowedIPs)
		for _, a := range w.allowed {
			exact = exact && k.table.holders[a] == public
		}
		if !exact {
			err := k.control.peers(peerChange{key: public, replace: true, add: e.desc.AllowedIPs})
			k.toldLocked("the addresses of a peer were put right", public, err)
		}
		if w.keepalive != e.desc.Keepalive && e.path.live(e.path.looked) {
			if err := k.control.peers(peerChange{key: public, keepalive: &e.desc.Keepalive}); err != nil {
				k.log.Debug("set keepalive", "peer", public.Short(), "err", err)
			}
		}
	}
}

func (k *Kernel) toldLocked(what string, public key.Public, err error) {
	if err != nil {
		k.log.Warn("another program changed the tunnel, and that could not be undone", "device", k.name, "peer", public.Short(), "err", err)
		return
	}
	k.log.Warn("another program changed the tunnel: "+what, "device", k.name, "peer", public.Short())
}

// initiateLocked carries out a step. WireGuard's own repetition stays armed, as with the embedded engine. w is the peer as
// it was before.
//
// The kernel sends no initiation within rekeyTimeout of another, which is too slow for going through candidates. Only
// making the peer anew lifts that; there is no session that works, or this step would not be forced.
func (k *Kernel) initiateLocked(now time.Time, e *kernelEntry, s step, w kernelPeer) error {
	if s.force && now.Sub(e.kicked) < kernelPause {
		to := w.endpoint
		if s.set.IsValid() {
			to = s.set
		}
		return k.renewLocked(e, to, true)
	}
	e.kicked = now
	return k.control.peers(e.kick(s.set)...)
}

// kick makes the kernel initiate without traffic, to another endpoint where one is given. A keepalive that is switched on
// sends an empty packet at once, and that begins a handshake where there is no session, or an old one of ours. It is
// switched off first, so that it can be switched on, and is the wanted one last. The one between is so long that its
// timer means nothing.
func (e *kernelEntry) kick(to netip.AddrPort) []peerChange {
	off, long := time.Duration(0), maxKeepalive
	changes := []peerChange{{key: e.desc.Key, endpoint: to, keepalive: &off}, {key: e.desc.Key, keepalive: &long}}
	return append(changes, peerChange{key: e.desc.Key, keepalive: &e.desc.Keepalive})
}

// renewLocked makes a peer anew, in one message unless it has very many addresses, and initiates where that is wanted. What the kernel counted is kept here. The peer's session
// ends: packets from the other end are lost until the new one begins, those to it wait in the kernel.
func (k *Kernel) renewLocked(e *kernelEntry, to netip.AddrPort, initiate bool) error {
	changes := []peerChange{{key: e.desc.Key, remove: true}, e.creation(to)}
	if initiate {
		e.kicked = time.Now()
		changes = append(changes, e.kick(netip.AddrPort{})...)
	}
	if err := k.control.peers(changes...); err != nil {
		return err
	}
	e.before.rx, e.before.tx = e.before.rx+e.signs.rx, e.before.tx+e.signs.tx
	e.signs = signs{}
	e.path.session = time.Time{}
	return nil
}

// Handshake makes a new handshake with a peer and returns how long it took on the wire. The kernel begins none while it has
// a session that is young, so a live session is ended for it: packets from the peer are lost for one round trip, those
// to it wait. Without an answer it fails with ErrNoHandshake.
func (k *Kernel) Handshake(ctx context.Context, public key.Public) (time.Duration, error) {
	start, err := k.beginHandshake(ctx, public)
	if err != nil {
		return 0, err
	}
	tick := time.NewTicker(kernelPoll)
	defer tick.Stop()
	for {
		took, ok, err := k.handshakeSince(public, start)
		if ok || err != nil {
			return took, err
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("%w with peer %s: %w", ErrNoHandshake, public.Short(), context.Cause(ctx))
		case <-k.done:
			return 0, fmt.Errorf("handshake with peer %s: %w", public.Short(), ErrClosed)
		case <-tick.C:
		}
	}
}

// beginHandshake initiates, or leaves that to the endpoint routine where an attempt is recent or about to be made: another
// one would make the kernel forget the first, and a follower that hurries crosses the other end's.
func (k *Kernel) beginHandshake(ctx context.Context, public key.Public) (start time.Time, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.usableLocked(ctx); err != nil {
		return start, err
	}
	e, ok := k.table.peers[public]
	if !ok {
		return start, fmt.Errorf("%w: %s", ErrNoPeer, public.Short())
	}
	if !k.table.up {
		return start, fmt.Errorf("handshake with peer %s: the tunnel is not up", public.Short())
	}
	now := time.Now()
	r, err := k.observeLocked(now)
	if err != nil {
		return start, err
	}
	if e.path.live(now) {
		if err := k.renewLocked(e, r.peers[public].endpoint, true); err != nil {
			return start, fmt.Errorf("handshake with peer %s: %w", public.Short(), err)
		}
		e.path.attempts, e.path.due = 1, now.Add(e.path.interval(0))
		signal(k.now) // which sees when the next attempt is due
		return now, nil
	}
	soon := !e.path.due.IsZero() && e.path.due.Sub(now) <= wait1+followerLag
	if recent := now.Sub(e.kicked) < wait1; !recent && !soon {
		e.path = e.path.restart(now, e.desc.Endpoints)
		signal(k.now)
	}
	return now, nil
}

// handshakeSince reports whether a session with the peer began after t, and how long that took from the last initiation.
func (k *Kernel) handshakeSince(public key.Public, t time.Time) (took time.Duration, ok bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.usableLocked(context.Background()); err != nil {
		return 0, false, err
	}
	e, there := k.table.peers[public]
	if !there {
		return 0, false, fmt.Errorf("%w: %s", ErrNoPeer, public.Short())
	}
	now := time.Now()
	if _, err := k.observeLocked(now); err != nil {
		return 0, false, err
	}
	if !e.path.handshake.After(t.Round(0)) {
		return 0, false, nil
	}
	if e.kicked.After(t) {
		t = e.kicked
	}
	took = e.path.handshake.Sub(t.Round(0))
	if took <= 0 || took > now.Sub(t) { // the peer's initiation was faster than ours, or the clock was set
		took = now.Sub(t)
	}
	return took, true, nil
}
