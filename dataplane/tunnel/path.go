package tunnel

import (
	"net/netip"
	"slices"
	"time"
)

const (
	// sessionLife is how long a WireGuard session may be used (Reject-After-Time, WireGuard paper, section 6.1).
	sessionLife = 180 * time.Second
	// refreshAge: a session of this age is renewed although nobody uses it, so that status is true of idle peers too
	// and the first packet after a pause need not wait for a handshake. WireGuard renews a used one at 120 s.
	refreshAge = 150 * time.Second
	// rekeyTimeout is WireGuard's own pause between two initiations.
	rekeyTimeout = 5 * time.Second

	// The wait after an unanswered initiation, for the first, second and third round through the candidates, and then.
	wait1 = 1 * time.Second
	wait2 = 2 * time.Second
	wait3 = 5 * time.Second
	// slowAttempts tries without an answer mean a host that is away: from then on slowWait suffices, because a
	// returning host initiates by itself.
	slowAttempts = 120
	slowWait     = 30 * time.Second

	// followerLag keeps the two ends from initiating at the same moment, in which case each would answer the other's
	// initiation and forget its own, and both would wait out WireGuard's 5 s. The end with the larger key waits.
	followerLag = 200 * time.Millisecond
	// heardGrace: an initiation of the peer that was just answered gets this long to become a session before ours may
	// cross it.
	heardGrace = time.Second
	// noDeadline means: look again only when something happened.
	noDeadline = time.Duration(1<<63 - 1)
)

// path is what the choice of a peer's endpoint depends on. The first group is set from the peer's description, the
// second from WireGuard, the third is the choice's own memory.
type path struct {
	candidates []netip.AddrPort
	follower   bool // this end has the larger key

	endpoint  netip.AddrPort // in WireGuard now; roaming may have changed it
	handshake time.Time      // the last one by the wall clock; zero means none
	heard     time.Time      // when the peer's last initiation was answered
	silent    bool           // WireGuard says that the peer has stopped answering

	looked   time.Time      // when next ran last
	session  time.Time      // birth of the session by the monotonic clock
	works    netip.AddrPort // the endpoint that last carried a session
	attempts int            // initiations since then
	due      time.Time      // when to try again
}

// step is what to do for a peer now.
type step struct {
	set      netip.AddrPort // endpoint to set first, when valid
	initiate bool           // send an initiation
	force    bool           // even if one was sent less than rekeyTimeout ago; ends what is left of a session
	wait     time.Duration  // look again after this long
}

// observe takes in what WireGuard reports. The age of a new session is bounded by the time since the last look, so
// that a step of the wall clock cannot make a session look older or younger than it can be.
func (p path) observe(now time.Time, endpoint netip.AddrPort, handshake time.Time) path {
	p.endpoint = endpoint
	if !handshake.Equal(p.handshake) && !handshake.IsZero() {
		age := max(now.Round(0).Sub(handshake), 0)
		if !p.looked.IsZero() {
			age = min(age, now.Sub(p.looked))
		}
		p.handshake, p.session, p.silent = handshake, now.Add(-age), false
	}
	if p.live(now) {
		p.works, p.attempts = endpoint, 0
	}
	p.looked = now
	return p
}

// live reports whether the peer has a session that works.
func (p path) live(now time.Time) bool {
	return !p.session.IsZero() && !p.silent && now.Sub(p.session) < sessionLife
}

// quiet records that WireGuard stopped hearing from the peer. It has just tried the endpoint in use once more, so
// that counts as the first attempt.
func (p path) quiet(now time.Time) path {
	if p.live(now) {
		p.silent = true
		p.attempts, p.due = 1, now.Add(p.interval(0))
	}
	return p
}

// next decides what to do for a peer, in this order:
//  1. A live session stays where it is: roaming knows better than any candidate. It is only renewed when it is old.
//  2. A peer that is just answering gets the time to finish.
//  3. Before the wait is over, nothing.
//  4. Otherwise the next candidate is tried, first the one that worked last.
func next(now time.Time, p path) (path, step) {
	if p.live(now) {
		return nextLive(now, p)
	}
	if grace := p.heard.Add(heardGrace); !p.heard.IsZero() && now.Before(grace) {
		return p, step{wait: grace.Sub(now)}
	}
	if now.Before(p.due) {
		return p, step{wait: p.due.Sub(now)}
	}
	order := p.order()
	if len(order) == 0 {
		return p, step{wait: noDeadline}
	}
	// The first attempt leaves an initiation alone that the engine has just sent by itself: its answer may be on the
	// way, and a second one would cross it.
	s := step{initiate: true, force: p.attempts > 0}
	if to := order[p.attempts%len(order)]; to != p.endpoint {
		s.set, p.endpoint = to, to
	}
	s.wait = p.interval(p.attempts / len(order))
	p.attempts++
	p.due = now.Add(s.wait)
	return p, s
}

func nextLive(now time.Time, p path) (path, step) {
	age, limit := now.Sub(p.session), refreshAge
	if p.follower {
		limit += 3 * rekeyTimeout // the other end renews first
	}
	p.due = time.Time{} // when the session ends, try at once
	if age < limit {
		return p, step{wait: limit - age}
	}
	return p, step{initiate: true, wait: rekeyTimeout}
}

// order lists the endpoints to try, the one that worked last before the candidates.
func (p path) order() []netip.AddrPort {
	if !p.works.IsValid() {
		return p.candidates
	}
	out := append(make([]netip.AddrPort, 0, len(p.candidates)+1), p.works)
	for _, c := range p.candidates {
		if c != p.works {
			out = append(out, c)
		}
	}
	return out
}

// interval is the wait after an attempt of the given round.
func (p path) interval(round int) time.Duration {
	waits := [...]time.Duration{wait1, wait2, wait3}
	wait := waits[min(round, len(waits)-1)]
	if p.attempts >= slowAttempts {
		wait = slowWait
	}
	if p.follower {
		wait += followerLag
	}
	return wait
}

// restart begins anew, as after a start of the engine or with other candidates. It does not touch a live session. When
// the endpoint that worked last is no candidate any more, the peer has probably moved: the candidates go first.
func (p path) restart(now time.Time, candidates []netip.AddrPort) path {
	p.candidates = slices.Clone(candidates)
	if !p.live(now) {
		p.attempts, p.due = 0, now
		if p.works.IsValid() && !slices.Contains(candidates, p.works) {
			p.attempts = 1
		}
	}
	return p
}
