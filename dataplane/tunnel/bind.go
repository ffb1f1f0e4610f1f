package tunnel

import (
	"fmt"
	"reflect"
	"sync/atomic"

	"github.com/tailscale/wireguard-go/conn"
)

// splitBind is the engine's standard bind, with IPv6 packets sent through a twin of it.
//
// The standard bind of the pinned version keeps destination addresses in one pool for both families. An address that
// was last used for IPv4 is four bytes long when the next IPv6 destination is copied into it: twelve bytes are lost,
// and the packet goes to a mixture of two addresses. A host whose peers are reached by both families would lose
// packets, and send them to strangers. The twin uses the same sockets with pools of its own, so that each pool sees one
// family. TestBothFamiliesAtOnce fails when this stops working; when it passes with the standard bind alone, this file
// can go.
type splitBind struct {
	conn.Bind // *conn.StdNetBind; receives, and sends IPv4
	six       atomic.Pointer[conn.StdNetBind]
}

func newSplitBind() *splitBind { return &splitBind{Bind: conn.NewStdNetBind()} }

// Open opens the sockets.
func (b *splitBind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	receive, actual, err := b.Bind.Open(port)
	if err != nil {
		return nil, 0, err
	}
	six, err := twin(b.Bind)
	if err != nil {
		_ = b.Bind.Close()
		return nil, 0, err
	}
	b.six.Store(six)
	return receive, actual, nil
}

// Close closes the sockets, which ends the receive functions.
func (b *splitBind) Close() error {
	b.six.Store(nil)
	return b.Bind.Close()
}

// Send sends a batch to one destination.
func (b *splitBind) Send(bufs [][]byte, to conn.Endpoint, offset int) error {
	if six := b.six.Load(); six != nil && to.DstIP().Is6() {
		return six.Send(bufs, to, offset)
	}
	return b.Bind.Send(bufs, to, offset)
}

// twin makes a bind that sends through the IPv6 socket of another. The fields are private to the engine, so they are
// found by name; a version without them is refused rather than run half-fixed.
func twin(of conn.Bind) (*conn.StdNetBind, error) {
	from, ok := of.(*conn.StdNetBind)
	to, ok2 := conn.NewStdNetBind().(*conn.StdNetBind)
	if !ok || !ok2 {
		return nil, fmt.Errorf("internal error: WireGuard's standard bind is a %T", of)
	}
	for _, name := range []string{"ipv6", "ipv6PC", "ipv6TxOffload", "ipv6RxOffload"} {
		src, dst := reflect.ValueOf(from).Elem().FieldByName(name), reflect.ValueOf(to).Elem().FieldByName(name)
		if !src.IsValid() {
			return nil, fmt.Errorf("internal error: WireGuard's standard bind has no field %s", name)
		}
		reflect.NewAt(dst.Type(), dst.Addr().UnsafePointer()).Elem().Set(reflect.NewAt(src.Type(), src.Addr().UnsafePointer()).Elem())
	}
	return to, nil
}
