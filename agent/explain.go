package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/signet-overlay/signet/agent/attest"
	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/dataplane"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// explainer is a dataplane that can be asked what it would do.
type explainer interface {
	Explain(q dataplane.Question) (dataplane.Answer, error)
}

// explained is one end of a question: what this host knows of the workload.
type explained struct {
	localapi.ExplainedEnd
	addresses []netip.Addr
	local     bool
	match     attest.Match // where it is local
}

// Explain asks the judge of this host, by its dry-run twin, whether a workload may reach another.
func (a *Agent) Explain(r localapi.ExplainRequest) (localapi.Explanation, error) {
	x := localapi.Explanation{Service: r.Port, Nearest: []localapi.Near{}, Hooks: []localapi.ExplainedHook{}}
	s := a.snapshot()
	if s == nil {
		return x, errNoSnapshot
	}
	svc, err := policy.ParseService(r.Port)
	if err != nil || svc.Proto == flow.AnyProto || svc.First != svc.Last || svc.First == 0 && svc.Proto != flow.ICMP {
		return x, &localapi.Error{Code: localapi.CodeInvalid, Message: fmt.Sprintf("%.100q is not one port of one protocol", r.Port), Hint: "write tcp/5432, udp/53 or icmp"}
	}
	x.Service = svc.String()
	var ends [2]explained
	for i, text := range []string{r.From, r.To} {
		if ends[i], err = a.explainedEnd(s, text); err != nil {
			return x, err
		}
	}
	from, to := ends[0], ends[1]
	x.From, x.To, x.PolicyRevision = from.ExplainedEnd, to.ExplainedEnd, s.Manifest.PolicyRevision
	if !from.local && !to.local {
		return x, &localapi.Error{Code: localapi.CodeNotFound, Message: fmt.Sprintf("neither %s nor %s is a workload of this host", from.ID.Short(), to.ID.Short()),
			Hint: "ask on the host of one of them, or the coordinator with --api URL"}
	}
	if answeredByIdentity(&x, from, to) {
		return x, nil
	}
	dp, ok := a.opened().(explainer)
	if !ok {
		return x, &localapi.Error{Code: localapi.CodeNotReady, Message: "the dataplane of this host is not open", Hint: "see: signet status"}
	}
	q, err := question(from, to, svc)
	if err != nil {
		return x, err
	}
	ans, err := dp.Explain(q)
	if err != nil {
		return x, fmt.Errorf("ask the judge's twin: %w", err)
	}
	describeAnswer(&x, s, ans, from, to, svc)
	return x, nil
}

// explainedEnd finds a workload on this host, or else the first of its instances elsewhere.
func (a *Agent) explainedEnd(s *mesh.Snapshot, text string) (explained, error) {
	id, err := parseID(s, text)
	if err != nil {
		return explained{}, &localapi.Error{Code: localapi.CodeInvalid, Message: err.Error(), Hint: "name a workload as zone/name"}
	}
	e := explained{ExplainedEnd: localapi.ExplainedEnd{ID: id}}
	for _, w := range s.Workloads {
		if w.ID == id {
			a.mu.Lock()
			m, known := a.match.Matches[w.Number]
			a.mu.Unlock()
			if !known {
				m.Why = "its selectors were not looked at yet"
			}
			e.Number, e.Node, e.addresses, e.local, e.match = w.Number, s.Self.Node, w.Addresses, true, m
			return e, nil
		}
	}
	for _, b := range s.Bindings {
		if b.ID == id && (e.Number == identity.NumberUnknown || b.Valid(time.Now())) {
			e.Number, e.Node, e.addresses = b.Number, b.Node, b.Addresses
			if b.Valid(time.Now()) {
				break
			}
		}
	}
	return e, nil
}

// answeredByIdentity answers where there is no socket or no address that the judge could be asked about.
func answeredByIdentity(x *localapi.Explanation, from, to explained) bool {
	for _, end := range []explained{from, to} {
		reason := flow.UnknownPeer
		switch {
		case end.local && !end.match.Matched():
			x.Observed = fmt.Sprintf("no process of this host is %s: %s", end.ID.Short(), end.match.Why)
			x.Expected = "a process that all selectors of the workload name"
			reason = flow.NoIdentity
		case !end.local && len(end.addresses) == 0:
			x.Observed = fmt.Sprintf("this host knows no address of %s", end.ID.Short())
			x.Expected = "a workload that is placed on an active node, and that some rule lets this host's workloads talk with"
		default:
			continue
		}
		x.Verdict, x.Code, x.Stage, x.Remedy = flow.Deny, reason, "identity", reason.Info().Remedy
		if reason == flow.UnknownPeer {
			x.Warnings = append(x.Warnings, "a host is told only of workloads that some rule lets its own talk with; the coordinator knows all: --api URL")
		}
		return true
	}
	return false
}

// question is the flow in the first IP version in which both ends have an address.
func question(from, to explained, svc policy.Service) (dataplane.Question, error) {
	q := dataplane.Question{From: from.party(), To: to.party()}
	for _, v4 := range []bool{true, false} {
		has := func(e explained) int {
			return slices.IndexFunc(e.addresses, func(a netip.Addr) bool { return a.Is4() == v4 })
		}
		src, dst := has(from), has(to)
		if src < 0 || dst < 0 {
			continue
		}
		q.Tuple = flow.Tuple{Dst: netip.AddrPortFrom(to.addresses[dst], svc.First), Proto: svc.Proto}
		// A socket of this host is given its address by connect, which is part of the question.
		if q.From == nil || q.From.Device != "" {
			q.Tuple.Src = netip.AddrPortFrom(from.addresses[src], 0)
		}
		return q, nil
	}
	return q, &localapi.Error{Code: localapi.CodeNotReady, Message: fmt.Sprintf("%s and %s have no addresses of one IP version", from.ID.Short(), to.ID.Short())}
}

// party is the process, or the device, that stands for a workload of this host: the first that matches.
func (e explained) party() *dataplane.Party {
	switch {
	case !e.local:
		return nil
	case e.match.Device != "":
		return &dataplane.Party{Device: e.match.Device}
	}
	p := &dataplane.Party{UID: e.match.Key.UID}
	if paths := e.match.Cgroups(); len(paths) > 0 {
		p.Cgroup = paths[0]
	}
	return p
}

// describeAnswer says in words what the twin answered.
func describeAnswer(x *localapi.Explanation, s *mesh.Snapshot, ans dataplane.Answer, from, to explained, svc policy.Service) {
	x.Verdict, x.Code, x.Rule, x.Tracked = ans.Verdict, ans.Reason, s.Rules[ans.Rule], ans.Tracked
	x.Stage = stageOf(ans)
	if ans.View.Revision != 0 {
		x.PolicyRevision = ans.View.Revision
	}
	for _, h := range ans.Hooks {
		x.Hooks = append(x.Hooks, localapi.ExplainedHook{Hook: hookNames[h.Hook], Verdict: h.Verdict, Code: h.Reason, Rule: s.Rules[h.Rule]})
	}
	ask := fmt.Sprintf("%v from %s to %s", svc, from.ID.Short(), to.ID.Short())
	switch {
	case ans.Verdict == flow.Allow && ans.Tracked:
		x.Observed = fmt.Sprintf("%s is open, under rule %s", ask, x.Rule)
	case ans.Verdict == flow.Allow:
		x.Observed = fmt.Sprintf("%s would open: rule %s allows it", ask, x.Rule)
	case ans.Verdict == flow.Audit:
		x.Observed = fmt.Sprintf("%s would open, on record with event audit: rule %s would withhold it", ask, x.Rule)
	default:
		x.Observed = fmt.Sprintf("%s would be denied at %s: %s", ask, hookNames[ans.Hook], ans.Reason.Info().Meaning)
	}
	x.Expected = "an allow rule and no deny rule; the default is deny"
	if !from.local || !to.local {
		x.Warnings = append(x.Warnings, "this host answers for its own end; the other end's host judges too")
	}
	if ans.Verdict == flow.Deny {
		x.Remedy = ans.Reason.Info().Remedy
		x.Nearest = nearRules(s, from, to, svc)
	}
}

// hookNames are the hooks as people read them.
var hookNames = map[policy.Hook]string{
	policy.HookConnect: "connect", policy.HookEgressSocket: "egress", policy.HookIngressSocket: "ingress",
	policy.HookEgressDevice: "tunnel_egress", policy.HookIngressDevice: "tunnel_ingress", policy.HookLoopback: "lo_egress",
	policy.HookFromWorkload: "guard", policy.HookToWorkload: "guard_egress", policy.HookGuard: "guard",
}

// stageOf names the step that decided, in the words of the coordinator's answer.
func stageOf(ans dataplane.Answer) string {
	switch ans.Reason {
	case flow.NoIdentity, flow.UnknownPeer, flow.SpoofedSource:
		return "identity"
	case flow.Revoked:
		return "placement"
	}
	switch ans.Hook {
	case policy.HookIngressDevice, policy.HookIngressSocket, policy.HookToWorkload:
		return policy.Ingress.String()
	}
	return policy.Egress.String()
}

// maxNear is how many rules an answer names besides the deciding one.
const maxNear = 3

// nearRules lists rules of the local ends that are for these two, but for another port.
func nearRules(s *mesh.Snapshot, from, to explained, svc policy.Service) []localapi.Near {
	out := []localapi.Near{}
	for _, end := range []struct {
		own, peer explained
		dir       policy.Direction
	}{{from, to, policy.Egress}, {to, from, policy.Ingress}} {
		if !end.own.local {
			continue
		}
		for k, v := range s.Rulesets[end.own.Number] {
			name := s.Rules[v.Allow.Rule]
			if k.Peer != end.peer.Number || k.Dir != end.dir || !v.Allow.Present() || name == "" ||
				slices.ContainsFunc(out, func(n localapi.Near) bool { return n.Rule == name }) {
				continue
			}
			out = append(out, localapi.Near{Rule: name, Action: policy.ActionAllow.String(), Fails: fmt.Sprintf("allow: it does not allow %v now", svc)})
		}
	}
	slices.SortFunc(out, func(x, y localapi.Near) int { return cmp.Compare(x.Rule, y.Rule) })
	return out[:min(len(out), maxNear)]
}
