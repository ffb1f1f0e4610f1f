package pulse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// beat is the time between two packets of one flow in one direction.
	beat = 10 * time.Millisecond
	// warm is how many packets each flow has to get before the process says that all flow.
	warm = 5
	// maxPorts bounds the ports of one process.
	maxPorts    = 100
	dialTimeout = 3 * time.Second
)

// Report is what one end knows of one flow.
type Report struct {
	Network string         `json:"network"` // tcp or udp
	Local   netip.AddrPort `json:"local"`
	Remote  netip.AddrPort `json:"remote"`
	Got     int            `json:"got"`  // packets, or lines of a stream
	Last    int64          `json:"last"` // when the last of them came
	Ended   int64          `json:"ended"`
	Err     string         `json:"err"`   // the first error of the socket; empty when there was none
	Errno   string         `json:"errno"` // its name, such as ECONNABORTED
}

// Main runs one end of many flows:
//
//	serve FIRST COUNT ADDR...   one TCP and one UDP flow for each address and each of COUNT ports from FIRST on
//	dial FIRST COUNT ADDR...    the other end
//
// It prints "ready" when it listens, "flowing" when every flow has delivered, "over" when every socket has failed, and
// at SIGTERM one Report a line.
func Main(ctx context.Context, args []string, out io.Writer) error {
	if len(args) < 4 {
		return errors.New("usage: probe pulse serve|dial FIRST COUNT ADDR")
	}
	first, err := strconv.ParseUint(args[1], 10, 16)
	if err != nil {
		return fmt.Errorf("port: %w", err)
	}
	count, err := strconv.Atoi(args[2])
	if err != nil || count < 1 || count > maxPorts {
		return fmt.Errorf("count %q is not from 1 to %d", args[2], maxPorts)
	}
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	s := &set{out: out, want: 2 * count * (len(args) - 3)}
	open := s.dial
	if args[0] == "serve" {
		open = s.serve
	}
	for _, text := range args[3:] {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return fmt.Errorf("address: %w", err)
		}
		for port := range uint16(count) {
			if err := open(ctx, netip.AddrPortFrom(addr, uint16(first)+port)); err != nil {
				return err
			}
		}
	}
	fmt.Fprintln(out, "ready")
	<-ctx.Done()
	return s.report()
}

// set is the flows of one process. Its goroutines end with the process, which is what ends their sockets, too.
type set struct {
	want int
	out  io.Writer

	mu            sync.Mutex
	flows         []*Report
	flowing, over int
}

func (s *set) serve(ctx context.Context, at netip.AddrPort) error {
	var config net.ListenConfig
	ln, err := config.Listen(ctx, "tcp", at.String())
	if err != nil {
		return err
	}
	udp, err := config.ListenPacket(ctx, "udp", at.String())
	if err != nil {
		return err
	}
	go func() {
		if conn, err := ln.Accept(); err == nil {
			ln.Close()
			s.run(ctx, "tcp", conn, conn.Write)
		}
	}()
	go s.answer(ctx, udp.(*net.UDPConn))
	return nil
}

// answer binds a socket to the first that sends to it: only a connected socket can be told that its flow is over.
func (s *set) answer(ctx context.Context, conn *net.UDPConn) {
	_, from, err := conn.ReadFromUDPAddrPort(make([]byte, 1<<10))
	if err != nil {
		return
	}
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	if err := errors.Join(raw.Control(func(fd uintptr) { err = unix.Connect(int(fd), sockaddr(from)) }), err); err != nil {
		fmt.Fprintln(s.out, "error: connect:", err)
		return
	}
	s.run(ctx, "udp", bound{conn, from}, func(b []byte) (int, error) { return conn.WriteToUDPAddrPort(b, from) })
}

// bound is a datagram socket whose other end the net package does not know.
type bound struct {
	*net.UDPConn
	remote netip.AddrPort
}

// RemoteAddr is the end that the socket was connected to behind the net package's back.
func (b bound) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(b.remote) }

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func (s *set) dial(ctx context.Context, to netip.AddrPort) error {
	for _, network := range []string{"tcp", "udp"} {
		conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, to.String())
		if err != nil {
			return err
		}
		go s.run(ctx, network, conn, conn.Write)
	}
	return nil
}

// run keeps one flow busy until its socket fails for good. A datagram socket is tried further after its first error: what
// it gets or gives then counts.
func (s *set) run(ctx context.Context, network string, conn net.Conn, write func([]byte) (int, error)) {
	local, _ := netip.ParseAddrPort(conn.LocalAddr().String())
	remote, _ := netip.ParseAddrPort(conn.RemoteAddr().String())
	r := &Report{Network: network, Local: local, Remote: remote}
	s.mu.Lock()
	s.flows = append(s.flows, r)
	s.mu.Unlock()
	go func() {
		tick := time.NewTicker(beat)
		defer tick.Stop()
		for n := 0; ctx.Err() == nil; n++ {
			if _, err := write(fmt.Appendf(nil, "%015d\n", n)); err != nil && s.failed(r, err) {
				return
			}
			<-tick.C
		}
	}()
	buf := make([]byte, 1<<12)
	for ctx.Err() == nil {
		n, err := conn.Read(buf)
		if err == nil && n > 0 {
			s.got(r)
			continue
		}
		if err != nil && s.failed(r, err) {
			return
		}
	}
}

func (s *set) got(r *Report) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.Last = time.Now().UnixNano()
	if r.Got++; r.Got == warm {
		if s.flowing++; s.flowing == s.want {
			fmt.Fprintln(s.out, "flowing")
		}
	}
}

// failed notes the first error of a flow, and reports whether the socket is of no further use.
func (s *set) failed(r *Report, err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Ended == 0 {
		r.Ended, r.Err = time.Now().UnixNano(), err.Error()
		if errno := syscall.Errno(0); errors.As(err, &errno) {
			r.Errno = unix.ErrnoName(errno)
		}
		if s.over++; s.over == s.want {
			fmt.Fprintln(s.out, "over")
		}
	}
	return r.Network == "tcp" || errors.Is(err, net.ErrClosed)
}

func (s *set) report() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.flows {
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		fmt.Fprintln(s.out, strings.TrimSpace(string(line)))
	}
	return nil
}

// Parse reads the reports in what a process printed.
func Parse(text string) ([]Report, error) {
	var out []Report
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "{") {
			continue
		}
		var r Report
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			return nil, fmt.Errorf("read report: %w", err)
		}
		out = append(out, r)
	}
	return out, nil
}

// Run is Main on standard output.
func Run(ctx context.Context, args []string) error { return Main(ctx, args, os.Stdout) }
