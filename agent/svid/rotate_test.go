package svid

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func TestNext(t *testing.T) {
	end := t0.Add(time.Hour)
	s := NewState(t0, end, 0.5) // renews at 33 minutes
	failed := func(n int, at time.Duration) State {
		f := s
		f.Failures, f.LastTry = n, t0.Add(at)
		return f
	}
	for _, c := range []struct {
		name  string
		after time.Duration
		state State
		want  Action
	}{
		{"young", time.Minute, s, Action{At: t0.Add(33 * time.Minute)}},
		{"due", 33 * time.Minute, s, Action{Renew: true}},
		{"last fifth", 50 * time.Minute, NewState(t0, end, 0.99), Action{Renew: true}},
		{"not valid yet", -time.Hour, s, Action{Renew: true}},
		{"first failure", 33*time.Minute + time.Millisecond, failed(1, 33*time.Minute), Action{At: t0.Add(33*time.Minute + 500*time.Millisecond)}},
		{"many failures", 34 * time.Minute, failed(40, 34*time.Minute), Action{At: t0.Add(35 * time.Minute)}},
		{"a quarter of what is left", 58 * time.Minute, failed(40, 58*time.Minute), Action{At: t0.Add(58*time.Minute + 30*time.Second)}},
		{"ended, waiting", 61 * time.Minute, failed(40, 61*time.Minute), Action{At: t0.Add(62 * time.Minute)}},
		{"ended, due", 62 * time.Minute, failed(40, 61*time.Minute), Action{Renew: true}},
		{"ended 29 days ago", 29 * 24 * time.Hour, s, Action{Renew: true}},
		{"ended 31 days ago", 31*24*time.Hour + time.Hour, s, Action{Over: true}},
		{"the clock was set back behind the last try", 33*time.Minute + time.Second, failed(10, 40*time.Minute), Action{Renew: true}},
	} {
		if got := next(t0.Add(c.after), c.state); got.Renew != c.want.Renew || got.Over != c.want.Over || !got.At.Equal(c.want.At) {
			t.Errorf("%s: %+v, expected %+v", c.name, got, c.want)
		}
	}
}

func TestRenewalPointIsSpread(t *testing.T) {
	for _, r := range []float64{0, 0.25, 0.999} {
		at := NewState(t0, t0.Add(time.Hour), r).RenewAt.Sub(t0)
		if at < 30*time.Minute || at > 36*time.Minute {
			t.Errorf("renews after %v of an hour", at)
		}
	}
}

// fakeIssuer gives certificates of an hour.
type fakeIssuer struct {
	mu          sync.Mutex
	from, until time.Time
	broken      bool
	calls       []time.Time
}

func (f *fakeIssuer) Validity() (time.Time, time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.from, f.until
}

func (f *fakeIssuer) Renew(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, time.Now())
	if f.broken {
		return errors.New("coordinator away")
	}
	f.from, f.until = time.Now(), time.Now().Add(time.Hour)
	return nil
}

func (f *fakeIssuer) breakDown(broken bool) { f.mu.Lock(); defer f.mu.Unlock(); f.broken = broken }

// look returns the number of calls, the last of them, and the end of the certificate.
func (f *fakeIssuer) look() (n int, last, until time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n = len(f.calls); n > 0 {
		last = f.calls[n-1]
	}
	return n, last, f.until
}

func start(t *testing.T, f *fakeIssuer) *Rotator {
	f.from, f.until = time.Now(), time.Now().Add(time.Hour)
	r := NewRotator(f, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = r.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return r
}

// wait lets the bubble's clock run.
func wait(d time.Duration) { <-time.After(d) }

func TestRunRenewsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{}
		start(t, f)
		wait(10 * time.Hour)
		synctest.Wait()
		if n, _, _ := f.look(); n < 16 || n > 20 {
			t.Errorf("%d renewals in 10 hours, expected one each 30 to 36 minutes", n)
		}
	})
}

func TestRunOutageLongerThanALife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{broken: true}
		r := start(t, f)
		_, _, before := f.look()
		wait(3 * time.Hour)
		synctest.Wait()
		if _, last, until := f.look(); !until.Equal(before) || time.Since(last) > time.Minute+maxWait {
			t.Errorf("the certificate ends %v, expected %v; last asked %v ago", until, before, time.Since(last))
		}
		if rep := r.Report(); rep.LastError == nil || rep.Failures < 100 {
			t.Errorf("the report is %+v", rep)
		}
		f.breakDown(false)
		wait(2 * time.Minute)
		synctest.Wait()
		if _, _, until := f.look(); r.Report().LastError != nil || r.Report().Failures != 0 || !until.After(time.Now()) {
			t.Errorf("not renewed after the outage: %+v", r.Report())
		}
	})
}
