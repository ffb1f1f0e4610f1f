// Command probe is the client and server of tests: a process that is put into a workload's cgroup and then opens, or
// accepts, one kind of traffic, and says on standard output what happened, one line for each event.
//
//	probe serve NETWORK ADDR          tcp: echo lines; udp: print and echo datagrams
//	probe dial NETWORK ADDR           one exchange; prints "ok" or the error, with the time it took
//	probe stream NETWORK ADDR PERIOD  one exchange per period on one socket, for as long as it works
//	probe flood NETWORK ADDR PERIOD   datagrams that expect no answer, whatever refuses them
//	probe bare NAME                   wireguard-go without Signet, for benchmarks (bare.go)
//	probe enrol COORDINATOR TOKENFILE COUNT NAME   many hosts that join at once (enrol.go)
//	probe rogue CONFIG                packets of a host that has valid keys and no judge (package rogue)
//	probe script CONFIG               the same host, with the packets that are read from standard input
//	probe attack JSON                 one thing that a hostile process does (package attack)
//	probe share ADDR                  udp on a port that others share (SO_REUSEPORT)
//	probe pulse serve|dial FIRST COUNT ADDR...     many flows that are busy in both directions (package pulse)
//	probe storm socket|raw RATE ...   datagrams that nobody may get, at a rate (package pulse)
//	probe witness PORT...             prints all that reaches this cgroup, and serves the ports
//
// Every run ends by itself after ten minutes.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/signet-overlay/signet/integration/probe/attack"
	"github.com/signet-overlay/signet/integration/probe/pulse"
	"github.com/signet-overlay/signet/integration/probe/rogue"
)

const (
	lifetime    = 10 * time.Minute
	dialTimeout = 3 * time.Second
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), lifetime)
	defer cancel()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	usage := errors.New("usage: probe serve|dial NETWORK ADDR, probe stream|flood NETWORK ADDR PERIOD, probe rogue CONFIG")
	if len(args) < 2 {
		return usage
	}
	verb, rest := args[0], args[1:]
	switch {
	case verb == "serve" && len(rest) == 2 && strings.HasPrefix(rest[0], "tcp"):
		return serveTCP(ctx, rest[0], rest[1])
	case verb == "serve" && len(rest) == 2:
		return serveUDP(ctx, rest[0], rest[1])
	case verb == "dial" && len(rest) == 2:
		return dial(ctx, rest[0], rest[1])
	case (verb == "stream" || verb == "flood") && len(rest) == 3:
		period, err := time.ParseDuration(rest[2])
		if err != nil {
			return usage
		}
		if verb == "flood" {
			return flood(ctx, rest[0], rest[1], period)
		}
		return stream(ctx, rest[0], rest[1], period)
	case verb == "bare" && len(rest) == 1:
		return bare(ctx, rest[0])
	case verb == "enrol" && len(rest) == 4:
		return enrol(ctx, rest)
	case verb == "rogue" && len(rest) == 1:
		return rogue.Run(ctx, rest[0])
	case verb == "script" && len(rest) == 1:
		return rogue.Script(ctx, rest[0])
	case verb == "attack" && len(rest) == 1:
		return attack.Main(ctx, rest[0])
	case verb == "share" && len(rest) == 1:
		return attack.Share(ctx, rest[0], os.Stdout)
	case verb == "pulse":
		return pulse.Run(ctx, rest)
	case verb == "storm":
		return pulse.Storm(ctx, rest)
	case verb == "witness":
		return attack.Witness(ctx, rest, os.Stdout)
	}
	return usage
}

func serveTCP(ctx context.Context, network, addr string) error {
	ln, err := new(net.ListenConfig).Listen(ctx, network, addr)
	if err != nil {
		return err
	}
	defer ln.Close()
	context.AfterFunc(ctx, func() { ln.Close() })
	fmt.Println("serving", ln.Addr())
	for {
		conn, err := ln.Accept()
		if err != nil {
			return err
		}
		fmt.Println("accepted", conn.RemoteAddr())
		go echo(conn)
	}
}

// echo ends with its connection; the process ends with its lifetime.
func echo(conn net.Conn) {
	defer conn.Close()
	in := bufio.NewScanner(conn)
	for in.Scan() {
		fmt.Println("got", in.Text())
		if _, err := fmt.Fprintln(conn, in.Text()); err != nil {
			return
		}
	}
}

func serveUDP(ctx context.Context, network, addr string) error {
	conn, err := new(net.ListenConfig).ListenPacket(ctx, network, addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	context.AfterFunc(ctx, func() { conn.Close() })
	fmt.Println("serving", conn.LocalAddr())
	buf := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		fmt.Println("got", strings.TrimSpace(string(buf[:n])), "from", from)
		// A refused answer shows at the asker; the server goes on.
		_, _ = conn.WriteTo(buf[:n], from)
	}
}

func dial(ctx context.Context, network, addr string) error {
	start := time.Now()
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, addr)
	if err == nil {
		defer conn.Close()
		err = exchange(conn, "hello", dialTimeout)
	}
	took := time.Since(start).Round(time.Millisecond)
	if err != nil {
		return fmt.Errorf("after %v: %w", took, err)
	}
	fmt.Println("ok after", took, "from", conn.LocalAddr())
	return nil
}

func exchange(conn net.Conn, text string, limit time.Duration) error {
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(conn, text); err != nil {
		return err
	}
	got, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return err
	}
	if strings.TrimSpace(got) != text {
		return fmt.Errorf("sent %q, got %q", text, got)
	}
	return nil
}

// stream sends one numbered line per period. Each answer is printed with its time; one that stays away is not the end:
// the flow may come back.
func stream(ctx context.Context, network, addr string, period time.Duration) error {
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	context.AfterFunc(ctx, func() { conn.Close() })
	fmt.Println("streaming from", conn.LocalAddr())
	go printAnswers(conn)
	return every(ctx, period, func(i int) error {
		_, err := fmt.Fprintf(conn, "%d\n", i)
		if strings.HasPrefix(network, "udp") {
			return nil // what the hooks refuse now they may pass later
		}
		return err
	})
}

// flood sends one datagram per period, from a new socket where the last one was refused.
func flood(ctx context.Context, network, addr string, period time.Duration) error {
	var conn net.Conn
	sent, refused := 0, 0
	return every(ctx, period, func(i int) error {
		err := errors.New("no socket")
		if conn == nil {
			conn, err = (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, addr)
		}
		if conn != nil {
			_, err = fmt.Fprintln(conn, "forbidden")
		}
		if err == nil {
			sent++
		} else {
			refused++
			if conn != nil {
				conn.Close()
				conn = nil
			}
		}
		if i%1000 == 0 {
			fmt.Println("sent", sent, "refused", refused)
		}
		return nil
	})
}

// every calls f once per period, until it fails or ctx ends.
func every(ctx context.Context, period time.Duration, f func(i int) error) error {
	tick := time.NewTicker(period)
	defer tick.Stop()
	for i := 1; ; i++ {
		if err := f(i); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func printAnswers(conn net.Conn) {
	in := bufio.NewReader(conn)
	for {
		line, err := in.ReadString('\n')
		var n net.Error
		if err != nil && (errors.Is(err, net.ErrClosed) || !errors.As(err, &n)) {
			fmt.Println("error:", err)
			return
		}
		if err == nil {
			fmt.Println("answer", strings.TrimSpace(line), "at", time.Now().UnixMilli())
		}
	}
}
