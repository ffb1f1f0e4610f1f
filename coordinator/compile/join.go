package compile

import (
	"time"

	"github.com/signet-overlay/signet/internal/policy"
)

// join says what several rules that meet at one Key come to. It does not depend on their order in the argument, and
// joining a rule twice is joining it once.
//
//  1. Deny rules, and deny rules in mode audit, each among themselves: the one that stands longest is kept, without
//     expiry before any expiry, a later one before an earlier one, and the first in the document among equals. While any
//     of them stands, that one does.
//  2. Allow rules that are enforced: the same.
//  3. Allow rules of which some are in mode audit: an endless one of either mode is kept, as by 1: nothing is ever
//     withheld. Otherwise the entry stands, as plain allow, for as long as the longest of all does, whatever its mode:
//     what an enforced rule allows in its time is not recorded as if it were withheld. After that it lets pass on record,
//     as a rule in mode audit alone would: no allow rule takes away what another one gives. It names the rule in mode
//     audit (by 1 among several), which is the one that lets the flow pass at every time, and whose mode an operator
//     would look for in the record; a record of plain allow can therefore name it after its own expiry, while an enforced
//     rule stands.
func (e *expander) join(a, b policy.Value) policy.Value {
	return policy.Value{Allow: e.joinAllow(a.Allow, b.Allow), Deny: e.longer(a.Deny, b.Deny), Audit: e.longer(a.Audit, b.Audit)}
}

func (e *expander) joinAllow(a, b policy.Slot) policy.Slot {
	if !a.Present() || !b.Present() || !a.Audit && !b.Audit || a.NotAfter.IsZero() || b.NotAfter.IsZero() {
		return e.longer(a, b)
	}
	end := a.NotAfter
	if b.NotAfter.After(end) {
		end = b.NotAfter
	}
	switch {
	case a.Audit && b.Audit:
		// Either may have been given the end of an enforced rule; their own decide.
		a.NotAfter, b.NotAfter = e.end(a), e.end(b)
		a = e.longer(a, b)
	case b.Audit:
		a = b
	}
	a.NotAfter = end
	return a
}

// end is when the rule of a slot expires by itself.
func (e *expander) end(s policy.Slot) time.Time { return e.c.byRule[s.Rule].Expires }

// longer is the slot that stands longer, and among equals that of the first rule in the document.
func (e *expander) longer(a, b policy.Slot) policy.Slot {
	switch {
	case !b.Present():
		return a
	case !a.Present():
		return b
	case a.NotAfter.Equal(b.NotAfter):
		if e.order[b.Rule] < e.order[a.Rule] {
			return b
		}
		return a
	case a.NotAfter.IsZero() || !b.NotAfter.IsZero() && a.NotAfter.After(b.NotAfter):
		return a
	}
	return b
}
