package codec

import (
	"fmt"
	"math"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/proto/signetv1"
)

// decodeRuleset reads the body of a ruleset section; what it returns holds what policy.Ruleset.Validate checks.
func decodeRuleset(body []byte) (identity.Number, policy.Ruleset, error) {
	var m signetv1.Ruleset
	if err := unmarshal("ruleset", body, &m); err != nil {
		return 0, nil, err
	}
	n, err := number(m.Number)
	if err != nil {
		return 0, nil, err
	}
	if len(m.Entries) > policy.MaxEntries {
		return 0, nil, malformed("ruleset of %v has %d entries", n, len(m.Entries))
	}
	rs := make(policy.Ruleset, len(m.Entries))
	for _, e := range m.Entries {
		k, v, err := decodeEntry(e)
		if err != nil {
			return 0, nil, fmt.Errorf("ruleset of %v: %w", n, err)
		}
		if _, twice := rs[k]; twice {
			return 0, nil, malformed("ruleset of %v has peer %v twice", n, k.Peer)
		}
		rs[k] = v
	}
	if err := rs.Validate(); err != nil {
		return 0, nil, malformed("ruleset of %v: %v", n, err)
	}
	return n, rs, nil
}

func decodeEntry(e *signetv1.Entry) (policy.Key, policy.Value, error) {
	var k policy.Key
	var v policy.Value
	peer, err := number(e.Peer)
	if err != nil {
		return k, v, err
	}
	port := e.Port
	if e.PortBits > 0 {
		port ^= rangeMark // a range without the mark is out of bounds below
	}
	if e.Proto > math.MaxUint8 || port > math.MaxUint16 || e.PortBits > policy.MaxRangeBits {
		return k, v, malformed("entry for protocol %d, port %d, %d bits", e.Proto, e.Port, e.PortBits)
	}
	k = policy.Key{Peer: peer, Proto: flow.Proto(e.Proto), Port: uint16(port), Bits: uint8(e.PortBits)}
	if !askable(k) {
		return k, v, malformed("entry for protocol %d, port %d, %d bits", e.Proto, e.Port, e.PortBits)
	}
	if e.Ingress {
		k.Dir = policy.Ingress
	}
	if len(e.ProtoReflect().GetUnknown()) > 0 {
		return k, v, malformed("entry for peer %v has a field that this version does not know", peer)
	}
	for _, s := range [...]struct {
		out  *policy.Slot
		in   *signetv1.Slot
		mark bool // may be marked audit
	}{{&v.Allow, e.Allow, true}, {&v.Deny, e.Deny, false}, {&v.Audit, e.Audit, false}} {
		if s.in == nil {
			continue
		}
		if s.in.Rule == 0 || s.in.Audit && !s.mark || len(s.in.ProtoReflect().GetUnknown()) > 0 {
			return k, v, malformed("entry for peer %v says something of rule %d that this version does not know", peer, s.in.Rule)
		}
		*s.out = policy.Slot{Rule: s.in.Rule, NotBefore: fromUnix(s.in.NotBeforeUnix), NotAfter: fromUnix(s.in.NotAfterUnix), Audit: s.in.Audit}
	}
	if !v.Present() {
		return k, v, malformed("entry for peer %v has no rule", peer)
	}
	return k, v, nil
}

// askable reports whether a flow can be looked up by the Key: any other would be meant for something and do nothing.
func askable(k policy.Key) bool {
	switch k.Proto {
	case flow.TCP, flow.UDP, flow.SCTP:
		return true
	case flow.AnyProto, flow.ICMP:
		return k.Port == 0 && k.Bits == 0
	}
	return false
}
