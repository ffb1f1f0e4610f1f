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

	confined map[identity.Zone]bool
}

// Compile expands every rule of the State's document. Workloads that no rule names have no ruleset: they can talk to
// nothing. Rules that meet at a port are joined as join (join.go) says, whether they name the port alone or in a range;
// a port, a whole protocol and every protocol are different Keys, which policy.Lookup joins.
//
// Ranges become few entries, not one for each port (ranges.go). A range never holds port 0, which no service names and
// nothing listens at: tcp/1-65535 is every port but that one, tcp is every port.
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
		confined: map[identity.Zone]bool{},
	}
	for _, z := range s.Policy.Zones {
		c.confined[z.Name] = z.Confined
	}
	e := &expander{c: c, numbers: make([]identity.Number, len(s.Policy.Workloads)), order: make(map[uint32]int, len(s.Policy.Rules)),
		ranged: map[pair][]int{}, known: map[string]*cut{}}
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
		if err := e.rule(i, s.RuleNumbers[rule.ID]); err != nil {
			return nil, refused(rule, err)
		}
	}
	if i, err := e.ranges(); err != nil {
		return nil, refused(&s.Policy.Rules[i], err)
	}
	return c, nil
}

func refused(rule *policydoc.Rule, err error) error {
	return fmt.Errorf("%w: %v: rule %s: %w", ErrCompile, rule.At, rule.ID, err)
}

// expander writes rules into rulesets: single ports, protocols and icmp as it reads them, ranges at the end.
type expander struct {
	c       *Compiled
	numbers []identity.Number // by position in the document
	order   map[uint32]int    // positions of rules in the document, by number
	entries int
	steps   int

	pairs  []pair          // those of ranged, in the order in which rules name them
	ranged map[pair][]int  // positions of the rules that have ranges for a pair, growing
	known  map[string]*cut // by the rules that are in it
}

// pair is who opens a flow, and to whom.
type pair struct{ from, to identity.Number }

var (
	errNoNumber = errors.New("it has no number")
	errTooLarge = errors.New("the policy is too large")
)

func (e *expander) rule(i int, number uint32) error {
	rule := &e.c.state.Policy.Rules[i]
	if number == 0 {
		return errNoNumber
	}
	if have, ok := e.c.Rules[number]; ok {
		return fmt.Errorf("its number %d is also that of rule %s", number, have)
	}
	e.c.Rules[number] = rule.ID
	e.c.byRule[number] = rule
	e.order[number] = i
	keys, wide, err := expand(rule.Services)
	if err != nil {
		return err
	}
	v := valueOf(rule, number)
	from, to := e.c.index.MatchAny(rule.From), e.c.index.MatchAny(rule.To)
	// A workload to itself is a pair like any other: its instances on other hosts.
	for _, f := range from {
		for _, t := range to {
			p := pair{e.numbers[f], e.numbers[t]}
			if wide {
				e.later(p, i)
			}
			if err := e.pair(p, keys, v); err != nil {
				return err
			}
		}
	}
	return nil
}

// valueOf is one rule's word, for every Key that it names.
func valueOf(rule *policydoc.Rule, number uint32) policy.Value {
	slot := policy.Slot{Rule: number, NotAfter: rule.Expires}
	switch {
	case rule.Action == policy.ActionAllow:
		slot.Audit = rule.Audit
		return policy.Value{Allow: slot}
	case rule.Audit:
		return policy.Value{Audit: slot}
	}
	return policy.Value{Deny: slot}
}

// pair writes both ends: the host of either judges with its own ruleset.
func (e *expander) pair(p pair, keys []policy.Key, v policy.Value) error {
	if e.steps += 2 * len(keys); e.steps > maxSteps {
		return fmt.Errorf("%w: with this rule it takes more than %d steps to expand; name fewer workloads or ports", errTooLarge, maxSteps)
	}
	for _, k := range keys {
		e.put(p, k, v)
	}
	// Each pair of pairs will have at least two more: a range is one entry or several, at both ends.
	if e.entries+2*len(e.pairs) > maxEntries {
		return e.tooMany()
	}
	return nil
}

func (e *expander) tooMany() error {
	return fmt.Errorf("%w: with this rule it has more than %d entries; name fewer workloads or ports", errTooLarge, maxEntries)
}

func (e *expander) put(p pair, k policy.Key, v policy.Value) {
	k.Peer, k.Dir = p.to, policy.Egress
	e.write(e.ruleset(p.from), k, v)
	k.Peer, k.Dir = p.from, policy.Ingress
	e.write(e.ruleset(p.to), k, v)
}

func (e *expander) ruleset(n identity.Number) policy.Ruleset {
	rs := e.c.Rulesets[n]
	if rs == nil {
		rs = policy.Ruleset{}
		e.c.Rulesets[n] = rs
	}
	return rs
}

func (e *expander) write(rs policy.Ruleset, k policy.Key, v policy.Value) {
	have, ok := rs[k]
	if !ok {
		e.entries++
		rs[k] = v
		return
	}
	if joined := e.join(have, v); joined != have {
		rs[k] = joined
	}
}

// ported reports whether a service of the protocol may name ports.
func ported(p flow.Proto) bool { return p == flow.TCP || p == flow.UDP || p == flow.SCTP }

// expand lists the Keys of services but for ranges, without peer and direction, each once. wide reports whether there
// are ranges.
func expand(services []policy.Service) (keys []policy.Key, wide bool, err error) {
	seen := map[policy.Key]bool{}
	for _, svc := range services {
		if svc.First > svc.Last || svc.First == 0 && svc.Last != 0 || !ported(svc.Proto) && svc.Last != 0 {
			return nil, false, fmt.Errorf("%w: %v", policy.ErrService, svc)
		}
		if svc.First < svc.Last {
			wide = true
			continue
		}
		if k := (policy.Key{Proto: svc.Proto.Policy(), Port: svc.First}); !seen[k] {
			seen[k] = true
			keys = append(keys, k)
		}
	}
	return slices.Clip(keys), wide, nil
}
