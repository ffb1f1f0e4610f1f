package compile

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// maxNearest is how many rules an Explanation names besides the deciding one.
const maxNearest = 3

// End is one end of the flow in question.
type End struct {
	ID     identity.ID     `json:"id"`
	Number identity.Number `json:"number"`
	Node   string          `json:"node"`            // the first of Nodes, or ""
	Nodes  []string        `json:"nodes,omitempty"` // where it is placed and not revoked
}

// Near is a rule that almost decided.
type Near struct {
	Rule   string `json:"rule"`
	Action string `json:"action"`
	At     string `json:"at"`    // file:line:column
	Fails  string `json:"fails"` // the first clause that does not hold
	score  int
}

// Explanation is the answer to: would this flow work, and why (not)?
type Explanation struct {
	Verdict        flow.Verdict   `json:"verdict"` // audit: it passes, and is recorded as what a rule in mode audit would withhold
	Code           flow.Reason    `json:"code"`
	Stage          string         `json:"stage"` // the step that decided: identity, placement, egress or ingress
	Rule           string         `json:"rule"`  // the deciding rule, or ""; with verdict audit, the one in mode audit
	PolicyRevision uint64         `json:"policy_revision"`
	From           End            `json:"from"`
	To             End            `json:"to"`
	Service        policy.Service `json:"service"`
	Observed       string         `json:"observed"`
	Expected       string         `json:"expected"`
	Nearest        []Near         `json:"nearest"` // the best first
	Remedy         string         `json:"remedy"`
	Warnings       []string       `json:"warnings,omitempty"`
}

// Explain judges one question with policy.Lookup on both sides: egress of from, then ingress of to. c must have been
// compiled from s. Workloads that are placed on no node are judged too, with a warning. svc is one port of one
// protocol, or icmp (policydoc.Single); anything wider is allowed only where a rule allows all of its ports.
func Explain(s *registry.State, c *Compiled, from, to identity.ID, svc policy.Service, now time.Time) Explanation {
	x := Explanation{PolicyRevision: s.PolicyRevision, From: c.end(from), To: c.end(to), Service: svc, Nearest: []Near{}}
	if !policydoc.Single(svc) {
		x.Warnings = append(x.Warnings, fmt.Sprintf("%v is more than one port: it is allowed only where one rule allows every port and none is denied", svc))
		svc.First, svc.Last = 0, 0
	}
	if !c.identities(&x) {
		return x
	}
	ans := c.judge(x.From.Number, x.To.Number, svc, now)
	if ans.Verdict != flow.Deny && !policydoc.Single(x.Service) {
		ans = c.deniedWithin(&x, ans, now)
	}
	x.Verdict, x.Code, x.Stage, x.Rule = ans.Verdict, ans.Reason, ans.dir.String(), c.Rules[ans.Rule]
	c.describe(&x, now)
	return x
}

// end finds where a workload is; one that is not declared has Number 0.
func (c *Compiled) end(id identity.ID) End {
	e := End{ID: id}
	if _, ok := c.index.Workload(id); !ok {
		return e
	}
	e.Number = c.state.Numbers[id]
	for _, i := range c.placed[e.Number] {
		if !i.Revoked && c.state.Nodes[i.Node].Status == registry.NodeActive {
			e.Nodes = append(e.Nodes, i.Node)
		}
	}
	if len(e.Nodes) > 0 {
		e.Node = e.Nodes[0]
	}
	return e
}

// identities checks that both ends exist, as the kernel would before it looks at rules.
func (c *Compiled) identities(x *Explanation) bool {
	for _, side := range [...]struct {
		e      *End
		code   flow.Reason
		source bool
	}{{&x.From, flow.NoIdentity, true}, {&x.To, flow.UnknownPeer, false}} {
		if side.e.Number == identity.NumberUnknown {
			x.Verdict, x.Code, x.Stage = flow.Deny, side.code, "identity"
			x.Observed = fmt.Sprintf("no workload %s is declared", name(side.e.ID))
			x.Expected = "a workload of the policy document"
			x.Remedy = fmt.Sprintf("declare %s under workloads, then run: signet policy apply FILE", name(side.e.ID))
			return false
		}
		if len(side.e.Nodes) > 0 {
			continue
		}
		if c.allRevoked(side.e.Number) {
			x.Verdict, x.Code, x.Stage = flow.Deny, flow.Revoked, "placement"
			x.Observed = fmt.Sprintf("every placement of %s is revoked", name(side.e.ID))
			x.Expected = "a placement that is not revoked"
			x.Remedy = flow.Revoked.Info().Remedy
			return false
		}
		x.Warnings = append(x.Warnings, fmt.Sprintf("%s is placed on no active node: the verdict is the policy's alone", name(side.e.ID)))
	}
	return true
}

func (c *Compiled) allRevoked(n identity.Number) bool {
	placed := c.placed[n]
	return len(placed) > 0 && !slices.ContainsFunc(placed, func(i registry.Instance) bool {
		return !i.Revoked && c.state.Nodes[i.Node].Status != registry.NodeRevoked
	})
}

func name(id identity.ID) string {
	if id.IsZero() {
		return "(none)"
	}
	return id.Short()
}

// answer is what was decided, with the side that decided it.
type answer struct {
	policy.Answer
	dir policy.Direction
}

// judge asks both rulesets, in the order in which a packet meets them, as step 11 of policy.Judge does: a denial of the
// first is not asked further, and the first would-be denial is the one that counts.
func (c *Compiled) judge(from, to identity.Number, svc policy.Service, now time.Time) answer {
	v := policy.View{Rulesets: c.Rulesets}
	t := flow.Tuple{Proto: svc.Proto, Dst: netip.AddrPortFrom(netip.Addr{}, svc.First)}
	out := v.Lookup(from, to, policy.Egress, t, now)
	if out.Verdict == flow.Deny {
		return answer{out, policy.Egress}
	}
	in := v.Lookup(to, from, policy.Ingress, t, now)
	if out.Verdict == flow.Audit && in.Verdict != flow.Deny {
		return answer{out, policy.Egress}
	}
	return answer{in, policy.Ingress}
}

// deniedWithin looks for rules that deny some port of a wide question; Lookup looks at one port only. The one with the
// lowest number counts, and one in mode audit only where no other denies. Both rulesets hold the same rules, so that one
// is enough.
func (c *Compiled) deniedWithin(x *Explanation, ans answer, now time.Time) answer {
	var deny, audit uint32
	lowest := func(have *uint32, s policy.Slot) {
		if s.Active(now) && (*have == 0 || s.Rule < *have) {
			*have = s.Rule
		}
	}
	for k, v := range c.Rulesets[x.From.Number] {
		if k.Peer == x.To.Number && k.Dir == policy.Egress && meets(k, x.Service) {
			lowest(&deny, v.Deny)
			lowest(&audit, v.Audit)
		}
	}
	switch {
	case deny != 0:
		return answer{policy.Answer{Verdict: flow.Deny, Reason: flow.PolicyDeny, Rule: deny}, policy.Egress}
	case audit != 0 && ans.Verdict == flow.Allow:
		return answer{policy.Answer{Verdict: flow.Audit, Reason: flow.PolicyDeny, Rule: audit, Under: ans.Rule}, policy.Egress}
	}
	return ans
}

// meets reports whether a Key holds a port of svc.
func meets(k policy.Key, svc policy.Service) bool {
	if svc.Proto != flow.AnyProto && k.Proto != flow.AnyProto && k.Proto != svc.Proto.Policy() {
		return false
	}
	if svc.First == 0 || k.Port == 0 && k.Bits == 0 {
		return true
	}
	last := k.Port
	if k.Bits > 0 {
		last |= 1<<(16-k.Bits) - 1
	}
	return k.Port <= svc.Last && svc.First <= last
}

// describe fills in what a person reads.
func (c *Compiled) describe(x *Explanation, now time.Time) {
	ask := fmt.Sprintf("%v from %s to %s", x.Service, name(x.From.ID), name(x.To.ID))
	if x.Verdict == flow.Audit {
		c.describeAudit(x, ask)
		return
	}
	switch x.Code {
	case flow.PolicyAllow:
		x.Observed = fmt.Sprintf("rule %s allows %s", x.Rule, ask)
		x.Expected = "an allow rule and no deny rule"
		return
	case flow.PolicyDeny:
		x.Observed = fmt.Sprintf("rule %s denies %s", x.Rule, ask)
		x.Expected = "no deny rule"
		x.Remedy = fmt.Sprintf("change or remove deny rule %s (%s), then run: signet policy apply FILE", x.Rule, c.at(x.Rule))
	case flow.Expired:
		x.Observed = fmt.Sprintf("rule %s allowed %s until it expired", x.Rule, ask)
		x.Expected = "an allow rule that has not expired"
		x.Remedy = fmt.Sprintf("change expires of rule %s (%s), then run: signet policy apply FILE", x.Rule, c.at(x.Rule))
	default:
		x.Observed = fmt.Sprintf("no rule allows %s", ask)
		x.Expected = "an allow rule; the default is deny"
		x.Remedy = fmt.Sprintf("add a rule {id: NAME, from: [%s], to: [%s], allow: [%v]}, then run: signet policy apply FILE",
			name(x.From.ID), name(x.To.ID), x.Service)
	}
	x.Nearest = c.nearest(x, now)
	if x.Code == flow.NoRule && len(x.Nearest) > 0 && x.Nearest[0].score == scorePort {
		x.Remedy = fmt.Sprintf("add %v to allow of rule %s (%s), then run: signet policy apply FILE", x.Service, x.Nearest[0].Rule, x.Nearest[0].At)
	}
}

// describeAudit is describe for what passes only because a rule is in mode audit.
func (c *Compiled) describeAudit(x *Explanation, ask string) {
	x.Observed = fmt.Sprintf("rule %s would deny %s; it is in mode audit, so that the flow passes and is recorded with event audit", x.Rule, ask)
	x.Expected = "an allow rule and no deny rule, of either mode"
	x.Remedy = fmt.Sprintf("before rule %s (%s) is enforced, change it or stop the flow", x.Rule, c.at(x.Rule))
	if x.Code == flow.Expired {
		x.Observed = fmt.Sprintf("rule %s has expired and would withhold %s; it is in mode audit, so that the flow passes and is recorded with event audit", x.Rule, ask)
		x.Expected = "an allow rule that has not expired"
		x.Remedy = fmt.Sprintf("before rule %s (%s) is enforced, change its expires or stop the flow", x.Rule, c.at(x.Rule))
	}
}

func (c *Compiled) at(rule string) string {
	if r := c.byRule[c.state.RuleNumbers[rule]]; r != nil {
		return r.At.String()
	}
	return "position unknown"
}

// Scores of rules that almost decided: the later the failing clause, the nearer.
const (
	scoreOneEnd     = 1 // one end, another port
	scoreOneEndPort = 2 // one end and the port
	scorePort       = 3 // both ends, another port
	scoreAll        = 4 // everything, but expired or overruled
)

// nearest lists the allow rules that come closest, the best first, and among equals in the order of the document.
func (c *Compiled) nearest(x *Explanation, now time.Time) []Near {
	from, _ := c.index.Workload(x.From.ID)
	to, _ := c.index.Workload(x.To.ID)
	out := make([]Near, 0, maxNearest+1)
	for i := range c.state.Policy.Rules {
		r := &c.state.Policy.Rules[i]
		if r.Action != policy.ActionAllow {
			continue
		}
		n := c.compare(r, x, selects(r.From, from), selects(r.To, to), now)
		if n.score == 0 {
			continue
		}
		at := slices.IndexFunc(out, func(have Near) bool { return have.score < n.score })
		if at < 0 {
			at = len(out)
		}
		if at < maxNearest {
			out = slices.Insert(out, at, n)
			out = out[:min(len(out), maxNearest)]
		}
	}
	return out
}

func selects(patterns []policydoc.Pattern, w *policydoc.Workload) bool {
	return slices.ContainsFunc(patterns, func(p policydoc.Pattern) bool { return p.Matches(w) })
}

// compare names the first clause of the rule that fails, in the order from, to, port, expires, deny rules.
func (c *Compiled) compare(r *policydoc.Rule, x *Explanation, from, to bool, now time.Time) Near {
	n := Near{Rule: r.ID, Action: r.Action.String(), At: r.At.String()}
	port := slices.ContainsFunc(r.Services, func(s policy.Service) bool { return policydoc.Covers(s, x.Service) })
	switch {
	case !from && !to:
		return n
	case !from:
		n.Fails = fmt.Sprintf("from: %s is not in %v", name(x.From.ID), brief(r.From))
	case !to:
		n.Fails = fmt.Sprintf("to: %s is not in %v", name(x.To.ID), brief(r.To))
	case !port:
		n.Fails = fmt.Sprintf("allow: %v is not in %v", x.Service, brief(r.Services))
	case !r.Audit && !r.Expires.IsZero() && !now.Before(r.Expires):
		n.Fails = "expires: it expired at " + r.Expires.Format(time.RFC3339)
	case x.Code == flow.PolicyDeny:
		n.Fails = fmt.Sprintf("deny rule %s wins", x.Rule)
	}
	switch {
	case from && to && port:
		n.score = scoreAll
	case from && to:
		n.score = scorePort
	case port:
		n.score = scoreOneEndPort
	default:
		n.score = scoreOneEnd
	}
	return n
}

// maxListed bounds what a clause repeats of a rule.
const maxListed = 5

func brief[T fmt.Stringer](list []T) string {
	out := "["
	for i, item := range list {
		if i > 0 {
			out += ", "
		}
		if i == maxListed {
			return out + fmt.Sprintf("and %d more]", len(list)-i)
		}
		out += item.String()
	}
	return out + "]"
}
