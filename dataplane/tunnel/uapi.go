package tunnel

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/signet-overlay/signet/internal/key"
)

// This file writes and reads WireGuard's configuration protocol (https://www.wireguard.com/xplatform/). The private
// key never passes through it: it is set through the engine's API, and skipped when the engine prints it.

// configCreate describes a new peer, without the addresses that it may use: see holdLocked. Its endpoint is named by its
// key, and stands for wherever it is: see roamingBind.
func configCreate(p Peer) string {
	return fmt.Sprintf("public_key=%s\nreplace_allowed_ips=true\nendpoint=%s\npersistent_keepalive_interval=%d\n",
		p.Key.Hex(), p.Key.Hex(), p.Keepalive/time.Second)
}

// configKeepalive sets the keepalive of a peer that exists.
func configKeepalive(p Peer) string {
	return fmt.Sprintf("public_key=%s\nupdate_only=true\npersistent_keepalive_interval=%d\n", p.Key.Hex(), p.Keepalive/time.Second)
}

// configRemove removes a peer.
func configRemove(k key.Public) string { return fmt.Sprintf("public_key=%s\nremove=true\n", k.Hex()) }

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
		if value != "" { // a peer that was never heard of and has no candidate
			r.peer.endpoint, err = netip.ParseAddrPort(value)
		}
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
