package session

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// One source may have a quarter of all connections, and minPerSource where that is less: a site behind one address is
// many hosts, but never all of them.
const (
	sourceShare  = 4
	minPerSource = 64
)

// bounded stops accepting while it has handed out as many connections as it may: further ones wait in the kernel's
// queue until one ends or the queue is full. Those of a source that has its share already are closed at once.
type bounded struct {
	net.Listener
	slots     chan struct{}
	done      chan struct{}
	closeOnce sync.Once
	perSource int

	mu       sync.Mutex
	bySource map[netip.Prefix]int
}

func newBounded(l net.Listener, limit int) *bounded {
	return &bounded{Listener: l, slots: make(chan struct{}, limit), done: make(chan struct{}),
		perSource: max(limit/sourceShare, min(limit, minPerSource)), bySource: map[netip.Prefix]int{}}
}

// Accept waits for a slot first.
func (b *bounded) Accept() (net.Conn, error) {
	select {
	case b.slots <- struct{}{}:
	case <-b.done:
		return nil, net.ErrClosed
	}
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			<-b.slots
			return nil, err
		}
		src := source(remoteAddr(c.RemoteAddr().String()))
		if !b.take(src) {
			_ = c.Close() // nothing was said on it
			continue
		}
		return &boundedConn{Conn: c, release: sync.OnceFunc(func() { b.giveBack(src); <-b.slots })}, nil
	}
}

func (b *bounded) take(src netip.Prefix) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.bySource[src] >= b.perSource {
		return false
	}
	b.bySource[src]++
	return true
}

func (b *bounded) giveBack(src netip.Prefix) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.bySource[src]--; b.bySource[src] == 0 {
		delete(b.bySource, src)
	}
}

// Close may be called more than once.
func (b *bounded) Close() error {
	b.closeOnce.Do(func() { close(b.done) })
	return b.Listener.Close()
}

type boundedConn struct {
	net.Conn
	release func()
	calls   atomic.Int32 // enrolments in progress

	mu     sync.Mutex
	timer  *time.Timer
	closed bool
}

// expire closes the connection after life, or after as long again when it enrols just then.
func (c *boundedConn) expire(life time.Duration, again bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.timer = time.AfterFunc(life, func() {
		if again && c.calls.Load() > 0 {
			c.expire(life, false)
			return
		}
		_ = c.Close() // gRPC sees that it ended
	})
}

// Close gives the slot back, once.
func (c *boundedConn) Close() error {
	defer c.release()
	c.mu.Lock()
	c.closed = true
	if c.timer != nil {
		c.timer.Stop()
	}
	c.mu.Unlock()
	return c.Conn.Close()
}
