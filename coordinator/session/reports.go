package session

import (
	"maps"
	"strings"
	"sync"
	"time"
	"unicode"
)

// maxReportError bounds what an agent's error may take in memory, store and lists.
const maxReportError = 500

// Report is what a node said that it made real.
type Report struct {
	Epoch          uint64
	PolicyRevision uint64
	Error          string    // empty when everything was applied
	Time           time.Time // when the report arrived; one clock for all nodes
}

// reports keeps the latest of each node in memory, where rollouts are watched, and remembers which ones the store does
// not have yet.
type reports struct {
	mu     sync.Mutex
	latest map[string]Report
	dirty  map[string]struct{}
	wake   chan struct{} // one slot: dirty is no longer empty
	subs   map[chan struct{}]struct{}
}

func newReports() *reports {
	return &reports{latest: map[string]Report{}, dirty: map[string]struct{}{}, wake: make(chan struct{}, 1), subs: map[chan struct{}]struct{}{}}
}

func (r *reports) put(node string, rep Report) {
	rep.Error = plain(rep.Error)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.latest[node] = rep
	r.dirty[node] = struct{}{}
	poke(r.wake)
	for ch := range r.subs {
		poke(ch)
	}
}

func (r *reports) of(node string) (Report, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rep, ok := r.latest[node]
	return rep, ok
}

func (r *reports) all() map[string]Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.latest)
}

// take returns what the store lacks, and counts it as stored.
func (r *reports) take() map[string]Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[string]Report, len(r.dirty))
	for node := range r.dirty {
		out[node] = r.latest[node]
	}
	clear(r.dirty)
	return out
}

// giveBack marks reports that could not be stored, unless newer ones came.
func (r *reports) giveBack(node string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dirty[node] = struct{}{}
	poke(r.wake)
}

func (r *reports) subscribe() (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.subs[ch] = struct{}{}
	return ch, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.subs, ch)
	}
}

// plain makes an agent's text harmless for logs, tables and terminals.
func plain(s string) string {
	if len(s) > maxReportError {
		s = s[:maxReportError]
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, ""))
}

// poke wakes the reader of a one-slot channel.
func poke(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
