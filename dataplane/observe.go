package dataplane

import (
	"cmp"
	"context"
	"slices"

	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// hookNames are the names of programs in records.
var hookNames = map[policy.Hook]string{
	policy.HookConnect: "connect", policy.HookBind: "bind", policy.HookEgressSocket: "egress", policy.HookIngressSocket: "ingress",
	policy.HookEgressDevice: "tunnel_egress", policy.HookIngressDevice: "tunnel_ingress", policy.HookGuard: "guard", policy.HookLoopback: "lo_egress",
	policy.HookFromWorkload: "guard", policy.HookToWorkload: "guard_egress",
}

// eventNames are what the judge tells, in the words of records.
var eventNames = map[enforce.EventKind]flow.Event{
	enforce.EventLoss: flow.EventLoss, enforce.EventStart: flow.EventStart, enforce.EventEnd: flow.EventEnd, enforce.EventDeny: flow.EventDeny,
	enforce.EventAudit: flow.EventAudit,
}

// Observe calls report for each event of the judge, in order, until ctx ends.
func (d *Dataplane) Observe(ctx context.Context, report func(flow.Observation)) error {
	return d.judge.Events(ctx, func(e enforce.Event) {
		report(observation(e, d.judge.View()))
	})
}

// observation puts an event into the words of records. v may be nil.
func observation(e enforce.Event, v *policy.View) flow.Observation {
	o := flow.Observation{
		Event: eventNames[e.Kind], At: e.Time, FlowID: e.Flow.Random, Tuple: e.Tuple, Verdict: e.Verdict, Reason: e.Reason, Rule: e.Rule,
		Src: e.Src, Dst: e.Dst, Cgroup: e.Local.Cgroup, UID: e.Local.UID, PID: e.Local.PID, Start: e.Began, Lost: e.LostBefore,
		PacketsOut: e.Sent.Packets, PacketsIn: e.Received.Packets, BytesOut: e.Sent.Bytes, BytesIn: e.Received.Bytes,
		Local: side(e, v),
	}
	if e.Kind == enforce.EventDeny {
		o.Hook = hookNames[e.Hook]
	}
	if e.Kind == enforce.EventEnd {
		o.EndReason = endReason(e)
	}
	return o
}

// side says which end of the flow stands on this host.
func side(e enforce.Event, v *policy.View) string {
	if v == nil {
		return ""
	}
	src, dst := v.Addresses[e.Tuple.Src.Addr()].Local, v.Addresses[e.Tuple.Dst.Addr()].Local
	switch {
	case src && dst:
		return "local"
	case dst:
		return "dst"
	case src || e.Kind == enforce.EventDeny && e.Hook != policy.HookGuard:
		return "src"
	}
	return ""
}

func endReason(e enforce.Event) string {
	switch {
	case e.TCPFlags&policy.FlagRST != 0:
		return "rst"
	case e.TCPFlags&policy.FlagFIN != 0:
		return "fin"
	}
	return "idle"
}

// Peers lists the tunnel's peers.
func (d *Dataplane) Peers() ([]PeerStatus, error) {
	all, err := d.tunnel().Status()
	if err != nil {
		return nil, err
	}
	out := make([]PeerStatus, len(all))
	for i, p := range all {
		out[i] = PeerStatus{Key: p.Key, Endpoint: p.Endpoint, LastHandshake: p.LastHandshake, RxBytes: p.RxBytes, TxBytes: p.TxBytes,
			Up: p.Up, RefusedSource: p.RefusedSource}
	}
	return out, nil
}

// unguarded is what this version does not do on any host; status shows it, because nothing may be silently weaker.
var unguarded = []string{
	"not guarded yet: processes outside cgroup_root have no identity, and are refused rather than judged",
	"not guarded: a process outside cgroup_root that has CAP_NET_RAW can send past the judge at the tunnel, by a packet socket with PACKET_QDISC_BYPASS or by AF_XDP; below cgroup_root both are refused",
}

// clsactMeans is what it means that a kernel has no tcx. No guarantee goes with it: whoever may do that could as well detach
// a program of tcx.
const clsactMeans = "devices are judged by clsact filters, because this kernel has no tcx (Linux 6.6): another tool that flushes the filters of a device takes ours along, and they are put back within a second"

// Status reports what is attached, what is counted, and what is not guarded.
func (d *Dataplane) Status() Status {
	s := Status{TunnelKind: d.tunnel().Kind(), Interface: d.cfg.Interface, Port: d.tunnel().ListenPort(), Mode: "enforce", Healthy: true,
		Warnings: slices.Clone(unguarded)}
	if why := d.revoking.why(); why != "" {
		s.Warnings = append(s.Warnings, "connections that are taken back stop at once, but their programs see a timeout instead of a reset: "+why)
	}
	s.Warnings = append(s.Warnings, d.tunnelWarnings()...)
	for _, f := range d.gaps {
		s.Warnings = append(s.Warnings, "accepted gap "+f.name+": "+f.means)
	}
	for _, other := range d.judge.Ahead() {
		s.Warnings = append(s.Warnings, other+": it can pass packets that are not judged")
	}
	if d.judge.ByClsact() {
		s.Warnings = append(s.Warnings, clsactMeans)
	}
	d.host.mu.Lock()
	if d.host.down {
		s.Mode = "down"
	}
	s.Warnings = append(s.Warnings, behindWarnings(d.host.spec)...)
	d.host.mu.Unlock()
	for _, h := range d.judge.Hooks() {
		status := HookStatus{Name: h.Name, Attached: h.Attached}
		gap, accepted := gapOfHook(d.gaps, h.Name)
		if h.Err != nil {
			status.Error = h.Err.Error()
		}
		if h.Err != nil && accepted {
			status.Error = gap.means + ": " + status.Error
		}
		s.Healthy = s.Healthy && (h.Attached || accepted)
		s.Hooks = append(s.Hooks, status)
	}
	select {
	case <-d.tunnel().Done():
		s.Healthy = false
		s.Warnings = append(s.Warnings, "the tunnel's device was removed by somebody else and is being made anew; until then nothing passes")
	default:
	}
	hooks, warnings := d.handshakeStatus()
	s.Hooks, s.Warnings = append(s.Hooks, hooks...), append(s.Warnings, warnings...)
	counters, err := d.judge.Counters()
	if err != nil {
		s.Warnings = append(s.Warnings, "counters cannot be read: "+err.Error())
		return s
	}
	s.LostEvents = counters.Lost
	s.Counters = byReason(counters)
	return s
}

// byReason adds the hooks up.
func byReason(c enforce.Counters) []Counter {
	type kind struct {
		v flow.Verdict
		r flow.Reason
	}
	sums := map[kind]uint64{}
	for k, n := range c.Verdicts {
		sums[kind{k.Verdict, k.Reason}] += n
	}
	var out []Counter
	for k, n := range sums {
		if n > 0 {
			out = append(out, Counter{Verdict: k.v, Reason: k.r, Packets: n})
		}
	}
	slices.SortFunc(out, func(a, b Counter) int {
		return cmp.Or(cmp.Compare(a.Verdict, b.Verdict), cmp.Compare(a.Reason, b.Reason))
	})
	return out
}
