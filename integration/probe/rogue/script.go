package rogue

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/signet-overlay/signet/agent/state"
)

// maxLine bounds one line of a script, in bytes: a packet of 64 KiB in hex.
const maxLine = 1 << 18

// Script sends, by a real node's keys, the packets that it reads from standard input, one in hex a line, and prints "sent
// N" for the Nth and "got PROTO SRC > DST" for what comes back. Of the Config only keys and endpoints are used.
func Script(ctx context.Context, config string) error {
	text, err := os.ReadFile(config)
	if err != nil {
		return err
	}
	var c Config
	if err := json.Unmarshal(text, &c); err != nil {
		return fmt.Errorf("read %s: %w", config, err)
	}
	dir, err := state.Open(c.StateDir, c.KeyFile)
	if err != nil {
		return err
	}
	id, err := dir.LoadIdentity()
	if err != nil {
		return err
	}
	tunnel := tuntest.NewChannelTUN()
	d := device.NewDevice(tunnel.TUN(), conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, ""))
	defer d.Close()
	if err := d.IpcSet(fmt.Sprintf("private_key=%x\nlisten_port=%d\npublic_key=%s\nendpoint=%v\nallowed_ip=0.0.0.0/0\nallowed_ip=::/0\n",
		id.WireGuard.Reveal(), c.Listen, c.PeerKey, c.Peer)); err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	if err := d.Up(); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	go printInbound(ctx, tunnel.Inbound) // ends with ctx
	fmt.Println("rogue as", id.Node)
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, maxLine)
	for n := 1; in.Scan(); n++ {
		packet, err := hex.DecodeString(in.Text())
		if err != nil {
			return fmt.Errorf("packet %d: %w", n, err)
		}
		select {
		case tunnel.Outbound <- packet:
		case <-ctx.Done():
			return nil
		}
		fmt.Println("sent", n)
	}
	return in.Err()
}

// printInbound tells what the victim's host sends back.
func printInbound(ctx context.Context, in <-chan []byte) {
	for {
		select {
		case p := <-in:
			fmt.Println("got", describe(p))
		case <-ctx.Done():
			return
		}
	}
}

func describe(p []byte) string {
	var src, dst netip.Addr
	var proto byte
	var l4 []byte
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		src, dst, proto, l4 = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), p[9], p[min(len(p), int(p[0]&15)*4):]
	case len(p) >= 40:
		src, dst, proto, l4 = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), p[6], p[40:]
	}
	var sport, dport uint16
	if (proto == 6 || proto == 17) && len(l4) >= 4 {
		sport, dport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
	}
	return fmt.Sprintf("%d %v > %v", proto, netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport))
}
