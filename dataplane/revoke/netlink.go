package revoke

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/internal/flow"
)

// netlink is one connection to the kernel's socket diagnosis, in the namespace of the thread that made it. It is used by
// one goroutine.
type netlink struct {
	fd  int
	seq uint32
	buf []byte
}

// receiveTimeout bounds the wait for one answer. The kernel answers within the call that asks; this is for a bug of ours.
const receiveTimeout = 2 * time.Second

// receiveSize is the largest datagram that the kernel makes of a listing.
const receiveSize = 64 << 10

func dial() (*netlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open socket diagnosis: %w", err)
	}
	timeout := unix.NsecToTimeval(receiveTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bound the wait for socket diagnosis: %w", err)
	}
	return &netlink{fd: fd, buf: make([]byte, receiveSize)}, nil
}

func (nl *netlink) close() { unix.Close(nl.fd) }

// dump calls f for each socket of one family and protocol that is in one of the states. After an error of f the connection
// is of no more use.
func (nl *netlink) dump(ctx context.Context, family uint8, proto flow.Proto, states uint32, f func(*listed) error) error {
	if err := nl.send(unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP, family, proto, states, sockID{}); err != nil {
		return err
	}
	for done := false; !done; {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := nl.receive(func(kind uint16, payload []byte) error {
			switch kind {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				done = true
				return errnoOf(payload)
			case unix.SOCK_DIAG_BY_FAMILY:
				l, err := decode(payload, proto)
				if err != nil {
					return err
				}
				return f(&l)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// destroy ends exactly the socket that was listed. One that is gone meanwhile is no error.
func (nl *netlink) destroy(l *listed) (gone bool, err error) {
	if err := nl.send(unix.SOCK_DESTROY, unix.NLM_F_ACK, l.family, l.proto, 0, l.id); err != nil {
		return false, err
	}
	answered := false
	for !answered {
		err := nl.receive(func(kind uint16, payload []byte) error {
			if kind != unix.NLMSG_ERROR {
				return nil
			}
			answered = true
			return errnoOf(payload)
		})
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) { // ESTALE: its name is another's by now
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("destroy socket: %w", err)
		}
	}
	return true, nil
}

func (nl *netlink) send(kind, flags uint16, family uint8, proto flow.Proto, states uint32, id sockID) error {
	nl.seq++
	b := request(kind, unix.NLM_F_REQUEST|flags, nl.seq, family, proto, states, id)
	if err := unix.Sendto(nl.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("ask socket diagnosis: %w", err)
	}
	return nil
}

// receive reads one datagram of answers to the last request; what answers an older one is passed over.
func (nl *netlink) receive(f func(kind uint16, payload []byte) error) error {
	n, from, err := unix.Recvfrom(nl.fd, nl.buf, 0)
	if errors.Is(err, unix.EINTR) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read socket diagnosis: %w", err)
	}
	if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 {
		return nil // not the kernel
	}
	return answers(nl.buf[:n], func(kind uint16, seq uint32, payload []byte) error {
		if seq != nl.seq {
			return nil
		}
		return f(kind, payload)
	})
}
