package reconcile_test

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-overlay/signet/agent/reconcile"
	"github.com/signet-overlay/signet/agent/session/sessiontest"
	"github.com/signet-overlay/signet/internal/policy"
)

// TestARefusedViewDeniesAll: the policy before may let through what the refused one takes back.
func TestARefusedViewDeniesAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		s := sessiontest.Sample(t, 1, time.Now())
		if err := set(t, r, &s); err != nil {
			t.Fatal(err)
		}
		f.take()
		f.set("enforce", errors.New("map full"))
		next := sessiontest.Sample(t, 2, time.Now())
		if err := set(t, r, &next); err == nil || !strings.Contains(err.Error(), "everything in the overlay is denied") || !strings.Contains(err.Error(), "map full") {
			t.Errorf("Wait gave %v", err)
		}
		if got := f.take(); got != "enforce deny" || f.view != nil {
			t.Errorf("calls: %s", got)
		}
		if st := r.Status(); st.Enforced || len(st.Failed) != 1 || st.Failed[0].Kind != reconcile.KindPolicy {
			t.Errorf("status: %+v", st)
		}
		wait(10 * time.Second)
		if got := f.take(); strings.Contains(got, "deny") || strings.Count(got, "enforce") < 3 {
			t.Errorf("retries: %s", got)
		}
		f.set("enforce", nil)
		wait(31 * time.Second)
		if st := r.Status(); !st.Enforced || len(st.Failed) != 0 || f.view == nil {
			t.Errorf("status after the repair: %+v", st)
		}
	})
}

// TestAViewThatIsNoneDeniesAll: one that does not even reach the judge.
func TestAViewThatIsNoneDeniesAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		s := sessiontest.Sample(t, 1, time.Now())
		s.Self.Addresses = []netip.Addr{netip.MustParseAddr("8.8.8.8")}
		if err := set(t, r, &s); !errors.Is(err, policy.ErrView) {
			t.Errorf("Wait gave %v", err)
		}
		if got := f.take(); !strings.Contains(got, "deny") || strings.Contains(got, "enforce") {
			t.Errorf("calls: %s", got)
		}
	})
}

// plain hides every optional method of a fakeTarget, and has no room for addresses while full.
type plain struct {
	reconcile.Target
	full bool
}

func (p *plain) Enforce(ctx context.Context, v *policy.View) error {
	if p.full && len(v.Addresses) > 0 {
		return errors.New("map full")
	}
	return p.Target.Enforce(ctx, v) //nolint:wrapcheck // a fake
}

func TestARefusedViewDeniesAllWithoutADenier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := startOn(t, &plain{Target: f, full: true}, reconcile.DenyAll)
		s := sessiontest.Sample(t, 1, time.Now())
		if err := set(t, r, &s); err == nil {
			t.Error("no error")
		}
		if f.view == nil || len(f.view.Addresses) != 0 {
			t.Fatalf("the judge has %+v", f.view)
		}
		denied(t, f.view)
	})
}

// TestDenyAllIsRetriedToo: while neither works, status names both.
func TestDenyAllIsRetriedToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		f.set("enforce", errors.New("map full"))
		f.set("deny", errors.New("no hook"))
		s := sessiontest.Sample(t, 1, time.Now())
		if err := set(t, r, &s); err == nil || strings.Contains(err.Error(), "is denied") {
			t.Errorf("Wait gave %v", err)
		}
		if st := r.Status(); len(st.Failed) != 2 {
			t.Errorf("status: %+v", st)
		}
		f.set("deny", nil)
		wait(31 * time.Second)
		if st := r.Status(); len(st.Failed) != 1 || !strings.Contains(st.Failed[0].Err.Error(), "is denied") {
			t.Errorf("status when it is denied: %+v", st)
		}
	})
}

// TestAnewGivesTheSameViewOnce: the clock was set, and the kernel's stamps are made anew.
func TestAnewGivesTheSameViewOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		s := sessiontest.Sample(t, 1, time.Now())
		if err := set(t, r, &s); err != nil {
			t.Fatal(err)
		}
		f.take()
		r.Anew()
		wait(5 * time.Minute)
		if got := f.take(); got != "enforce" {
			t.Errorf("calls: %s", got)
		}
	})
}

// TestAnEndIsSaidAgain: the end of a window and of the lease stand in a View that stays the same.
func TestAnEndIsSaidAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newTarget()
		r := start(t, f, reconcile.DenyAll)
		s := sessiontest.Sample(t, 1, time.Now())
		s.Manifest.LeaseEnds = time.Now().Add(2 * time.Hour)
		for n, rules := range s.Rulesets {
			for k, v := range rules {
				v.Allow.NotAfter = time.Now().Add(time.Hour)
				s.Rulesets[n][k] = v
			}
		}
		if err := set(t, r, &s); err != nil {
			t.Fatal(err)
		}
		f.take()
		for _, what := range []string{"window", "lease"} {
			wait(59 * time.Minute)
			if got := f.take(); got != "" {
				t.Errorf("calls before the end of the %s: %s", what, got)
			}
			wait(time.Minute + time.Second)
			if got := f.take(); got != "enforce" {
				t.Errorf("calls at the end of the %s: %s", what, got)
			}
		}
	})
}
