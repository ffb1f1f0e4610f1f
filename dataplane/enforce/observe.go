package enforce

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// EventKind says what an Event tells. The numbers are those of bpf/lib/events.h.
type EventKind uint8

// The kinds of events. EventLoss comes from the reader: it tells only LostBefore.
const (
	EventLoss  EventKind = 0
	EventStart EventKind = bpf.EventStart
	EventEnd   EventKind = bpf.EventEnd
	EventDeny  EventKind = bpf.EventDeny
	EventAudit EventKind = bpf.EventAudit // a rule in mode audit would have denied the flow
)

// FlowID names a flow on this host: when it began, on the kernel's clock, and a hash of its tuple.
type FlowID struct{ Created, Random uint64 }

// Event is something that the judge did.
type Event struct {
	Kind       EventKind
	Time       time.Time
	Tuple      flow.Tuple // of the flow's first packet; of the packet itself where it was denied
	Verdict    flow.Verdict
	Reason     flow.Reason
	Rule       uint32
	Src, Dst   identity.Number
	Hook       policy.Hook // of a denial
	TCPFlags   uint8
	Local      Local
	Flow       FlowID
	Began      time.Time // of the flow; zero for a denial
	Sent       Traffic   // from the source, at the end of a flow
	Received   Traffic   // from the destination
	View       Version   // that judged
	LostBefore uint64    // events that found no room since the last one
}

// Local is the socket of this host, as far as it is known: that of the source where both ends are here. The end of a
// flow has that of its beginning, if this reader has seen it.
type Local struct {
	Cgroup   uint64
	UID, PID uint32 // PID only for calls
}

// Traffic counts what passed in one direction.
type Traffic struct{ Packets, Bytes uint64 }

// Version is a View by its numbers; flows carry only the generation.
type Version struct{ Generation, Revision uint64 }

// The reader looks by itself, because programs wake it only when much is queued: soon while records arrive, and less and
// less often on a host where nothing happens.
const (
	readerTick    = 100 * time.Millisecond
	readerMaxTick = 800 * time.Millisecond
)

// Events gives every event to f, in the order of the kernel's ring, until ctx ends. There is one reader at a time; f
// must not keep it long, since what finds no room is lost (and counted, see Event.LostBefore).
func (e *Enforcer) Events(ctx context.Context, f func(Event)) error {
	r, err := ringbuf.NewReader(e.coll.Maps[mapEvents])
	if err != nil {
		return explain(fmt.Errorf("open the event ring: %w", err))
	}
	defer r.Close()
	known, err := lostEvents(e.coll.Maps[mapLost])
	if err != nil {
		return err
	}
	var rec ringbuf.Record
	sockets := begun{}
	clk, tick := readClock(), readerTick
	for ctx.Err() == nil {
		r.SetDeadline(time.Now().Add(tick))
		err := r.ReadInto(&rec)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("read the event ring: %w", err)
		}
		if err != nil {
			clk = readClock()
			lost, err := lostEvents(e.coll.Maps[mapLost])
			if err != nil {
				return err
			}
			if lost != known {
				f(Event{Kind: EventLoss, Time: clk.wall, LostBefore: lost - known})
				known = lost
			}
			tick = min(2*tick, readerMaxTick)
			continue
		}
		tick = readerTick
		if ev, ok := decodeEvent(rec.RawSample, clk); ok {
			sockets.fill(&ev)
			f(ev)
		}
	}
	return nil
}

// begun remembers the sockets of flows that have begun, for the records of their ends: the kernel's own entries are too
// dear for what is looked at once.
type begun map[FlowID]Local

// maxBegun bounds what is remembered; beyond it the ends of some flows do not name their sockets.
const maxBegun = 1 << 16

func (b begun) fill(e *Event) {
	switch e.Kind {
	case EventStart:
		if len(b) < maxBegun {
			b[e.Flow] = e.Local
		}
	case EventEnd:
		if l, ok := b[e.Flow]; ok {
			e.Local = l
			delete(b, e.Flow)
		}
	}
}

// decodeEvent reads one record of the ring.
func decodeEvent(b []byte, clk clock) (Event, bool) {
	var raw bpf.JudgeEvent
	if len(b) < int(unsafe.Sizeof(raw)) {
		return Event{}, false
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&raw)), unsafe.Sizeof(raw)), b)
	t := bpf.JudgeTuple{Src: raw.Src, Dst: raw.Dst, Sport: raw.Sport, Dport: raw.Dport, Proto: raw.Proto}
	return Event{
		Kind: EventKind(raw.Kind), Time: clk.time(raw.Time), Tuple: tupleOf(t),
		Verdict: flow.Verdict(raw.Verdict), Reason: flow.Reason(raw.Reason), Rule: raw.Rule,
		Src: identity.Number(raw.SrcNumber), Dst: identity.Number(raw.DstNumber),
		Hook: policy.Hook(raw.Hook), TCPFlags: raw.Tcp,
		Local:    Local{Cgroup: raw.Cgroup, UID: raw.Uid, PID: raw.Pid},
		Flow:     flowOf(raw.Created, tupleOf(t)),
		Began:    clk.time(raw.Created),
		Sent:     Traffic{Packets: raw.Packets[0], Bytes: raw.Bytes[0]},
		Received: Traffic{Packets: raw.Packets[1], Bytes: raw.Bytes[1]},
		View:     Version{Generation: raw.Generation, Revision: raw.Revision},
	}, true
}

// flowOf is the name of an event's flow; a denial belongs to none.
func flowOf(created uint64, t flow.Tuple) FlowID {
	if created == 0 {
		return FlowID{}
	}
	return flowID(created, t)
}

// lostEvents is how many events found no room since the map was made.
func lostEvents(m *ebpf.Map) (sum uint64, err error) {
	var perCPU []uint64
	if err := m.Lookup(uint32(0), &perCPU); err != nil {
		return 0, fmt.Errorf("read the count of lost events: %w", err)
	}
	for _, n := range perCPU {
		sum += n
	}
	return sum, nil
}

// CounterKey says what a counter counts.
type CounterKey struct {
	Verdict flow.Verdict
	Reason  flow.Reason
	Hook    policy.Hook
}

// MapFill is how full a map of the kernel is.
type MapFill struct {
	Name          string
	Entries, Size int
}

// Counters is what the judge counted since its maps were made. What is none of Signet's business is not counted.
type Counters struct {
	Verdicts map[CounterKey]uint64
	Lost     uint64
	Fill     []MapFill
}

const counterVerdicts = 4

// Counters reads the counters and how full the maps are. It walks the maps: not for every second.
func (e *Enforcer) Counters() (Counters, error) {
	c := Counters{Verdicts: map[CounterKey]uint64{}}
	var perCPU []uint64
	for slot := range uint32(counterVerdicts * bpf.CounterHooks * bpf.CounterReasons) {
		if err := e.coll.Maps[mapCounters].Lookup(slot, &perCPU); err != nil {
			return c, fmt.Errorf("read counter %d: %w", slot, err)
		}
		var sum uint64
		for _, n := range perCPU {
			sum += n
		}
		if sum > 0 {
			c.Verdicts[counterKey(slot)] = sum
		}
	}
	var err error
	if c.Lost, err = lostEvents(e.coll.Maps[mapLost]); err != nil {
		return c, err
	}
	c.Fill, err = e.fill()
	return c, err
}

func counterKey(slot uint32) CounterKey {
	return CounterKey{
		Verdict: flow.Verdict(slot / (bpf.CounterHooks * bpf.CounterReasons)),
		Hook:    policy.Hook(slot / bpf.CounterReasons % bpf.CounterHooks),
		Reason:  flow.Reason(slot % bpf.CounterReasons),
	}
}

func (e *Enforcer) fill() ([]MapFill, error) {
	m := e.coll.Maps
	n := map[string]int{}
	err := errors.Join(
		each(m[mapConns4], func(*bpf.JudgeTuple4, *bpf.JudgeConn) bool { n[mapConns4]++; return true }),
		each(m[mapConns6], func(*bpf.JudgeTuple, *bpf.JudgeConn) bool { n[mapConns6]++; return true }),
		each(m[mapAddrs], func(*bpf.JudgeAddrKey, *bpf.JudgeAddr) bool { n[mapAddrs]++; return true }),
		each(m[mapLocals], func(*bpf.JudgeLocalKey, *uint32) bool { n[mapLocals]++; return true }),
		each(m[mapRulesets], func(_ *uint32, r *bpf.JudgeRuleset) bool {
			n[mapRulesets]++
			n[mapEntries] += int(r.Entries)
			n[mapRanges] += int(r.Ranges)
			return true
		}))
	if err != nil {
		return nil, err
	}
	var out []MapFill
	for _, name := range []string{mapConns4, mapConns6, mapEntries, mapRanges, mapAddrs, mapLocals, mapRulesets} {
		out = append(out, MapFill{Name: name, Entries: n[name], Size: int(m[name].MaxEntries())})
	}
	return out, nil
}

// Flow is one tracked connection.
type Flow struct {
	ID             FlowID
	Tuple          flow.Tuple // of the first packet
	Src, Dst       identity.Number
	Rule           uint32
	Generation     uint64 // that judged it last
	Began          time.Time
	Expires        time.Time // to be judged again, or up to 67 ms before; zero for never
	Sent, Received Traffic   // packets modulo 2^32
}

// Flows lists tracked connections, at most limit of them (0: all), in no order. Idle ones that are not swept yet are
// left out.
func (e *Enforcer) Flows(limit int) ([]Flow, error) {
	clk := readClock()
	var out []Flow
	err := eachConn(e.coll.Maps, func(k bpf.JudgeTuple, c *bpf.JudgeConn) bool {
		if c.Deadline > uint32(clk.mono>>bpf.ConnStep) {
			out = append(out, decodeConn(k, c, clk))
		}
		return limit == 0 || len(out) < limit
	})
	return out, err
}

func decodeConn(k bpf.JudgeTuple, c *bpf.JudgeConn, clk clock) Flow {
	t := tupleOf(k)
	if c.State&bpf.ConnSwapped != 0 {
		t = t.Reverse()
	}
	return Flow{
		ID: flowID(c.Created, t), Tuple: t,
		Src: identity.Number(c.Number[0]), Dst: identity.Number(c.Number[1]),
		Rule: c.Rule, Generation: c.Generation,
		Began: clk.time(c.Created), Expires: clk.time(uint64(c.Expires) << bpf.ConnStep),
		Sent:     Traffic{Packets: uint64(c.Packets[0]), Bytes: c.Bytes[0]},
		Received: Traffic{Packets: uint64(c.Packets[1]), Bytes: c.Bytes[1]},
	}
}

// flowID names a flow: no two conversations of one tuple begin in the same nanosecond.
func flowID(created uint64, t flow.Tuple) FlowID {
	h := fnv.New64a()
	for _, a := range [...]netip.AddrPort{t.Src, t.Dst} {
		b := a.Addr().As16()
		h.Write(b[:])
		h.Write([]byte{byte(a.Port() >> 8), byte(a.Port())})
	}
	h.Write([]byte{byte(t.Proto)})
	return FlowID{Created: created, Random: h.Sum64()}
}

// routineSweep removes idle connections until ctx ends.
func (e *Enforcer) routineSweep(ctx context.Context) {
	defer close(e.swept)
	if e.cfg.SweepEvery < 0 {
		return
	}
	tick := time.NewTicker(e.cfg.SweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if _, err := sweep(e.coll.Programs[progSweep]); err != nil {
				e.log.Warn("idle connections were not swept", "error", err)
			}
		}
	}
}

const progSweep = "sweep"

// sweep runs the kernel's sweep once, and returns how many connections it removed.
func sweep(prog *ebpf.Program) (int, error) {
	// The packet is not looked at; the harness wants one.
	n, err := prog.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	if err != nil {
		return 0, fmt.Errorf("sweep connections: %w", err)
	}
	return int(n), nil
}
