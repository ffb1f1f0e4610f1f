package session

import (
	"net"
	"sync"
)

// bounded stops accepting while it has handed out as many connections as it may: further ones wait in the kernel's
// queue until one ends or the queue is full.
type bounded struct {
	net.Listener
	slots     chan struct{}
	done      chan struct{}
	closeOnce sync.Once
}

func newBounded(l net.Listener, limit int) *bounded {
	return &bounded{Listener: l, slots: make(chan struct{}, limit), done: make(chan struct{})}
}

// Accept waits for a slot first.
func (b *bounded) Accept() (net.Conn, error) {
	select {
	case b.slots <- struct{}{}:
	case <-b.done:
		return nil, net.ErrClosed
	}
	c, err := b.Listener.Accept()
	if err != nil {
		<-b.slots
		return nil, err
	}
	return &boundedConn{Conn: c, release: sync.OnceFunc(func() { <-b.slots })}, nil
}

// Close may be called more than once.
func (b *bounded) Close() error {
	b.closeOnce.Do(func() { close(b.done) })
	return b.Listener.Close()
}

type boundedConn struct {
	net.Conn
	release func()
}

// Close gives the slot back, once.
func (c *boundedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
