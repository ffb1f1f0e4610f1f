package flowlog

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
)

const (
	// recent records are kept for signet flows; the oldest goes first.
	recent = 4096
	// queueLength bounds what waits for one reader; beyond it the reader loses the newest, counted.
	queueLength = 1024
	// MaxSubscribers bounds the readers; one more is refused.
	MaxSubscribers = 32
)

// Log numbers records and hands them on.
type Log struct {
	node  string
	units func(cgroup uint64) string
	names atomic.Pointer[Names]

	mu   sync.Mutex
	seq  uint64
	ring []flow.Record // the oldest at next, once full
	next int
	subs map[*Subscription]struct{}
}

// New makes a Log of node; units names the systemd unit of a cgroup.
func New(node string, units func(cgroup uint64) string) *Log {
	l := &Log{node: node, units: units, subs: map[*Subscription]struct{}{}}
	l.names.Store(NamesOf(nil))
	return l
}

// SetNames changes what numbers stand for, for records from now on.
func (l *Log) SetNames(n *Names) { l.names.Store(n) }

// Observe takes in one observation. It never waits for a reader.
func (l *Log) Observe(o flow.Observation) {
	if o.At.IsZero() {
		o.At = time.Now()
	}
	r := decorate(o, l.names.Load(), l.node, l.units(o.Cgroup))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seq++
	r.Seq = l.seq
	if len(l.ring) < recent {
		l.ring = append(l.ring, r)
	} else {
		l.ring[l.next] = r
		l.next = (l.next + 1) % recent
	}
	for s := range l.subs {
		s.put(r)
	}
}

// Recent returns the records in memory, the oldest first.
func (l *Log) Recent() []flow.Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.recentLocked()
}

func (l *Log) recentLocked() []flow.Record {
	out := make([]flow.Record, 0, len(l.ring))
	out = append(out, l.ring[l.next:]...)
	return append(out, l.ring[:l.next]...)
}

// Subscribe returns the recent records and a subscription that begins right after them, or nil where there are too
// many readers already. The caller closes it.
func (l *Log) Subscribe() ([]flow.Record, *Subscription) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.subs) >= MaxSubscribers {
		return nil, nil
	}
	s := &Subscription{log: l, queue: make(chan flow.Record, queueLength)}
	l.subs[s] = struct{}{}
	return l.recentLocked(), s
}

// Subscription is one reader.
type Subscription struct {
	log   *Log
	queue chan flow.Record
	lost  uint64 // guarded by log.mu
}

// put is called with log.mu held.
func (s *Subscription) put(r flow.Record) {
	if s.lost > 0 {
		select {
		case s.queue <- lossRecord(s.log.node, s.lost, r):
			s.lost = 0
		default:
			s.lost++
			return
		}
	}
	select {
	case s.queue <- r:
	default:
		s.lost++
	}
}

// lossRecord says how many records before r a reader did not get.
func lossRecord(node string, lost uint64, before flow.Record) flow.Record {
	return flow.Record{Schema: flow.Schema, Event: flow.EventLoss, Time: before.Time, Seq: before.Seq - 1,
		Observer: flow.Observer{Node: node}, Count: lost}
}

// Next waits for the next record.
func (s *Subscription) Next(ctx context.Context) (flow.Record, error) {
	select {
	case <-ctx.Done():
		return flow.Record{}, ctx.Err()
	case r := <-s.queue:
		return r, nil
	}
}

// Close ends the subscription.
func (s *Subscription) Close() {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	delete(s.log.subs, s)
}
