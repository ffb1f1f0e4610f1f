package coordinator

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

const (
	ownDevice = "signet0" // the host may be in the mesh itself
	// rtfReject marks a route that only says that there is no way.
	rtfReject = 0x200
)

// addRoutes adds the networks of the host's main routing table. A default route leads everywhere and so says nothing
// about a range, whole or in the two halves that VPN clients like.
func addRoutes(networks map[netip.Prefix]string) error {
	for path, parse := range map[string]func([]string) (netip.Prefix, string, bool){"/proc/net/route": route4, "/proc/net/ipv6_route": route6} {
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without IPv6, or no Linux
		}
		if err != nil {
			return fmt.Errorf("read routes: %w", err)
		}
		for line := range strings.Lines(string(text)) {
			p, dev, ok := parse(strings.Fields(line))
			if _, known := networks[p]; ok && !known && p.Bits() > 1 && dev != ownDevice {
				networks[p] = dev
			}
		}
	}
	return nil
}

// route4 reads a line of /proc/net/route; the one with the headings is none.
func route4(f []string) (p netip.Prefix, dev string, ok bool) {
	if len(f) < 8 {
		return p, "", false
	}
	dst, err1 := strconv.ParseUint(f[1], 16, 32)
	flags, err2 := strconv.ParseUint(f[3], 16, 32)
	mask, err3 := strconv.ParseUint(f[7], 16, 32)
	if errors.Join(err1, err2, err3) != nil || flags&rtfReject != 0 {
		return p, "", false
	}
	var a [4]byte
	binary.NativeEndian.PutUint32(a[:], uint32(dst)) // the kernel prints the word as its memory has it
	bits := 0
	for ; mask != 0; mask &= mask - 1 {
		bits++
	}
	return netip.PrefixFrom(netip.AddrFrom4(a), bits).Masked(), f[0], true
}

// route6 reads a line of /proc/net/ipv6_route.
func route6(f []string) (p netip.Prefix, dev string, ok bool) {
	if len(f) < 10 {
		return p, "", false
	}
	dst, err1 := hex.DecodeString(f[0])
	bits, err2 := strconv.ParseUint(f[1], 16, 8)
	flags, err3 := strconv.ParseUint(f[8], 16, 32)
	if errors.Join(err1, err2, err3) != nil || len(dst) != 16 || bits > 128 || flags&rtfReject != 0 {
		return p, "", false
	}
	return netip.PrefixFrom(netip.AddrFrom16([16]byte(dst)), int(bits)).Masked(), f[9], true
}
