// Package svid renews the node's certificate in time.
//
// It owns the decision when (rotate.go: next is pure) and the goroutine that acts on it (run.go). How a certificate is
// asked for and kept is the caller's: a valid one is never given up because a renewal failed.
package svid

import (
	"math"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
)

// The schedule (reference/identity.md, section 3).
const (
	renewFrom  = 0.5 // of life; a random point up to
	renewUntil = 0.6
	urgent     = 0.2 // of life left: renew at once

	firstBackoff = 500 * time.Millisecond
	maxBackoff   = time.Minute
)

// State is everything that next looks at.
type State struct {
	NotBefore, NotAfter time.Time
	// RenewAt is the random point, drawn once for each certificate.
	RenewAt time.Time
	// Failures counts attempts since the last success, the last of them at LastTry.
	Failures int
	LastTry  time.Time
}

// Action is what to do.
type Action struct {
	Renew bool
	// At is when to look again, if not now.
	At time.Time
	// Over: the certificate ended so long ago that the coordinator refuses to renew it.
	Over bool
}

// NewState begins a certificate's life. random is in [0, 1).
func NewState(notBefore, notAfter time.Time, random float64) State {
	share := renewFrom + (renewUntil-renewFrom)*random
	at := notBefore.Add(time.Duration(share * float64(notAfter.Sub(notBefore))))
	return State{NotBefore: notBefore, NotAfter: notAfter, RenewAt: at}
}

// next decides:
//
//  1. ended longer ago than the coordinator forgives: over;
//  2. due at the random point, at once in the last fifth of life, and at once when the clock says that the
//     certificate is not valid yet;
//  3. after failures not before the backoff has passed, which never exceeds a quarter of what is left.
func next(now time.Time, s State) Action {
	// 1.
	if now.After(s.NotAfter.Add(identity.RenewGrace)) {
		return Action{Over: true}
	}
	// 2.
	life, left := s.NotAfter.Sub(s.NotBefore), s.NotAfter.Sub(now)
	due := s.RenewAt
	if left <= time.Duration(urgent*float64(life)) || now.Before(s.NotBefore) {
		due = now
	}
	// 3. A try that lies in the future was made before the clock was set back: its backoff means nothing.
	if s.Failures > 0 && !s.LastTry.After(now) {
		if again := s.LastTry.Add(backoff(s.Failures, left)); again.After(due) {
			due = again
		}
	}
	if !due.After(now) {
		return Action{Renew: true}
	}
	return Action{At: due}
}

// backoff doubles from firstBackoff. It stays below a quarter of what is left of a valid certificate, and an ended one
// is asked for every minute.
func backoff(failures int, left time.Duration) time.Duration {
	d := time.Duration(float64(firstBackoff) * math.Pow(2, float64(min(failures, 16)-1)))
	d = min(d, maxBackoff)
	if left > 0 {
		d = min(d, max(left/4, firstBackoff))
	}
	return d
}
