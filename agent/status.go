package agent

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/agent/reconcile"
	"github.com/signet-overlay/signet/agent/state"
	"github.com/signet-overlay/signet/dataplane"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/version"
)

// Status puts together what every part says of itself.
func (a *Agent) Status() localapi.Status {
	s := localapi.Status{Version: version.Version, Node: localapi.Node{Name: a.cfg.Node}, Workloads: a.Workloads(), SVIDs: []localapi.SVID{},
		Warnings: []string{}, Enforcement: localapi.Enforcement{Mode: "none", Hooks: []localapi.Hook{}},
		Tunnel: localapi.Tunnel{Kind: "userspace", Interface: a.cfg.Interface, Port: a.cfg.ListenPort}}
	s.Clocks.OnLeaseEnd, s.NotServed = a.cfg.OnLeaseEnd, a.cfg.notServed()
	rec := a.rec.Status()
	s.Revision = rec.PolicyRevision
	for _, o := range rec.Failed {
		s.Objects = append(s.Objects, localapi.Object{Kind: o.Kind, Name: o.Name, Error: o.Err.Error(), Since: o.Since, Tries: o.Tries})
	}
	a.mu.Lock()
	s.Connected, s.Coordinator = a.online != "", a.online
	s.RefusedSnapshot, s.Session = text(a.refused), text(a.lost)
	for _, topic := range slices.Sorted(maps.Keys(a.warnings)) {
		s.Warnings = append(s.Warnings, a.warnings[topic])
	}
	s.Warnings = append(append(s.Warnings, a.match.Warnings...), s.NotServed...) // people read the warnings
	pending, position := a.pending, a.position
	a.mu.Unlock()
	now := time.Now()
	a.statusIdentity(&s, now)
	snap := a.snapshot()
	a.statusSnapshot(&s, snap, now)
	if dp := a.opened(); dp != nil {
		statusDataplane(&s, dp)
	}
	s.Enforcement.Healthy = s.Enforcement.Healthy && rec.Enforced
	s.State = standing(&s, snap, pending, position, now)
	return s
}

// statusIdentity fills in who the host is and how long its certificate lives.
func (a *Agent) statusIdentity(s *localapi.Status, now time.Time) {
	id := a.id.Load()
	if id == nil {
		return
	}
	leaf := id.Chain[0]
	s.Node = localapi.Node{Name: id.Node, ID: id.ID()}
	s.SVIDs = append(s.SVIDs, localapi.SVID{ID: id.ID(), Serial: hex.EncodeToString(leaf.SerialNumber.Bytes()), Expires: leaf.NotAfter})
	s.Clocks.SVIDExpires, s.Clocks.SVIDSeconds = leaf.NotAfter, int64(leaf.NotAfter.Sub(now)/time.Second)
	r := a.rotator.Load()
	if r == nil {
		return
	}
	rep := r.Report()
	s.Clocks.SVIDRenewsAt = rep.RenewAt
	switch {
	case rep.Over:
		s.Warnings = append(s.Warnings, "the node's certificate ended more than 30 days ago: enrol this host again with a new join token")
	case now.After(leaf.NotAfter):
		s.Warnings = append(s.Warnings, "the node's certificate has ended; it is renewed as soon as a coordinator answers ("+text(rep.LastError)+")")
	case rep.LastError != nil:
		s.Warnings = append(s.Warnings, fmt.Sprintf("the node's certificate was not renewed (%d times): %v", rep.Failures, rep.LastError))
	}
}

func (a *Agent) statusSnapshot(s *localapi.Status, snap *mesh.Snapshot, now time.Time) {
	if s.RefusedSnapshot != "" {
		s.Warnings = append(s.Warnings, "a snapshot was refused: "+s.RefusedSnapshot)
	}
	if snap == nil {
		return
	}
	m := snap.Manifest
	s.Epoch, s.LeaseEnds = m.Epoch, m.LeaseEnds
	s.Clocks.LeaseSeconds = int64(m.LeaseEnds.Sub(now) / time.Second)
	if !s.Connected {
		s.Warnings = append(s.Warnings, fmt.Sprintf("no coordinator is connected; what is held counts until %s, then %s", m.LeaseEnds.UTC().Format(time.RFC3339), a.cfg.OnLeaseEnd))
	}
	if snap.Self.Status == "revoked" {
		s.Warnings = append(s.Warnings, "this node was revoked: it has no workloads and no peers")
	}
}

func statusDataplane(s *localapi.Status, dp Dataplane) {
	st := dp.Status()
	s.Tunnel = localapi.Tunnel{Kind: st.TunnelKind, Interface: st.Interface, Port: st.Port}
	s.Enforcement = localapi.Enforcement{Mode: st.Mode, Hooks: []localapi.Hook{}, Healthy: st.Healthy, LostEvents: st.LostEvents}
	for _, h := range st.Hooks {
		s.Enforcement.Hooks = append(s.Enforcement.Hooks, localapi.Hook(h))
	}
	for _, c := range st.Counters {
		s.Enforcement.Counters = append(s.Enforcement.Counters, localapi.Counter{Verdict: c.Verdict.String(), Reason: c.Reason.String(), Packets: c.Packets})
	}
	s.Warnings = append(s.Warnings, st.Warnings...)
	peers, err := dp.Peers()
	if err != nil {
		s.Warnings = append(s.Warnings, "peers are not known: "+err.Error())
	}
	for _, p := range peers {
		s.Peers.Total++
		if p.Up {
			s.Peers.Up++
		}
	}
}

// standing is the one word. The first that holds:
//
//  1. no identity: needs-enrolment;
//  2. the operator said down;
//  3. the node is not approved: pending;
//  4. a snapshot is missing or was refused, the lease has ended, something is not real, or the judge is not whole:
//     degraded;
//  5. running.
func standing(s *localapi.Status, snap *mesh.Snapshot, pending bool, position state.Switch, now time.Time) localapi.State {
	switch {
	case s.Node.ID.IsZero():
		return localapi.StateNeedsEnrolment
	case position != state.Up:
		return localapi.StateDown
	case pending:
		return localapi.StatePending
	case snap == nil && s.RefusedSnapshot == "":
		s.Warnings = append(s.Warnings, "waiting for the first snapshot from the coordinator; nothing passes until then")
		return localapi.StateDegraded
	case snap == nil, s.RefusedSnapshot != "", !now.Before(snap.Manifest.LeaseEnds), len(s.Objects) > 0, !s.Enforcement.Healthy,
		reconcile.Shut(snap.Self):
		return localapi.StateDegraded
	}
	return localapi.StateRunning
}

// Peers lists the tunnel's peers with what the snapshot says of them; those that are wished and not real too.
func (a *Agent) Peers() ([]localapi.Peer, error) {
	out := []localapi.Peer{}
	dp := a.opened()
	if dp == nil {
		return out, nil
	}
	real, err := dp.Peers()
	if err != nil {
		return nil, fmt.Errorf("list peers: %w", err)
	}
	byKey := map[key.Public]dataplane.PeerStatus{}
	for _, p := range real {
		byKey[p.Key] = p
	}
	rec := a.rec.Status()
	ids := map[key.Public][]identity.ID{}
	if s := a.snapshot(); s != nil {
		for _, b := range s.Bindings {
			ids[b.Key] = append(ids[b.Key], b.ID)
		}
	}
	for _, p := range rec.Peers {
		st := byKey[p.Key]
		one := localapi.Peer{Node: p.Node, Key: p.Key.String(), Endpoint: st.Endpoint, Up: st.Up, LastHandshake: st.LastHandshake,
			RxBytes: st.RxBytes, TxBytes: st.TxBytes, RefusedSource: st.RefusedSource, Addresses: p.AllowedIPs, Identities: ids[p.Key], NotAfter: p.NotAfter}
		for _, o := range rec.Failed {
			if o.Kind == reconcile.KindPeer && o.Name == p.Node {
				one.Error = o.Err.Error()
			}
		}
		out = append(out, one)
	}
	return out, nil
}

// Workloads lists the host's own workloads and what matches them.
func (a *Agent) Workloads() []localapi.Workload {
	out := []localapi.Workload{}
	s := a.snapshot()
	if s == nil {
		return out
	}
	a.mu.Lock()
	match := a.match
	a.mu.Unlock()
	for _, w := range s.Workloads {
		m, known := match.Matches[w.Number]
		one := localapi.Workload{ID: w.ID, Number: w.Number, Addresses: w.Addresses, Matched: known && m.Matched(), Why: m.Why}
		for _, sel := range w.Selectors {
			one.Selectors = append(one.Selectors, sel.String())
		}
		if one.Matched {
			one.Cgroups, one.Interface = m.Cgroups(), m.Device
		}
		out = append(out, one)
	}
	return out
}

// Resolve finds a workload's instances, as far as this host may know.
func (a *Agent) Resolve(text string) (localapi.Resolved, error) {
	s := a.snapshot()
	if s == nil {
		return localapi.Resolved{}, errNoSnapshot
	}
	id, err := parseID(s, text)
	if err != nil {
		return localapi.Resolved{}, &localapi.Error{Code: localapi.CodeInvalid, Message: err.Error(), Hint: "name a workload as zone/name"}
	}
	r := localapi.Resolved{ID: id, Instances: []localapi.Instance{}}
	for _, w := range s.Workloads {
		if w.ID == id {
			r.Instances = append(r.Instances, localapi.Instance{Node: s.Self.Node, Addresses: w.Addresses, Local: true})
		}
	}
	for _, b := range s.Bindings {
		if b.ID == id && b.Valid(time.Now()) {
			r.Instances = append(r.Instances, localapi.Instance{Node: b.Node, Addresses: b.Addresses})
		}
	}
	if len(r.Instances) == 0 {
		return r, &localapi.Error{Code: localapi.CodeNotFound, Message: fmt.Sprintf("this host knows no address of %s", id.Short()),
			Hint: "a host knows only workloads that some rule lets its own talk with; ask the coordinator with: signet resolve " + id.Short() + " --api URL"}
	}
	return r, nil
}

const natNote = "NAT traversal is not built yet: a host behind NAT is reachable only while it keeps its own mapping open (keepalive)"

// Netcheck says how this host is reached.
func (a *Agent) Netcheck() (localapi.Netcheck, error) {
	n := localapi.Netcheck{Node: a.Status().Node.Name, Candidates: nonNil(a.candidates()), Peers: []localapi.NetcheckPeer{}, Notes: []string{natNote}}
	a.mu.Lock()
	n.SeenAs, n.UpdatedAt, n.SeenKnown = nonNil(slices.Clone(a.seen)), a.seenAt, !a.seenAt.IsZero()
	a.mu.Unlock()
	n.BehindNAT = len(n.SeenAs) > 0
	switch {
	case n.BehindNAT:
		n.Keepalive = int(reconcile.Keepalive / time.Second)
		n.Notes = append(n.Notes, "the coordinator saw this host at an address that is not its own, so it is behind NAT; forward the port and name the outside in endpoints, and every host can reach it")
	case !n.SeenKnown:
		n.Notes = append(n.Notes, "the coordinator has not said where it saw this host, so NAT cannot be told")
	}
	if len(n.Candidates) == 0 {
		n.Notes = append(n.Notes, "this host knows no address of its own that others could reach: name one in endpoints")
	}
	peers, err := a.Peers()
	if err != nil {
		return n, err
	}
	for _, p := range peers {
		one := localapi.NetcheckPeer{Node: p.Node, Endpoint: p.Endpoint, Up: p.Up, HandshakeSeconds: -1}
		if !p.LastHandshake.IsZero() {
			one.HandshakeSeconds = time.Since(p.LastHandshake).Seconds()
		}
		n.Peers = append(n.Peers, one)
	}
	slices.SortFunc(n.Peers, func(x, y localapi.NetcheckPeer) int { return cmp.Compare(x.Node, y.Node) })
	return n, nil
}

func nonNil(eps []netip.AddrPort) []netip.AddrPort {
	if eps == nil {
		return []netip.AddrPort{}
	}
	return eps
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
