package link

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Kind says what an Event is about.
type Kind uint8

// The kinds of events.
const (
	LinkChanged Kind = iota + 1
	AddressChanged
	RouteChanged
	// FilterChanged: a filter, or a queueing discipline with its filters, was removed, added or replaced.
	FilterChanged
	// Lost: the kernel had more to tell than its queue holds. Everything has to be looked at again.
	Lost
)

// Event is one change of the host's network configuration.
type Event struct {
	Kind   Kind
	Index  int          // of the interface; 0 when there is none
	Prefix netip.Prefix // the address or route
	Gone   bool         // it was removed
	Ours   bool         // a route with our mark
}

// Watcher reports changes until it is closed.
type Watcher struct {
	socket *nl.NetlinkSocket
	stop   func() bool
	close  sync.Once
	closed atomic.Bool // our own doing, so the read's error means nothing
	done   chan struct{}
	err    error // of the routine; read after done
}

// Watch calls report for each change of links, addresses, routes and filters in the network namespace of the calling thread,
// from one goroutine that Close, or the end of ctx, ends. The kernel's socket buffer is the queue: when report is too
// slow and it overflows, the event Lost comes in place of what was lost.
func Watch(ctx context.Context, report func(Event)) (*Watcher, error) {
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_TC)
	if err != nil {
		return nil, explain(fmt.Errorf("watch the network configuration: %w", err))
	}
	w := &Watcher{socket: socket, done: make(chan struct{})}
	w.stop = context.AfterFunc(ctx, w.shut)
	go w.routineWatch(ctx, report)
	return w, nil
}

// Close ends the watch and waits for its goroutine. It must not be called from report.
func (w *Watcher) Close() error {
	w.stop()
	w.shut()
	<-w.done
	return w.err
}

// Done is closed when the watch has ended, by Close, its context or an error that Close returns.
func (w *Watcher) Done() <-chan struct{} { return w.done }

// shut closes the socket, which ends the routine's read.
func (w *Watcher) shut() {
	w.close.Do(func() {
		w.closed.Store(true)
		w.socket.Close()
	})
}

func (w *Watcher) routineWatch(ctx context.Context, report func(Event)) {
	defer close(w.done)
	for ctx.Err() == nil {
		messages, from, err := w.socket.Receive()
		if w.closed.Load() {
			return
		}
		switch {
		case errors.Is(err, unix.ENOBUFS):
			report(Event{Kind: Lost})
			continue
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			w.err = fmt.Errorf("watch the network configuration: %w", err)
			return
		}
		if from.Pid != nl.PidKernel {
			continue // only the kernel's word counts
		}
		for _, m := range messages {
			if e, ok := decode(m); ok {
				report(e)
			}
		}
	}
}

// decode reads one message; ok is false for messages of other kinds and malformed ones.
func decode(m syscall.NetlinkMessage) (e Event, ok bool) {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if len(m.Data) < unix.SizeofIfInfomsg {
			return e, false
		}
		info := nl.DeserializeIfInfomsg(m.Data)
		return Event{Kind: LinkChanged, Index: int(info.Index), Gone: m.Header.Type == unix.RTM_DELLINK}, true
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(m.Data) < unix.SizeofIfAddrmsg {
			return e, false
		}
		info := nl.DeserializeIfAddrmsg(m.Data)
		p, _ := attributes(m.Data[unix.SizeofIfAddrmsg:], unix.IFA_ADDRESS, 0, int(info.Prefixlen))
		return Event{Kind: AddressChanged, Index: int(info.Index), Prefix: p, Gone: m.Header.Type == unix.RTM_DELADDR}, true
	case unix.RTM_DELQDISC, unix.RTM_NEWTFILTER, unix.RTM_DELTFILTER:
		if len(m.Data) < nl.SizeofTcMsg {
			return e, false
		}
		return Event{Kind: FilterChanged, Index: int(nl.DeserializeTcMsg(m.Data).Ifindex), Gone: m.Header.Type != unix.RTM_NEWTFILTER}, true
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(m.Data) < unix.SizeofRtMsg {
			return e, false
		}
		info := nl.DeserializeRtMsg(m.Data)
		if info.Flags&unix.RTM_F_CLONED != 0 {
			return e, false
		}
		p, index := attributes(m.Data[unix.SizeofRtMsg:], unix.RTA_DST, unix.RTA_OIF, int(info.Dst_len))
		return Event{Kind: RouteChanged, Index: index, Prefix: p, Gone: m.Header.Type == unix.RTM_DELROUTE, Ours: info.Protocol == routeProtocol}, true
	}
	return e, false
}

// attributes finds an address with the given prefix length, and an interface index where indexType is not 0. It ends at
// the first attribute that does not fit. (The library's parser trusts the padding of the last one.)
func attributes(b []byte, addrType, indexType uint16, bits int) (p netip.Prefix, index int) {
	for order := nl.NativeEndian(); len(b) >= unix.SizeofRtAttr; {
		size, kind := int(order.Uint16(b)), order.Uint16(b[2:])
		if size < unix.SizeofRtAttr || size > len(b) {
			break
		}
		value := b[unix.SizeofRtAttr:size]
		if addr, ok := netip.AddrFromSlice(value); ok && kind == addrType {
			p = netip.PrefixFrom(addr, bits)
		}
		if indexType != 0 && kind == indexType && len(value) >= 4 {
			index = int(order.Uint32(value))
		}
		padded := (size + unix.RTA_ALIGNTO - 1) &^ (unix.RTA_ALIGNTO - 1)
		b = b[min(padded, len(b)):]
	}
	return p, index
}
