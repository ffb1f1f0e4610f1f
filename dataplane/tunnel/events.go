package tunnel

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tailscale/wireguard-go/device"
)

// The engine tells what cryptokey routing refused, and how its handshakes go, only to its logger. These are the format
// strings of the pinned version; they are matched as a whole, never the rendered text, which a peer's data could
// influence. The tests of this package fail when an upgrade changes one.
const (
	logRefused4   = "IPv4 packet with disallowed source address from %v"
	logRefused6   = "IPv6 packet with disallowed source address from %v"
	logInitiation = "%v - Sending handshake initiation"
	logResponse   = "%v - Received handshake response"
	logHeard      = "%v - Received handshake initiation"
	logSilent     = "%s - Retrying handshake because we stopped hearing back after %d seconds"
	logUnanswered = "%s - Handshake did not complete after %d seconds, retrying (try %d)"
)

// events gathers what the engine's logger reveals of each peer. The engine calls it from its packet paths and while it
// holds its own locks: it must neither block nor call back.
type events struct {
	log   *slog.Logger
	wake  func() // something changed that the endpoint routine should look at soon; never blocks
	epoch time.Time
	peers sync.Map // *device.Peer -> *marks; bounded by the engine's peers
}

// marks belong to one peer. The times are nanoseconds since the epoch of events, 0 means never.
type marks struct {
	refused  atomic.Uint64
	sent     atomic.Int64 // our last initiation
	answered atomic.Int64 // the response to it
	heard    atomic.Int64 // the peer's last initiation
	silent   atomic.Bool  // taken by the endpoint routine
}

func newEvents(log *slog.Logger, wake func()) *events {
	// One second back, so that no time of an event is 0.
	return &events{log: log, wake: wake, epoch: time.Now().Add(-time.Second)}
}

// logger is the form the engine wants.
func (e *events) logger() *device.Logger {
	return &device.Logger{Verbosef: e.verbosef, Errorf: e.print}
}

func (e *events) verbosef(format string, args ...any) {
	switch format {
	case logRefused4, logRefused6:
		if m := e.of(args); m != nil {
			m.refused.Add(1)
		}
	case logInitiation:
		if m := e.of(args); m != nil {
			m.sent.Store(e.now())
		}
	case logResponse:
		if m := e.of(args); m != nil {
			m.answered.Store(e.now())
			e.wake()
		}
	case logHeard:
		if m := e.of(args); m != nil {
			m.heard.Store(e.now())
			e.wake()
		}
	case logSilent, logUnanswered:
		if m := e.of(args); m != nil {
			m.silent.Store(true)
			e.wake()
		}
	}
	e.print(format, args...)
}

// print hands a line to slog at debug level. The engine's lines hold no keys: it prints peers abbreviated.
func (e *events) print(format string, args ...any) {
	ctx := context.Background()
	if e.log.Enabled(ctx, slog.LevelDebug) {
		e.log.LogAttrs(ctx, slog.LevelDebug, fmt.Sprintf(format, args...), slog.String("from", "wireguard"))
	}
}

// of finds the marks of the peer that a line is about; nil when it is about none.
func (e *events) of(args []any) *marks {
	if len(args) == 0 {
		return nil
	}
	peer, ok := args[0].(*device.Peer)
	if !ok || peer == nil {
		return nil
	}
	return e.at(peer)
}

func (e *events) at(peer *device.Peer) *marks {
	if m, ok := e.peers.Load(peer); ok {
		return m.(*marks)
	}
	m, _ := e.peers.LoadOrStore(peer, new(marks))
	return m.(*marks)
}

// forget drops the marks of a peer that the engine has removed. The engine waits for the peer's routines first, but a
// handshake worker may still log about it: such a late entry is dropped by the next sweep.
func (e *events) forget(peer *device.Peer) { e.peers.Delete(peer) }

// sweep drops the marks of peers that are not in keep.
func (e *events) sweep(keep map[*device.Peer]struct{}) {
	e.peers.Range(func(k, _ any) bool {
		if _, ok := keep[k.(*device.Peer)]; !ok {
			e.peers.Delete(k)
		}
		return true
	})
}

// now is the time as it is stored in marks.
func (e *events) now() int64 { return int64(time.Since(e.epoch)) }

// time turns a mark back; zero for never.
func (e *events) time(mark int64) time.Time {
	if mark == 0 {
		return time.Time{}
	}
	return e.epoch.Add(time.Duration(mark))
}
