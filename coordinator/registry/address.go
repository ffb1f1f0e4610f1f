package registry

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
)

// Overlay6For derives a trust domain's /48: fd and 40 bits of a hash, the shape of RFC 4193, so that two overlays on
// one host almost never meet.
func Overlay6For(td identity.TrustDomain) netip.Prefix {
	sum := sha256.Sum256([]byte(td.String()))
	b := [16]byte{0: 0xfd}
	copy(b[1:6], sum[:5])
	return netip.PrefixFrom(netip.AddrFrom16(b), 48)
}

// maxProbes bounds how many taken addresses are tried one by one; then all are read at once.
const maxProbes = 64

// takeAddresses gives an owner one address of each family. IPv4 goes round the range, so that an address rests as long
// as the range allows; IPv6 host parts are never used again.
func takeAddresses(tx store.Tx, owner string, now time.Time) (v4, v6 string, err error) {
	m, err := tx.Meta()
	if err != nil {
		return "", "", err
	}
	p4, err := netip.ParsePrefix(m.Overlay4)
	if err != nil {
		return "", "", fmt.Errorf("stored overlay: %w", err)
	}
	p6, err := netip.ParsePrefix(m.Overlay6)
	if err != nil {
		return "", "", fmt.Errorf("stored overlay: %w", err)
	}
	a4, err := take4(tx, p4, owner, now)
	if err != nil {
		return "", "", err
	}
	host, err := tx.Next(store.CounterHost6)
	if err != nil {
		return "", "", err
	}
	return a4.String(), host6(p6, host).String(), nil
}

func take4(tx store.Tx, p netip.Prefix, owner string, now time.Time) (netip.Addr, error) {
	size := uint64(1) << (32 - p.Bits())
	start, err := tx.Peek(store.CounterCursor4)
	if err != nil {
		return netip.Addr{}, err
	}
	var busy map[string]bool
	for i, probes := uint64(0), 0; i < size; i++ {
		offset := (start + i) % size
		a := host4(p, offset)
		if edge4(a) || busy[a.String()] {
			continue
		}
		if probes++; probes == maxProbes && busy == nil {
			if busy, err = busyAddresses(tx, now); err != nil {
				return netip.Addr{}, err
			}
		}
		taken, err := tx.TakeAddress(a.String(), owner, now)
		if err != nil {
			return netip.Addr{}, err
		}
		if taken {
			return a, tx.SetCursor(offset + 1)
		}
	}
	return netip.Addr{}, fmt.Errorf("%w: %s (addresses rest %v after removal)", ErrPoolExhausted, p, Quarantine)
}

func busyAddresses(tx store.Tx, now time.Time) (map[string]bool, error) {
	rows, err := tx.Addresses()
	if err != nil {
		return nil, err
	}
	busy := make(map[string]bool, len(rows))
	for _, a := range rows {
		if a.FreeAfter.IsZero() || a.FreeAfter.After(now) {
			busy[a.Address] = true
		}
	}
	return busy, nil
}

func host4(p netip.Prefix, offset uint64) netip.Addr {
	b := p.Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(offset))
	return netip.AddrFrom4(b)
}

func host6(p netip.Prefix, host uint64) netip.Addr {
	b := p.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], host)
	return netip.AddrFrom16(b)
}

// edge4 leaves out .0 and .255: too much software takes them for network and broadcast addresses, whatever the mask.
func edge4(a netip.Addr) bool {
	last := a.As4()[3]
	return last == 0 || last == 255
}
