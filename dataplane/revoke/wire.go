package revoke

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/internal/flow"
)

// The socket diagnosis interface of netlink (Linux, include/uapi/linux/inet_diag.h and sock_diag.h). Headers are in the
// machine's byte order; addresses and ports inside a socket's name are in network order.

const (
	headerSize  = 16 // struct nlmsghdr
	idSize      = 48 // struct inet_diag_sockid
	requestSize = 8 + idSize
	messageSize = 4 + idSize + 20 // struct inet_diag_msg, without attributes
)

// The states of a TCP socket (Linux, include/net/tcp_states.h); a connected UDP socket is established.
const (
	stateEstablished = 1
	stateSynSent     = 2
	stateFinWait1    = 4
	stateFinWait2    = 5
	stateCloseWait   = 8
)

// Somebody learns from the end of a connection in these states, as in bpf/revoke.c.
const (
	tcpStates = 1<<stateEstablished | 1<<stateSynSent | 1<<stateFinWait1 | 1<<stateFinWait2 | 1<<stateCloseWait
	udpStates = 1 << stateEstablished
)

var errWire = errors.New("netlink message is malformed")

// sockID is a socket's name for the kernel: what a dump says is given back as it is, cookie included, so that exactly
// that socket is meant.
type sockID [idSize]byte

// listed is one socket of a dump.
type listed struct {
	family uint8
	proto  flow.Proto
	state  uint8
	id     sockID
	uid    uint32
	inode  uint32 // 0 when no process has it (yet, or any more)
}

// tuple is the socket's flow from this host's side.
func (l *listed) tuple() flow.Tuple {
	return flow.Tuple{Src: l.end(0, 4), Dst: l.end(2, 20), Proto: l.proto}
}

// end reads a port and an address of the name. IPv4 stands in the first four bytes of an address.
func (l *listed) end(port, addr int) netip.AddrPort {
	p := binary.BigEndian.Uint16(l.id[port:])
	if l.family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(l.id[addr:addr+4])), p)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(l.id[addr:addr+16])).Unmap(), p)
}

// left reports whether nobody would learn: the process closed its end and let the socket go.
func (l *listed) left() bool {
	return l.inode == 0 && (l.state == stateFinWait1 || l.state == stateFinWait2)
}

// request writes a message about sockets of one family and protocol: a dump with a zero id, or what to destroy.
func request(kind, flags uint16, seq uint32, family uint8, proto flow.Proto, states uint32, id sockID) []byte {
	b := make([]byte, 0, headerSize+requestSize)
	b = binary.NativeEndian.AppendUint32(b, headerSize+requestSize)
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0) // to the kernel
	b = append(b, family, uint8(proto), 0, 0)
	b = binary.NativeEndian.AppendUint32(b, states)
	return append(b, id[:]...)
}

// answers calls f for each message of a datagram: its kind, its sequence number and what it carries.
func answers(b []byte, f func(kind uint16, seq uint32, payload []byte) error) error {
	for len(b) > 0 {
		if len(b) < headerSize {
			return fmt.Errorf("%w: %d bytes for a header", errWire, len(b))
		}
		n := binary.NativeEndian.Uint32(b)
		if n < headerSize || uint64(n) > uint64(len(b)) {
			return fmt.Errorf("%w: length %d of %d", errWire, n, len(b))
		}
		if err := f(binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:]), b[headerSize:n]); err != nil {
			return err
		}
		b = b[min(uint64(n+3)&^3, uint64(len(b))):]
	}
	return nil
}

// decode reads one socket of a dump.
func decode(payload []byte, proto flow.Proto) (l listed, err error) {
	if len(payload) < messageSize {
		return l, fmt.Errorf("%w: %d bytes for a socket", errWire, len(payload))
	}
	l = listed{family: payload[0], state: payload[1], proto: proto, id: sockID(payload[4 : 4+idSize])}
	if l.family != unix.AF_INET && l.family != unix.AF_INET6 {
		return l, fmt.Errorf("%w: family %d", errWire, l.family)
	}
	tail := payload[4+idSize:] // expires, rqueue, wqueue, uid, inode
	l.uid, l.inode = binary.NativeEndian.Uint32(tail[12:]), binary.NativeEndian.Uint32(tail[16:])
	return l, nil
}

// errnoOf reads the verdict of an error message; nil for success.
func errnoOf(payload []byte) error {
	if len(payload) < 4 {
		return fmt.Errorf("%w: %d bytes for an error", errWire, len(payload))
	}
	if n := int32(binary.NativeEndian.Uint32(payload)); n < 0 {
		return unix.Errno(-n)
	}
	return nil
}
