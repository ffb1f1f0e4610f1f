package attack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/integration/probe/forge"
)

// Token begins what every attack carries in its payload; what follows, up to a character that is neither a letter, a
// digit nor a dash, names the attack.
const Token = "tok-"

// maxPacket bounds what a witness reads of one packet, in bytes.
const maxPacket = 1 << 16

// Witness prints everything of the overlay that reaches this process's cgroup, whatever its protocol: raw sockets get a
// copy of each packet that the host delivers, but only past the judge of their cgroup. It also serves TCP and UDP on the
// ports, so that connections can come about. Lines are
//
//	saw PROTO SRC > DST TOKEN
//	accepted SRC on PORT
//
// with a dash for no token. It ends with ctx, or when a socket fails.
func Witness(ctx context.Context, ports []string, out io.Writer) error {
	w := &witness{out: out}
	defer w.close()
	for _, proto := range []int{forge.ICMP, forge.TCP, forge.UDP, forge.Experiment} {
		if err := w.open(unix.AF_INET, proto); err != nil {
			return err
		}
	}
	for _, proto := range []int{forge.TCP, forge.UDP, forge.ICMPv6, forge.Experiment} {
		if err := w.open(unix.AF_INET6, proto); err != nil {
			return err
		}
	}
	for _, port := range ports {
		if err := w.serve(ctx, port); err != nil {
			return err
		}
	}
	failed := make(chan error, len(w.raws))
	for _, r := range w.raws {
		go func() { failed <- w.watch(r) }() // ends when close closes its socket
	}
	w.say("witness ready")
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}

type witness struct {
	raws    []rawSocket
	closers []io.Closer

	mu  sync.Mutex
	out io.Writer
}

type rawSocket struct {
	file  *os.File
	six   bool
	proto int
}

func (w *witness) say(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fmt.Fprintf(w.out, format+"\n", args...)
}

func (w *witness) close() {
	for _, c := range w.closers {
		c.Close()
	}
}

func (w *witness) open(family, proto int) error {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return fmt.Errorf("open raw socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "raw")
	w.closers = append(w.closers, f)
	if family == unix.AF_INET6 {
		// The destination is only in the ancillary data.
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1); err != nil {
			return fmt.Errorf("ask for destinations: %w", err)
		}
	}
	w.raws = append(w.raws, rawSocket{file: f, six: family == unix.AF_INET6, proto: proto})
	return nil
}

func (w *witness) watch(r rawSocket) error {
	raw, err := r.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	buf, oob := make([]byte, maxPacket), make([]byte, 256)
	for {
		var n, nOOB int
		var from unix.Sockaddr
		var readErr error
		if err := raw.Read(func(fd uintptr) bool {
			n, nOOB, _, from, readErr = unix.Recvmsg(int(fd), buf, oob, 0)
			return !errors.Is(readErr, unix.EAGAIN)
		}); err != nil {
			return fmt.Errorf("watch: %w", err)
		}
		if readErr != nil {
			return fmt.Errorf("watch: %w", readErr)
		}
		if r.six {
			w.saw6(r.proto, buf[:n], oob[:nOOB], from)
		} else {
			w.saw4(buf[:n])
		}
	}
}

func (w *witness) saw4(p []byte) {
	if len(p) < 20 || len(p) < int(p[0]&15)*4 {
		return
	}
	src, dst := netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	w.saw(int(p[9]), src, dst, p[int(p[0]&15)*4:])
}

func (w *witness) saw6(proto int, p, oob []byte, from unix.Sockaddr) {
	s, ok := from.(*unix.SockaddrInet6)
	messages, err := unix.ParseSocketControlMessage(oob)
	if !ok || err != nil || len(messages) == 0 || len(messages[0].Data) < 16 {
		return
	}
	w.saw(proto, netip.AddrFrom16(s.Addr), netip.AddrFrom16([16]byte(messages[0].Data[:16])), p)
}

func (w *witness) saw(proto int, src, dst netip.Addr, p []byte) {
	token := tokenIn(p)
	if !overlay(src) && !overlay(dst) && token == "-" {
		return
	}
	name, ports := fmt.Sprintf("proto-%d", proto), false
	switch proto {
	case forge.TCP:
		name, ports = "tcp", len(p) >= 4
	case forge.UDP:
		name, ports = "udp", len(p) >= 4
	case forge.ICMP, forge.ICMPv6:
		name = "icmp"
	}
	var sport, dport uint16
	if ports {
		sport, dport = binary.BigEndian.Uint16(p), binary.BigEndian.Uint16(p[2:])
	}
	w.say("saw %s %v > %v %s", name, netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport), token)
}

// tokenIn finds the name of an attack in its bytes.
func tokenIn(p []byte) string {
	at := bytes.Index(p, []byte(Token))
	if at < 0 {
		return "-"
	}
	end := at
	for end < len(p) && (p[end] == '-' || p[end] >= '0' && p[end] <= '9' || p[end] >= 'a' && p[end] <= 'z') {
		end++
	}
	return string(p[at:end])
}

// Share prints the datagrams that come to a port which others may share (SO_REUSEPORT), until ctx ends.
func Share(ctx context.Context, addr string, out io.Writer) error {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if control := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); control != nil {
			return control
		}
		return err
	}}
	conn, err := config.ListenPacket(ctx, "udp", addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	defer conn.Close()
	context.AfterFunc(ctx, func() { conn.Close() })
	fmt.Fprintln(out, "serving", conn.LocalAddr())
	buf := make([]byte, maxPacket)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		fmt.Fprintln(out, "got", tokenIn(buf[:n]), "from", from)
	}
}

// serve takes connections and echoes datagrams on a port, of both families.
func (w *witness) serve(ctx context.Context, port string) error {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", ":"+port)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	pc, err := new(net.ListenConfig).ListenPacket(ctx, "udp", ":"+port)
	if err != nil {
		ln.Close()
		return fmt.Errorf("listen: %w", err)
	}
	w.closers = append(w.closers, ln, pc)
	go func() { // ends when close closes the listener
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			w.say("accepted %v on %s", conn.RemoteAddr(), port)
			go func() { // ends with its connection, or with the process
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	go func() { // ends when close closes the socket
		buf := make([]byte, maxPacket)
		for {
			n, from, err := pc.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				// A refused answer shows at the asker.
				_, _ = pc.WriteTo(buf[:n], from)
			}
		}
	}()
	return nil
}
