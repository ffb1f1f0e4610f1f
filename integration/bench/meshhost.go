package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/dataplane"
	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// meshHost is one of two hosts whose dataplane is fed by hand, with more entries than one policy document makes.
type meshHost struct {
	Private          []byte     // WireGuard key
	Peer             key.Public // the peer's
	Endpoint         netip.AddrPort
	Own, Other, Node netip.Addr // overlay addresses: of the workload, of the peer's, of the host itself
	CgroupRoot       string
	Workload         string // cgroup directory
	BPFFS            string
	First            bool // the one that opens connections
	Entries          int
	Changes          int // of one small ruleset, a second
}

const (
	meshPort    = 51888
	meshDevice  = "mesh0"
	firstWork   = identity.Number(300)
	smallWork   = identity.Number(400) // its ruleset is what changes
	meshReports = time.Second
)

var meshRanges = [2]netip.Prefix{netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("fd5a:7::/48")}

// serve runs until ctx ends, and prints "ready", and then how many changes were made.
func (h *meshHost) serve(ctx context.Context, out io.Writer) error {
	private, err := key.PrivateFromBytes(h.Private)
	if err != nil {
		return fmt.Errorf("read the own key: %w", err)
	}
	d, err := dataplane.Open(ctx, dataplane.Config{
		Interface: meshDevice, ListenPort: meshPort, MTU: dataplane.DefaultMTU, PrivateKey: private,
		CgroupRoot: h.CgroupRoot, BPFFS: h.BPFFS, Overlay4: meshRanges[0], Overlay6: meshRanges[1],
	})
	if err != nil {
		return fmt.Errorf("open the dataplane: %w", err)
	}
	defer d.Close()
	view, err := h.view()
	if err != nil {
		return err
	}
	self := mesh.Self{Addresses: []netip.Addr{h.Node}, Overlay4: meshRanges[0], Overlay6: meshRanges[1]}
	if err := d.UpdateHost(ctx, self, []netip.Addr{h.Own}); err != nil {
		return fmt.Errorf("set up the device: %w", err)
	}
	peer := mesh.Peer{Key: h.Peer, AllowedIPs: []netip.Addr{h.Other}, Endpoints: []netip.AddrPort{h.Endpoint}}
	if err := d.UpdatePeer(ctx, peer); err != nil {
		return fmt.Errorf("add the peer: %w", err)
	}
	if err := d.Enforce(ctx, view); err != nil {
		return fmt.Errorf("enforce: %w", err)
	}
	fmt.Fprintln(out, "ready")
	return h.change(ctx, d, view, out)
}

// change gives the dataplane another view so many times a second, of which one small ruleset is another.
func (h *meshHost) change(ctx context.Context, d *dataplane.Dataplane, v *policy.View, out io.Writer) error {
	if h.Changes == 0 {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(time.Second / time.Duration(h.Changes))
	defer tick.Stop()
	reported := time.Now()
	for made := 0; ; made++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		next := *v
		next.Revision++
		next.Rulesets = map[identity.Number]policy.Ruleset{}
		for n, rs := range v.Rulesets {
			next.Rulesets[n] = rs
		}
		next.Rulesets[smallWork] = policy.Ruleset{
			{Peer: firstWork, Port: 1, Proto: flow.UDP, Dir: policy.Egress}: {Allow: policy.Slot{Rule: uint32(1 + next.Revision)}},
		}
		if err := d.Enforce(ctx, &next); err != nil && ctx.Err() == nil {
			return fmt.Errorf("change %d: %w", made, err)
		}
		v = &next
		if time.Since(reported) >= meshReports {
			fmt.Fprintf(out, "changes %.0f a second\n", float64(made)/time.Since(reported).Seconds())
			made, reported = 0, time.Now()
		}
	}
}

// view lets the first host's workload open the measurement's port and ping, beside many entries that nobody uses.
func (h *meshHost) view() (*policy.View, error) {
	cgroup, err := enforce.CgroupID(h.Workload)
	if err != nil {
		return nil, err
	}
	own, other, dir := firstWork, firstWork+1, policy.Egress
	if !h.First {
		own, other, dir = other, own, policy.Ingress
	}
	rs := policy.Ruleset{
		{Peer: other, Port: iperfPort, Proto: flow.TCP, Dir: dir}: {Allow: policy.Slot{Rule: 1}},
		{Peer: other, Proto: flow.ICMP, Dir: dir}:                 {Allow: policy.Slot{Rule: 2}},
	}
	for i := len(rs); i < h.Entries; i++ {
		k := policy.Key{Peer: 1000 + identity.Number(i/1000), Port: uint16(1 + i%1000), Proto: flow.TCP, Dir: policy.Ingress}
		rs[k] = policy.Value{Allow: policy.Slot{Rule: uint32(i + 1)}}
	}
	return &policy.View{
		Overlay4: meshRanges[0], Overlay6: meshRanges[1], Lease: policy.Lease{Ends: time.Now().Add(24 * time.Hour)},
		Addresses: map[netip.Addr]policy.Address{
			h.Own: {Number: own, Local: true}, h.Other: {Number: other}, h.Node: {Number: 299, Local: true},
		},
		Locals:   map[policy.LocalKey]identity.Number{{Cgroup: cgroup, UID: policy.AnyUID}: own},
		Rulesets: map[identity.Number]policy.Ruleset{own: rs},
	}, nil
}

// readMeshHost reads a host as startMesh wrote it.
func readMeshHost(in io.Reader) (*meshHost, error) {
	h := &meshHost{}
	if err := json.NewDecoder(in).Decode(h); err != nil {
		return nil, fmt.Errorf("read the host: %w", err)
	}
	return h, nil
}
