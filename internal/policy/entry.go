package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
)

// ErrService is wrapped by every refusal of a service.
var ErrService = errors.New("invalid service")

// Service is what a rule allows or denies: a protocol and a range of destination ports. The zero Service is "any".
type Service struct {
	Proto flow.Proto
	// First and Last bound the destination port, both inclusive; both 0 mean every port.
	First, Last uint16
}

// ParseService reads tcp/N, tcp/N-M, tcp, the same of udp and sctp, icmp or any.
func ParseService(s string) (Service, error) {
	proto, ports, hasPorts := strings.Cut(s, "/")
	switch proto {
	case "any":
		if !hasPorts {
			return Service{}, nil
		}
	case "icmp":
		if !hasPorts {
			return Service{Proto: flow.ICMP}, nil
		}
	case "tcp", "udp", "sctp":
		svc := Service{Proto: map[string]flow.Proto{"tcp": flow.TCP, "udp": flow.UDP, "sctp": flow.SCTP}[proto]}
		if !hasPorts {
			return svc, nil
		}
		first, last, isRange := strings.Cut(ports, "-")
		if !isRange {
			last = first
		}
		var err1, err2 error
		svc.First, err1 = parsePort(first)
		svc.Last, err2 = parsePort(last)
		if err1 == nil && err2 == nil && svc.First <= svc.Last {
			return svc, nil
		}
	}
	return Service{}, fmt.Errorf("%w %q: expected tcp/PORT, tcp/FIRST-LAST, udp/PORT, sctp/PORT, icmp or any, with ports 1 to 65535", ErrService, s)
}

// parsePort refuses signs, leading zeros and 0, so that each service has one spelling.
func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || s[0] == '0' {
		return 0, ErrService
	}
	return uint16(n), nil
}

// String is the form that ParseService reads.
func (s Service) String() string {
	switch {
	case s.First == 0:
		return s.Proto.String()
	case s.First == s.Last:
		return fmt.Sprintf("%v/%d", s.Proto, s.First)
	default:
		return fmt.Sprintf("%v/%d-%d", s.Proto, s.First, s.Last)
	}
}

// MarshalText writes the form that ParseService reads.
func (s Service) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is ParseService.
func (s *Service) UnmarshalText(b []byte) (err error) {
	*s, err = ParseService(string(b))
	return err
}

// Action is what a rule does. The zero value denies.
type Action uint8

// The actions.
const (
	ActionDeny  Action = 0
	ActionAllow Action = 1
)

// String is "deny" or "allow".
func (a Action) String() string {
	if a == ActionAllow {
		return "allow"
	}
	return "deny"
}

// Direction is seen from the local workload: Egress where it opens the flow, Ingress where the peer does.
type Direction uint8

// The directions; their numbers are those of bpf/lib/maps.h.
const (
	Egress  Direction = 0
	Ingress Direction = 1
)

// String is "egress" or "ingress".
func (d Direction) String() string {
	if d == Egress {
		return "egress"
	}
	return "ingress"
}

// Key is what the kernel looks up in a ruleset. Port 0 without Bits is every port, Proto AnyProto every protocol; a Key
// with AnyProto has port 0.
type Key struct {
	Peer  identity.Number
	Port  uint16 // destination port of the flow's first packet
	Proto flow.Proto
	Dir   Direction
	// Bits makes the Key one of a range: that many leading bits of Port count, 1 to 15, and the others are 0. Ranges of
	// one ruleset that are alike in all else do not overlap, so that at most one holds a port.
	Bits uint8
}

// MaxRangeBits is the longest prefix that is a range; a whole port is no range.
const MaxRangeBits = 15

// InRange gives the Key of the range of that many bits that holds k's port.
func (k Key) InRange(bits uint8) Key {
	k.Port, k.Bits = k.Port&^(1<<(16-bits)-1), bits
	return k
}

// Slot is one rule's word on a Key. The zero Slot is absent. A zero time bounds nothing.
type Slot struct {
	Rule                uint32 // the rule's number, never 0 in a Slot that is present
	NotBefore, NotAfter time.Time
	// Audit, of a rule that allows, means that it allows outside its time as well, on record.
	Audit bool
}

// Present reports whether a rule stands here.
func (s Slot) Present() bool { return s.Rule != 0 }

// Active reports whether the rule counts at now. NotAfter is exclusive.
func (s Slot) Active(now time.Time) bool {
	return s.Present() && !now.Before(s.NotBefore) && (s.NotAfter.IsZero() || now.Before(s.NotAfter))
}

// Value holds the rules that stand at one Key, one for each action. Audit is a rule that denies, in mode audit: what it
// would have denied is recorded and passes.
type Value struct{ Allow, Deny, Audit Slot }

// Present reports whether any rule stands here.
func (v Value) Present() bool { return v.Allow.Present() || v.Deny.Present() || v.Audit.Present() }

// Ruleset is the compiled policy of one local workload. Once it is part of a View it is never changed, so that Views
// share it, and what was made of it can be kept for as long as it lives.
type Ruleset map[Key]Value

// Entry is a Key with its Value: one line of a Ruleset.
type Entry struct {
	Key   Key
	Value Value
}

// Address says who owns an overlay address.
type Address struct {
	Number identity.Number
	// Local marks an address of a workload (or of the node) on this host.
	Local bool
	// Revoked marks a tombstone: the owner was taken back, and the refusal should say so.
	Revoked bool
	// NotAfter is the end of the Binding; the zero time means none (own addresses live as long as the lease).
	NotAfter time.Time
}

// AnyUID in a LocalKey matches every user.
const AnyUID = ^uint32(0)

// Traits are what a local workload's own policy asks for, beyond the overlay.
type Traits struct {
	Confined    bool // internet: deny: it reaches nothing outside the overlay and loopback
	OverlayOnly bool // listen: overlay: nobody opens a connection to it but at its overlay addresses and loopback
}

// LocalKey ties sockets to a workload: the socket's cgroup v2 id or that of an ancestor, and the socket's user.
type LocalKey struct {
	Cgroup uint64
	UID    uint32 // AnyUID for every user
}

// LeaseMode is what happens to overlay traffic when the lease has ended (agent key on_lease_end).
type LeaseMode uint8

// The lease modes; their numbers are those of bpf/lib/maps.h.
const (
	LeaseDenyAll LeaseMode = 0
	LeaseDenyNew LeaseMode = 1
)

// Lease is how long the host may go on without hearing from a coordinator.
type Lease struct {
	Ends time.Time
	Mode LeaseMode
}

// View is everything that one host's judge knows. It is immutable once made.
type View struct {
	Overlay4, Overlay6 netip.Prefix
	// Generation grows with each View that the enforcer makes real; it is local to the host.
	Generation uint64
	// Revision is the policy revision, for records.
	Revision  uint64
	Lease     Lease
	Addresses map[netip.Addr]Address
	Locals    map[LocalKey]identity.Number
	Rulesets  map[identity.Number]Ruleset
	// Traits of local workloads; those without any are left out.
	Traits map[identity.Number]Traits
	// Interfaces ties what arrives from and leaves by a network device of this host to the workload behind it, in a
	// network namespace of its own. The key is the device's index.
	Interfaces map[uint32]identity.Number
}

// Limits of one View; a View that exceeds them is refused whole. They size the kernel's maps.
const (
	MaxAddresses = 1 << 17
	MaxLocals    = 1 << 14
	MaxRulesets  = 1 << 12
	MaxEntries   = 1 << 21 // over all rulesets
	MaxDevices   = 1 << 12 // that have a workload behind them
)

// ErrView is wrapped by every refusal of a View.
var ErrView = errors.New("view cannot be enforced")

// Validate checks what the kernel relies on.
func (v *View) Validate() error { return v.ValidateNew(func(Ruleset) bool { return false }) }

// ValidateNew is Validate for a caller that knows some of the Rulesets to be sound, because it has validated them before:
// to walk a million entries for each change of another ruleset would take longer than the change.
func (v *View) ValidateNew(known func(Ruleset) bool) error {
	if !v.Overlay4.IsValid() || !v.Overlay4.Addr().Is4() || !v.Overlay6.IsValid() || !v.Overlay6.Addr().Is6() {
		return fmt.Errorf("%w: overlay prefixes %v and %v are not one IPv4 and one IPv6 prefix", ErrView, v.Overlay4, v.Overlay6)
	}
	if len(v.Addresses) > MaxAddresses || len(v.Locals) > MaxLocals || len(v.Rulesets) > MaxRulesets || len(v.Interfaces) > MaxDevices {
		return fmt.Errorf("%w: %d addresses, %d workload selectors, %d rulesets, %d interfaces; at most %d, %d, %d, %d",
			ErrView, len(v.Addresses), len(v.Locals), len(v.Rulesets), len(v.Interfaces), MaxAddresses, MaxLocals, MaxRulesets, MaxDevices)
	}
	for a := range v.Addresses {
		if !v.InOverlay(a) {
			return fmt.Errorf("%w: address %v is outside %v and %v", ErrView, a, v.Overlay4, v.Overlay6)
		}
	}
	entries := 0
	for n, rs := range v.Rulesets {
		entries += len(rs)
		if known(rs) {
			continue
		}
		if err := rs.Validate(); err != nil {
			return fmt.Errorf("%w: ruleset of %v: %w", ErrView, n, err)
		}
	}
	if entries > MaxEntries {
		return fmt.Errorf("%w: %d policy entries, at most %d", ErrView, entries, MaxEntries)
	}
	return nil
}

// Validate checks what the kernel relies on.
func (rs Ruleset) Validate() error {
	for k, val := range rs {
		switch {
		case k.Proto == flow.AnyProto && (k.Port != 0 || k.Bits != 0):
			return fmt.Errorf("an entry for port %d of every protocol", k.Port)
		case k.Bits > MaxRangeBits || k.Bits > 0 && k != k.InRange(k.Bits):
			return fmt.Errorf("port %d is not the first of a range of %d bits", k.Port, k.Bits)
		case !val.Present():
			return fmt.Errorf("an empty entry for peer %v", k.Peer)
		}
		for bits := k.Bits; bits > 1; bits-- {
			if _, ok := rs[k.InRange(bits-1)]; ok {
				return fmt.Errorf("two ranges of peer %v hold port %d of %v", k.Peer, k.Port, k.Proto)
			}
		}
	}
	return nil
}

// InOverlay reports whether a belongs to the overlay's ranges.
func (v *View) InOverlay(a netip.Addr) bool { return v.Overlay4.Contains(a) || v.Overlay6.Contains(a) }
