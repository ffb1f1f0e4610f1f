package compile

import (
	"errors"
	"fmt"
	"slices"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// ErrCompile is wrapped by every refusal to compile.
var ErrCompile = errors.New("policy cannot be compiled")

// Limits of one compilation; beyond either it is refused, naming the rule that goes too far.
const (
	// maxEntries counts the whole mesh, so that no host's share is more than its View may hold; the half keeps one
	// compilation near 400 MiB.
	maxEntries = policy.MaxEntries / 2
	// maxSteps bounds the work of rules that meet at the same entries.
	maxSteps = 4 * maxEntries
)

// Compiled is the whole mesh's policy by local workload; immutable.
type Compiled struct {
	Rulesets map[identity.Number]policy.Ruleset
	Rules    map[uint32]string               // names of the rules by number
	Names    map[identity.Number]identity.ID // every workload of the document

	state  *registry.State
	index  *policydoc.Index
	placed map[identity.Number][]registry.Instance // by workload, in the order of the State
	onNode map[string][]registry.Instance
	byRule map[uint32]*policydoc.Rule
}

// Compile expands every rule of the State's document. Workloads that no rule names have no ruleset: they can talk to
// nothing.
//
// Where several rules with one action meet at one Key, the one that stands longest is kept: without expiry before any
// expiry, a later one before an earlier one, and the first in the document among equals.
func Compile(s *registry.State) (*Compiled, error) {
	c := &Compiled{
		Rulesets: map[identity.Number]policy.Ruleset{},
		Rules:    make(map[uint32]string, len(s.Policy.Rules)),
		Names:    make(map[identity.Number]identity.ID, len(s.Policy.Workloads)),
		state:    s,
		index:    s.Policy.Index(),
		placed:   map[identity.Number][]registry.Instance{},
		onNode:   map[string][]registry.Instance{},
		byRule:   make(map[uint32]*policydoc.Rule, len(s.Policy.Rules)),
	}
	e := &expander{c: c, numbers: make([]identity.Number, len(s.Policy.Workloads))}
	for i, w := range s.Policy.Workloads {
		n, ok := s.Numbers[w.ID]
		if !ok || !n.Allocated() {
			return nil, fmt.Errorf("%w: %v: workload %s has no number", ErrCompile, w.At, w.ID.Short())
		}
		e.numbers[i] = n
		c.Names[n] = w.ID
	}
	if len(c.Names) != len(e.numbers) {
		return nil, fmt.Errorf("%w: two workloads have the same number", ErrCompile)
	}
	for _, i := range s.Instances {
		c.placed[i.Number] = append(c.placed[i.Number], i)
		c.onNode[i.Node] = append(c.onNode[i.Node], i)
	}
	for i := range s.Policy.Rules {
		rule := &s.Policy.Rules[i]
		if err := e.rule(rule, s.RuleNumbers[rule.ID]); err != nil {
			return nil, fmt.Errorf("%w: %v: rule %s: %w", ErrCompile, rule.At, rule.ID, err)
		}
	}
	return c, nil
}

// expander writes rules into rulesets.
type expander struct {
	c       *Compiled
	numbers []identity.Number // by position in the document
	entries int
	steps   int
}

var (
	errNoNumber = errors.New("it has no number")
	errTooLarge = errors.New("the policy is too large")
)

func (e *expander) rule(rule *policydoc.Rule, number uint32) error {
	if number == 0 {
		return errNoNumber
	}
	if have, ok := e.c.Rules[number]; ok {
		return fmt.Errorf("its number %d is also that of rule %s", number, have)
	}
	e.c.Rules[number] = rule.ID
	e.c.byRule[number] = rule
	ports, err := expand(rule.Services)
	if err != nil {
		return err
	}
	slot := policy.Slot{Rule: number, NotAfter: rule.Expires}
	from, to := e.c.index.MatchAny(rule.From), e.c.index.MatchAny(rule.To)
	// A workload to itself is a pair like any other: its instances on other hosts.
	for _, f := range from {
		for _, t := range to {
			if err := e.pair(e.numbers[f], e.numbers[t], ports, rule.Action, slot); err != nil {
				return err
			}
		}
	}
	return nil
}

// pair writes both ends: the host of either judges with its own ruleset.
func (e *expander) pair(from, to identity.Number, ports []policy.Key, action policy.Action, slot policy.Slot) error {
	if e.steps += 2 * len(ports); e.steps > maxSteps {
		return fmt.Errorf("%w: with this rule it takes more than %d steps to expand; name fewer workloads or ports", errTooLarge, maxSteps)
	}
	out, in := e.ruleset(from), e.ruleset(to)
	for _, k := range ports {
		k.Peer, k.Dir = to, policy.Egress
		e.put(out, k, action, slot)
		k.Peer, k.Dir = from, policy.Ingress
		e.put(in, k, action, slot)
	}
	if e.entries > maxEntries {
		return fmt.Errorf("%w: with this rule it has more than %d entries; name fewer workloads or ports", errTooLarge, maxEntries)
	}
	return nil
}

func (e *expander) ruleset(n identity.Number) policy.Ruleset {
	rs := e.c.Rulesets[n]
	if rs == nil {
		rs = policy.Ruleset{}
		e.c.Rulesets[n] = rs
	}
	return rs
}

func (e *expander) put(rs policy.Ruleset, k policy.Key, action policy.Action, slot policy.Slot) {
	v, ok := rs[k]
	if !ok {
		e.entries++
	}
	have := &v.Deny
	if action == policy.ActionAllow {
		have = &v.Allow
	}
	if have.Present() && !outlives(slot, *have) {
		return
	}
	*have = slot
	rs[k] = v
}

// outlives reports whether a stands longer than b; equals do not.
func outlives(a, b policy.Slot) bool {
	return !b.NotAfter.IsZero() && (a.NotAfter.IsZero() || a.NotAfter.After(b.NotAfter))
}

// expand lists the Keys of services, without peer and direction, each once.
func expand(services []policy.Service) ([]policy.Key, error) {
	var out []policy.Key
	seen := map[policy.Key]bool{}
	for _, svc := range services {
		ports := int(svc.Last) - int(svc.First) + 1
		if svc.First > svc.Last || svc.Proto == flow.AnyProto && svc.Last != 0 {
			return nil, fmt.Errorf("%w: %v", policy.ErrService, svc)
		}
		if ports > policydoc.MaxRangePorts {
			return nil, fmt.Errorf("%v: port ranges wider than %d are %w", svc, policydoc.MaxRangePorts, policy.ErrNotBuilt)
		}
		for i := range ports {
			k := policy.Key{Proto: svc.Proto.Policy(), Port: svc.First + uint16(i)}
			if !seen[k] {
				seen[k] = true
				out = append(out, k)
			}
		}
		if len(out) > maxEntries {
			return nil, errTooLarge
		}
	}
	return slices.Clip(out), nil
}
