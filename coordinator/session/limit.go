package session

import (
	"net/netip"
	"sync"
	"time"
)

const (
	// maxSources bounds the table of the limiter. When it is full of sources that are not idle, further ones share one
	// bucket: strangers in numbers slow each other down, and nobody whose bucket exists.
	maxSources = 4096
	// sweepSources is how many buckets a newcomer looks at, at most, to find one that is full again and can go.
	sweepSources = 64
)

// limiter is a token bucket for each source address. What it protects is the processor, not the tokens: nobody guesses
// 256 bits.
type limiter struct {
	rate  float64 // per second
	burst float64

	mu       sync.Mutex
	sources  map[netip.Prefix]*bucket
	overflow bucket
}

type bucket struct {
	level float64
	at    time.Time
}

func newLimiter(rate, burst float64) *limiter {
	return &limiter{rate: rate, burst: burst, sources: map[netip.Prefix]*bucket{}, overflow: bucket{level: burst}}
}

func (l *limiter) allow(from netip.Addr, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.bucketLocked(source(from), now)
	b.level = l.levelOf(b, now)
	if now.After(b.at) { // a clock that went back must not be paid for twice
		b.at = now
	}
	if b.level < 1 {
		return false
	}
	b.level--
	return true
}

func (l *limiter) bucketLocked(src netip.Prefix, now time.Time) *bucket {
	if b, ok := l.sources[src]; ok {
		return b
	}
	if len(l.sources) >= maxSources && !l.sweepLocked(now) {
		return &l.overflow
	}
	b := &bucket{level: l.burst, at: now}
	l.sources[src] = b
	return b
}

// sweepLocked drops buckets that are full again: a new one would be the same.
func (l *limiter) sweepLocked(now time.Time) bool {
	looked, dropped := 0, false
	for src, b := range l.sources {
		if l.levelOf(b, now) >= l.burst {
			delete(l.sources, src)
			dropped = true
		}
		if looked++; looked == sweepSources {
			break
		}
	}
	return dropped
}

func (l *limiter) levelOf(b *bucket, now time.Time) float64 {
	return min(l.burst, b.level+max(0, now.Sub(b.at).Seconds())*l.rate)
}

// source is what counts as one caller: an IPv4 address, or the /64 that one IPv6 host usually has to itself.
func source(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := a.BitLen()
	if a.Is6() {
		bits = 64
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return netip.Prefix{} // an address without a family: not TCP; all such share a bucket
	}
	return p
}
