package publish

import (
	"crypto/sha256"
	"encoding/binary"
	"time"
)

const (
	// rollSlots is how many different moments of a half-lease nodes roll at: enough to spread the work, few enough that
	// a large mesh does not write a store revision for each node.
	rollSlots = 720
	// maxBackdate bounds how far before its window a Binding begins to count. Without it, an agent whose clock is a
	// second slow would hold a replaced Binding as not yet valid and stop the traffic that it should keep up.
	maxBackdate = 5 * time.Minute
)

// window is one half-life of a lease. Windows are aligned to the clock and to the node's name only, so that a
// restarted coordinator signs the same bytes again.
type window struct {
	start     time.Time // the half-life boundary
	next      time.Time // the next one
	notBefore time.Time // of Bindings
	notAfter  time.Time
}

// windowAt returns the window of node at now. What remains of it is never more than lease, and at least half of it.
func windowAt(node string, lease time.Duration, now time.Time) window {
	half := max(1, int64(lease/(2*time.Second)))
	j := jitter(node, half)
	start := floor(now.Unix()+j, half)*half - j
	back := int64(min(maxBackdate, lease/16) / time.Second)
	at := func(sec int64) time.Time { return time.Unix(sec, 0).UTC() }
	return window{start: at(start), next: at(start + half), notBefore: at(start - back), notAfter: at(start + 2*half)}
}

// jitter is a whole number of seconds in [0, half), from the name alone.
func jitter(node string, half int64) int64 {
	step := max(1, half/rollSlots)
	sum := sha256.Sum256([]byte(node))
	return int64(binary.BigEndian.Uint64(sum[:8])%uint64(max(1, half/step))) * step
}

func floor(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}
