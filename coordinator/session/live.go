package session

import (
	"sync"
	"time"
)

// live holds the one stream of each connected node.
type live struct {
	mu     sync.Mutex
	byNode map[string]*session
	closed error // set once: every stream ends with it, and no new one begins
}

// enter puts c in its node's place and ends the stream that was there: a host that connects again has lost the old one,
// whatever the network says.
func (l *live) enter(c *session) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed != nil {
		return l.closed
	}
	if old := l.byNode[c.node]; old != nil {
		old.end(errReplaced)
	}
	l.byNode[c.node] = c
	return nil
}

func (l *live) leave(c *session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byNode[c.node] == c {
		delete(l.byNode, c.node)
	}
}

// endNode ends the node's stream unless keep says that it may stay.
func (l *live) endNode(node string, cause error, keep func(*session) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.byNode[node]; c != nil && !keep(c) {
		c.end(cause)
	}
}

func (l *live) endAll(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = cause
	for _, c := range l.byNode {
		c.end(cause)
	}
}

// hint wakes the streams of nodes whose peers' endpoints changed.
func (l *live) hint(nodes []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range nodes {
		if c := l.byNode[n]; c != nil {
			poke(c.hint)
		}
	}
}

func (l *live) heard() map[string]time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make(map[string]time.Time, len(l.byNode))
	for n, c := range l.byNode {
		out[n] = time.Unix(0, c.heard.Load())
	}
	return out
}
