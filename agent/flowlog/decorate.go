package flowlog

import (
	"cmp"
	"crypto/sha1" // #nosec: Community ID is defined over SHA-1; nothing is secured by it
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
)

// Names is what the numbers of one snapshot stand for. It is immutable.
type Names struct {
	Revision uint64
	own      string // node of the snapshot
	ids      map[identity.Number]identity.ID
	rules    map[uint32]string
	nodes    map[netip.Addr]string // who has an address
}

// NamesOf gathers the names of a snapshot; nil gives none.
func NamesOf(s *mesh.Snapshot) *Names {
	n := &Names{ids: map[identity.Number]identity.ID{}, nodes: map[netip.Addr]string{}}
	if s == nil {
		return n
	}
	n.Revision, n.rules, n.own = s.Manifest.PolicyRevision, s.Rules, s.Self.Node
	add := func(num identity.Number, id identity.ID, node string, addrs []netip.Addr) {
		n.ids[num] = id
		for _, a := range addrs {
			n.nodes[a] = node
		}
	}
	for num, id := range s.Names {
		n.ids[num] = id
	}
	for _, b := range s.Bindings {
		add(b.Number, b.ID, b.Node, b.Addresses)
	}
	for _, w := range s.Workloads {
		add(w.Number, w.ID, s.Self.Node, w.Addresses)
	}
	add(s.Self.Number, s.Self.ID, s.Self.Node, s.Self.Addresses)
	return n
}

// decorate makes a record of an observation. unit belongs to the local end.
func decorate(o flow.Observation, n *Names, node, unit string) flow.Record {
	r := flow.Record{Schema: flow.Schema, Event: o.Event, Time: o.At, Observer: flow.Observer{Node: node, Side: o.Local},
		Src: n.end(o.Src, o.Tuple.Src), Dst: n.end(o.Dst, o.Tuple.Dst), Proto: o.Tuple.Proto.String(),
		CommunityID: communityID(o.Tuple), Count: 1, Verdict: o.Verdict, Reason: o.Reason, PolicyRevision: n.Revision,
		BytesOut: o.BytesOut, BytesIn: o.BytesIn, PacketsOut: o.PacketsOut, PacketsIn: o.PacketsIn, Start: o.Start,
		EndReason: o.EndReason, LostBefore: o.Lost}
	if o.FlowID != 0 {
		r.FlowID = fmt.Sprintf("%016x", o.FlowID)
	}
	if o.Event == flow.EventEnd {
		r.End = o.At
	}
	if o.Rule != 0 {
		if r.Rule = n.rules[o.Rule]; r.Rule == "" {
			r.Rule = "rule-" + strconv.FormatUint(uint64(o.Rule), 10)
		}
	}
	n.local(&r, o, cmp.Or(n.own, node), unit)
	return r
}

// local fills in what the host knows of its own ends without a snapshot. The socket is the source's where both ends are
// here. A connection that was refused before it had a source address has none in the record, and no Community ID: one
// of an address that nobody sent from would join it with nothing.
func (n *Names) local(r *flow.Record, o flow.Observation, node, unit string) {
	switch o.Local {
	case "src":
		r.Src.Node, r.Src.Unit, r.Src.PID = node, unit, o.PID
	case "local":
		r.Src.Node, r.Src.Unit, r.Src.PID = node, unit, o.PID
		r.Dst.Node = node
	case "dst":
		r.Dst.Node, r.Dst.Unit, r.Dst.PID = node, unit, o.PID
	}
	if o.Tuple.Src.Addr().IsUnspecified() {
		r.Src.IP, r.Src.Port, r.CommunityID = netip.Addr{}, 0, ""
	}
}

func (n *Names) end(num identity.Number, at netip.AddrPort) flow.End {
	id := n.ids[num]
	return flow.End{ID: id, Zone: id.Zone().String(), Node: n.nodes[at.Addr()], IP: at.Addr(), Port: at.Port()}
}

// communityID is version 1 with seed 0 (github.com/corelight/community-id-spec). For echo, which is all of ICMP that
// is tracked, the ports are the types of request and reply.
func communityID(t flow.Tuple) string {
	if !t.Src.Addr().IsValid() || !t.Dst.Addr().IsValid() {
		return ""
	}
	src, dst := t.Src, t.Dst
	switch t.Proto {
	case flow.ICMP:
		src, dst = netip.AddrPortFrom(src.Addr(), 8), netip.AddrPortFrom(dst.Addr(), 0)
	case flow.ICMPv6:
		src, dst = netip.AddrPortFrom(src.Addr(), 128), netip.AddrPortFrom(dst.Addr(), 129)
	}
	if src.Compare(dst) > 0 {
		src, dst = dst, src
	}
	b := []byte{0, 0} // seed
	b = append(b, src.Addr().AsSlice()...)
	b = append(b, dst.Addr().AsSlice()...)
	b = append(b, byte(t.Proto), 0)
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	sum := sha1.Sum(b) // #nosec
	return "1:" + base64.StdEncoding.EncodeToString(sum[:])
}
