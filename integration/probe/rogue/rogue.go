// Package rogue is a host with a real node's keys and no judge of its own: whatever it likes leaves by its tunnel.
package rogue

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"

	"github.com/signet-overlay/signet/agent/state"
)

// Config says whose keys are used, against whom.
type Config struct {
	StateDir string         `json:"state_dir"` // of the node whose keys it uses
	KeyFile  string         `json:"key_file"`
	Listen   int            `json:"listen"`
	PeerKey  string         `json:"peer_key"` // hex
	Peer     netip.AddrPort `json:"peer"`     // the victim's underlay endpoint
	Own      netip.Addr     `json:"own"`      // an overlay address that the keys are bound to
	Stolen   netip.Addr     `json:"stolen"`   // one that they are not bound to
	Own6     netip.Addr     `json:"own6"`     // Own's twin
	Target   netip.AddrPort `json:"target"`   // forbidden to Own
	Target6  netip.AddrPort `json:"target6"`  // Target's twin
	Open     uint16         `json:"open"`     // a port of the target that Stolen may reach
	Rate     int            `json:"rate"`     // packets a second
}

// Run sends, in turn, what the policy forbids to its own identity and what it permits to one that it is not.
func Run(ctx context.Context, config string) error {
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
	fmt.Println("rogue as", id.Node)
	return c.flood(ctx, tunnel.Outbound)
}

func (c Config) flood(ctx context.Context, out chan<- []byte) error {
	packets := [][]byte{
		udpPacket(c.Own, c.Target), synPacket(c.Own, c.Target), ackPacket(c.Own, c.Target),
		udpPacket(c.Stolen, netip.AddrPortFrom(c.Target.Addr(), c.Target.Port())),
		synPacket(c.Stolen, netip.AddrPortFrom(c.Target.Addr(), c.Open)),
		udpPacket(c.Own6, c.Target6), synPacket(c.Own6, c.Target6),
	}
	// A timer of less than a millisecond is late more often than not: above that, several packets are due at each tick.
	tick := time.NewTicker(max(time.Second/time.Duration(c.Rate), time.Millisecond))
	defer tick.Stop()
	begin := time.Now()
	for i := 0; ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		due := 1
		if c.Rate > 1000 {
			due = min(int(time.Since(begin).Seconds()*float64(c.Rate))-i, maxDue)
		}
		for range due {
			select {
			case out <- packets[i%len(packets)]:
			case <-ctx.Done():
				return nil
			}
			if i++; i%1000 == 0 {
				fmt.Println("sent", i)
			}
		}
	}
}

// maxDue bounds what is made up for at once after the process had to wait.
const maxDue = 500

// sourcePort of every packet that it makes.
const sourcePort = 40000

// ip puts the header of the addresses' family before a payload.
func ip(proto byte, src, dst netip.Addr, payload []byte) []byte {
	if src.Is4() {
		return ipv4(proto, src, dst, payload)
	}
	p := make([]byte, 40, 40+len(payload)) // RFC 8200, section 3
	p[0], p[6], p[7] = 0x60, proto, 64
	binary.BigEndian.PutUint16(p[4:], uint16(len(payload)))
	copy(p[8:24], src.AsSlice())
	copy(p[24:40], dst.AsSlice())
	return append(p, payload...)
}

// ipv4 is the header of RFC 791.
func ipv4(proto byte, src, dst netip.Addr, payload []byte) []byte {
	p := make([]byte, 20, 20+len(payload))
	p[0], p[8], p[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(p[2:], uint16(20+len(payload)))
	copy(p[12:16], src.AsSlice())
	copy(p[16:20], dst.AsSlice())
	binary.BigEndian.PutUint16(p[10:], ^fold(sum(p)))
	return append(p, payload...)
}

func udpPacket(src netip.Addr, dst netip.AddrPort) []byte {
	u := append(make([]byte, 8), "forbidden\n"...)
	binary.BigEndian.PutUint16(u[0:], sourcePort)
	binary.BigEndian.PutUint16(u[2:], dst.Port())
	binary.BigEndian.PutUint16(u[4:], uint16(len(u)))
	binary.BigEndian.PutUint16(u[6:], ^fold(sum(u)+pseudo(17, src, dst.Addr(), len(u))))
	return ip(17, src, dst.Addr(), u)
}

func synPacket(src netip.Addr, dst netip.AddrPort) []byte { return tcpPacket(src, dst, 0x02) }

func ackPacket(src netip.Addr, dst netip.AddrPort) []byte { return tcpPacket(src, dst, 0x10) }

func tcpPacket(src netip.Addr, dst netip.AddrPort, flags byte) []byte {
	t := make([]byte, 20)
	binary.BigEndian.PutUint16(t[0:], sourcePort)
	binary.BigEndian.PutUint16(t[2:], dst.Port())
	t[12], t[13] = 5<<4, flags
	binary.BigEndian.PutUint16(t[14:], 0xffff)
	binary.BigEndian.PutUint16(t[16:], ^fold(sum(t)+pseudo(6, src, dst.Addr(), len(t))))
	return ip(6, src, dst.Addr(), t)
}

// sum, fold and pseudo are the Internet checksum (RFC 1071) and its pseudo header.
func sum(b []byte) (s uint32) {
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func pseudo(proto byte, src, dst netip.Addr, n int) uint32 {
	return sum(src.AsSlice()) + sum(dst.AsSlice()) + uint32(proto) + uint32(n)
}
