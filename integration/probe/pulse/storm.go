package pulse

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/integration/probe/attack"
	"github.com/signet-overlay/signet/integration/probe/forge"
)

const (
	// burst is the time between two looks at how many packets are due.
	burst = 2 * time.Millisecond
	// maxDue bounds what is made up for at once after the process had to wait.
	maxDue = 500
	// stormPort is the source port of packets that are made by hand.
	stormPort = 40001
)

// Storm sends datagrams at a rate, in turn to each target, and keeps the rate on a machine where timers are late:
//
//	socket RATE ADDR:PORT...   from one unconnected socket of each family
//	raw RATE SRC4 SRC6 ADDR:PORT...   from raw sockets, with these sources, as UDP datagrams and as TCP segments in turn
//
// A send that is refused counts as tried. It prints "sent N refused M" about each second and ends with ctx.
func Storm(ctx context.Context, args []string) error {
	if len(args) < 3 {
		return errors.New("usage: probe storm socket|raw RATE [SRC4 SRC6] ADDR:PORT")
	}
	rate, err := strconv.Atoi(args[1])
	if err != nil || rate < 1 || rate > 100000 {
		return fmt.Errorf("rate %q is not from 1 to 100000", args[1])
	}
	targets := args[2:]
	var src [2]netip.Addr
	if args[0] == "raw" {
		for i := range src {
			if src[i], err = netip.ParseAddr(args[2+i]); err != nil {
				return fmt.Errorf("source: %w", err)
			}
		}
		targets = args[4:]
	}
	var sends []func() error
	for _, text := range targets {
		to, err := netip.ParseAddrPort(text)
		if err != nil {
			return fmt.Errorf("target: %w", err)
		}
		more, err := senders(args[0], src, to)
		if err != nil {
			return err
		}
		sends = append(sends, more...)
	}
	return pace(ctx, rate, sends)
}

// senders opens the sockets for one target; they end with the process.
func senders(kind string, src [2]netip.Addr, to netip.AddrPort) ([]func() error, error) {
	family, from := unix.AF_INET, src[0]
	if to.Addr().Is6() {
		family, from = unix.AF_INET6, src[1]
	}
	payload := []byte(attack.Token + "storm")
	if kind == "socket" {
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return nil, fmt.Errorf("open socket: %w", err)
		}
		return []func() error{func() error { return unix.Sendto(fd, payload, 0, sockaddr(to)) }}, nil
	}
	// Both families take the header from the packet with this protocol.
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return nil, fmt.Errorf("open raw socket: %w", err)
	}
	source := netip.AddrPortFrom(from, stormPort)
	var out []func() error
	for _, packet := range [][]byte{forge.UDPPacket(source, to, payload), forge.TCPPacket(source, to, forge.SYN, nil)} {
		out = append(out, func() error { return unix.Sendto(fd, packet, 0, sockaddr(netip.AddrPortFrom(to.Addr(), 0))) })
	}
	return out, nil
}

// pace calls the senders in turn, rate times a second in all.
func pace(ctx context.Context, rate int, sends []func() error) error {
	tick := time.NewTicker(burst)
	defer tick.Stop()
	begin, said := time.Now(), time.Now()
	tried, sent, refused := 0, 0, 0
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		due := int(time.Since(begin).Seconds()*float64(rate)) - tried
		for range min(due, maxDue) {
			if err := sends[tried%len(sends)](); err != nil {
				refused++
			} else {
				sent++
			}
			tried++
		}
		if time.Since(said) > time.Second/4 {
			said = time.Now()
			fmt.Println("sent", sent, "refused", refused)
		}
	}
}
