package tunnel

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/signet-overlay/signet/internal/key"
)

// This file writes and reads WireGuard's configuration protocol (https://www.wireguard.com/xplatform/). The private
// key never passes through it: it is set through the engine's API, and skipped when the engine prints it.

// configCreate describes a new peer.
func configCreate(p Peer) string {
	var b strings.Builder
	fmt.Fprintf(&b, "public_key=%s\nreplace_allowed_ips=true\n", p.Key.Hex())
	if len(p.Endpoints) > 0 {
		fmt.Fprintf(&b, "endpoint=%s\n", p.Endpoints[0])
	}
	fmt.Fprintf(&b, "persistent_keepalive_interval=%d\n", p.Keepalive/time.Second)
	for _, a := range p.AllowedIPs {
		fmt.Fprintf(&b, "allowed_ip=%s\n", a)
	}
	return b.String()
}

// configChange describes the difference between two descriptions of a peer; empty when WireGuard need not know. It adds
// and removes single addresses, because replacing the whole list would refuse packets of the addresses that stay.
func configChange(old, p Peer) string {
	var b strings.Builder
	if old.Keepalive != p.Keepalive {
		fmt.Fprintf(&b, "persistent_keepalive_interval=%d\n", p.Keepalive/time.Second)
	}
	for _, a := range p.AllowedIPs {
		if !hasPrefix(old.AllowedIPs, a) {
			fmt.Fprintf(&b, "allowed_ip=%s\n", a)
		}
	}
	for _, a := range old.AllowedIPs {
		if !hasPrefix(p.AllowedIPs, a) {
			fmt.Fprintf(&b, "allowed_ip=-%s\n", a)
		}
	}
	if b.Len() == 0 {
		return ""
	}
	return fmt.Sprintf("public_key=%s\nupdate_only=true\n%s", p.Key.Hex(), b.String())
}

// configEndpoint sets the endpoint of a peer that exists.
func configEndpoint(k key.Public, e netip.AddrPort) string {
	return fmt.Sprintf("public_key=%s\nupdate_only=true\nendpoint=%s\n", k.Hex(), e)
}

// configRemove removes a peer.
func configRemove(k key.Public) string { return fmt.Sprintf("public_key=%s\nremove=true\n", k.Hex()) }

// hasPrefix searches a list in normal form.
func hasPrefix(sorted []netip.Prefix, p netip.Prefix) bool {
	_, ok := slices.BinarySearchFunc(sorted, p, comparePrefix)
	return ok
}

// report is what the engine says of itself.
type report struct {
	listenPort int
	peers      map[key.Public]peerReport
}

// peerReport is what the engine says of a peer.
type peerReport struct {
	endpoint   netip.AddrPort
	handshake  time.Time
	rx, tx     uint64
	allowedIPs int
}

// reportReader parses the engine's answer while it is written. The engine writes it in one piece from a buffer of its
// own, and nothing of it is kept, so that the private key in it is not copied.
type reportReader struct {
	report report
	key    key.Public
	peer   peerReport
	secs   int64
}

// Write takes the whole answer.
func (r *reportReader) Write(answer []byte) (int, error) {
	r.report.peers = make(map[key.Public]peerReport)
	for line := range bytes.Lines(answer) {
		name, value, ok := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte("="))
		if !ok || string(name) == "private_key" || string(name) == "preshared_key" {
			continue
		}
		if err := r.take(string(name), string(value)); err != nil {
			return 0, fmt.Errorf("read %s: %w", name, err)
		}
	}
	r.flush()
	return len(answer), nil
}

// take reads one line; lines of no interest are passed over.
func (r *reportReader) take(name, value string) (err error) {
	switch name {
	case "listen_port":
		r.report.listenPort, err = strconv.Atoi(value)
	case "public_key":
		r.flush()
		var raw []byte
		if raw, err = hex.DecodeString(value); err == nil {
			r.key, err = key.PublicFromBytes(raw)
		}
	case "endpoint":
		r.peer.endpoint, err = netip.ParseAddrPort(value)
	case "last_handshake_time_sec":
		r.secs, err = strconv.ParseInt(value, 10, 64)
	case "last_handshake_time_nsec":
		var nanos int64
		if nanos, err = strconv.ParseInt(value, 10, 64); err == nil && (r.secs != 0 || nanos != 0) {
			r.peer.handshake = time.Unix(r.secs, nanos)
		}
	case "tx_bytes":
		r.peer.tx, err = strconv.ParseUint(value, 10, 64)
	case "rx_bytes":
		r.peer.rx, err = strconv.ParseUint(value, 10, 64)
	case "allowed_ip":
		r.peer.allowedIPs++
	}
	return err
}

func (r *reportReader) flush() {
	if !r.key.IsZero() {
		r.report.peers[r.key] = r.peer
	}
	r.key, r.peer, r.secs = key.Public{}, peerReport{}, 0
}
