package svid

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

// Issuer holds a certificate and can replace it.
type Issuer interface {
	// Validity is that of the certificate in use.
	Validity() (notBefore, notAfter time.Time)
	// Renew replaces the certificate, or returns an error and leaves it in use.
	Renew(ctx context.Context) error
}

// ErrOver: the certificate ended more than 30 days ago and is not renewed any more.
var ErrOver = errors.New("the node's certificate ended more than 30 days ago and cannot be renewed: enrol this host again with a new join token")

const (
	// maxWait bounds one sleep, so that a clock that was set is noticed within it even if nobody calls Kick.
	maxWait = 30 * time.Second
	// tryTimeout bounds one attempt.
	tryTimeout = 20 * time.Second
)

// Report is what status shows of the rotation.
type Report struct {
	RenewAt   time.Time
	Failures  int
	LastError error
	Over      bool
}

// Rotator keeps one certificate fresh.
type Rotator struct {
	issuer Issuer
	log    *slog.Logger
	kick   chan struct{}

	mu     sync.Mutex
	report Report
}

// NewRotator makes a Rotator; Run does the work.
func NewRotator(issuer Issuer, log *slog.Logger) *Rotator {
	return &Rotator{issuer: issuer, log: log, kick: make(chan struct{}, 1)}
}

// Kick makes Run look at the clock again, and try at once if a renewal is due: after a jump, or when the coordinator came
// back.
func (r *Rotator) Kick() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// Report returns how the rotation stands.
func (r *Rotator) Report() Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.report
}

func (r *Rotator) set(rep Report) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report = rep
}

// Run renews until ctx ends.
func (r *Rotator) Run(ctx context.Context) error {
	s := r.begin()
	var lastErr error
	for {
		now := time.Now().Round(0) // wall clock only: certificates end by the wall clock
		a := next(now, s)
		r.set(Report{RenewAt: s.RenewAt, Failures: s.Failures, LastError: lastErr, Over: a.Over})
		wait := maxWait
		switch {
		case a.Renew:
			s, lastErr = r.try(ctx, s)
			wait = 0
		case !a.Over:
			wait = min(wait, a.At.Sub(now))
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-r.kick:
			// Whoever kicks knows that something changed: failures from before say nothing about the next try.
			s.Failures, s.LastTry = 0, time.Time{}
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (r *Rotator) begin() State {
	nb, na := r.issuer.Validity()
	return NewState(nb, na, rand.Float64())
}

func (r *Rotator) try(ctx context.Context, s State) (State, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	if err := r.issuer.Renew(ctx); err != nil {
		s.Failures, s.LastTry = s.Failures+1, time.Now().Round(0)
		r.log.Warn("node certificate was not renewed", "failures", s.Failures, "expires", s.NotAfter, "error", err)
		return s, err
	}
	fresh := r.begin()
	if !fresh.NotAfter.After(s.NotAfter) {
		// The coordinator capped it. Asking again at once would give the same: wait as after a failure.
		fresh.Failures, fresh.LastTry = s.Failures+1, time.Now().Round(0)
		r.log.Warn("the new node certificate does not live longer than the last", "expires", fresh.NotAfter)
	} else {
		r.log.Info("node certificate renewed", "expires", fresh.NotAfter)
	}
	return fresh, nil
}
