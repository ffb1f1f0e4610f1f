package enforce

import (
	"time"

	"golang.org/x/sys/unix"
)

// clock ties wall-clock instants to the kernel's monotonic nanoseconds, in which programs compare times.
type clock struct {
	wall time.Time
	mono int64
}

// readClock is the tie at this moment.
func readClock() clock {
	var ts unix.Timespec
	// CLOCK_MONOTONIC exists on every kernel; its only failure is a bad pointer.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return clock{wall: time.Now(), mono: ts.Nano()}
}

// stamp is t for the kernel: 0 for the zero time, and 1 for anything before the machine started.
func (c clock) stamp(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	// Wall clocks only: the kernel's clock does not follow what Go's monotonic reading does across a suspend.
	d := t.Round(0).Sub(c.wall.Round(0))
	if d > 0 && c.mono+int64(d) < c.mono {
		return 1<<63 - 1
	}
	return uint64(max(1, c.mono+int64(d)))
}

// time is the reverse of stamp.
func (c clock) time(ns uint64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return c.wall.Round(0).Add(time.Duration(int64(ns) - c.mono))
}

// maxDrift is how far the two clocks may part before stamps in the kernel are written again.
const maxDrift = 500 * time.Millisecond

// drifted reports whether stamps that were made under old are wrong under c, because the wall clock was set or the
// machine was suspended.
func (c clock) drifted(old clock) bool {
	d := c.wall.Round(0).Sub(old.wall.Round(0)) - time.Duration(c.mono-old.mono)
	return d.Abs() > maxDrift
}
