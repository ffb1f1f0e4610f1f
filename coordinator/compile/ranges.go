package compile

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math/bits"
	"slices"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// How ranges of ports become entries. The kernel finds at most one range of a ruleset for a port, so that ranges that
// overlap are cut:
//
//  1. For each pair of workloads, the rules that have ranges for it are gathered (later), and, once every rule is read,
//     cut at each other's ends. Within each of the intervals that this gives the same rules stand at every port, and are
//     joined to one Value. Pairs with the same rules share one cut.
//  2. Neighbours with equal Values are made one, and each is written as the prefixes that it consists of, at most 30.
//     One that is a single port is an exact Key.
//  3. An exact Key of another rule within a range stands beside it, joined with what the range says of its port: the
//     answer is that of one entry for each port.
//
// A range from port 1 is kept as one from port 0, which takes fewer prefixes: policy.Lookup asks no range about port 0.

// interval is a range of ports of one protocol, both ends inclusive, and what is said of it.
type interval struct {
	proto       flow.Proto
	first, last uint16
	value       policy.Value
}

// cut is what the rules of a pair say in ranges.
type cut struct {
	intervals []interval // disjoint, sorted by protocol and port
	entries   []policy.Entry
}

// later notes that the rule at position i has ranges for a pair.
func (e *expander) later(p pair, i int) {
	if _, ok := e.ranged[p]; !ok {
		e.pairs = append(e.pairs, p)
	}
	e.ranged[p] = append(e.ranged[p], i)
	e.steps++
}

// ranges writes the ranges of every pair. An error comes with the position of the rule that goes too far: for a pair,
// the last one that names it.
func (e *expander) ranges() (int, error) {
	cuts := make(map[pair]*cut, len(e.pairs))
	left := 2 * len(e.pairs)
	for _, p := range e.pairs {
		rules := e.ranged[p]
		c, i, err := e.cut(rules)
		if err != nil {
			return i, err
		}
		for _, entry := range c.entries {
			e.put(p, entry.Key, entry.Value)
		}
		left -= 2
		if e.entries+left > maxEntries {
			return rules[len(rules)-1], e.tooMany()
		}
		cuts[p] = c
	}
	e.within(cuts)
	return 0, nil
}

// cut is steps 1 and 2 for the rules at these positions.
func (e *expander) cut(rules []int) (*cut, int, error) {
	name := make([]byte, 0, 4*len(rules))
	for _, i := range rules {
		name = binary.LittleEndian.AppendUint32(name, uint32(i))
	}
	if c, ok := e.known[string(name)]; ok {
		return c, 0, nil
	}
	ends := map[flow.Proto]map[int]bool{}
	for _, i := range rules {
		for _, r := range rangesOf(&e.c.state.Policy.Rules[i]) {
			if ends[r.proto] == nil {
				ends[r.proto] = map[int]bool{}
			}
			ends[r.proto][int(r.first)], ends[r.proto][int(r.last)+1] = true, true
		}
	}
	c := &cut{}
	for _, proto := range slices.Sorted(maps.Keys(ends)) {
		points := slices.Sorted(maps.Keys(ends[proto]))
		values := make([]policy.Value, len(points)) // from each point to the next; the last one is only an end
		for _, i := range rules {
			if err := e.lay(&e.c.state.Policy.Rules[i], proto, points, values); err != nil {
				return nil, i, err
			}
		}
		c.add(proto, points, values)
	}
	e.known[string(name)] = c
	return c, 0, nil
}

// rangesOf lists the ranges of a rule.
func rangesOf(rule *policydoc.Rule) []interval {
	var out []interval
	for _, svc := range rule.Services {
		if svc.First == svc.Last {
			continue
		}
		r := interval{proto: svc.Proto, first: svc.First, last: svc.Last}
		if r.first == 1 {
			r.first = 0
		}
		out = append(out, r)
	}
	return out
}

// lay joins a rule to every interval that it covers.
func (e *expander) lay(rule *policydoc.Rule, proto flow.Proto, points []int, values []policy.Value) error {
	v := valueOf(rule, e.c.state.RuleNumbers[rule.ID])
	for _, r := range rangesOf(rule) {
		if r.proto != proto {
			continue
		}
		from, _ := slices.BinarySearch(points, int(r.first))
		to, _ := slices.BinarySearch(points, int(r.last)+1)
		if e.steps += to - from; e.steps > maxSteps {
			return fmt.Errorf("%w: with this rule it takes more than %d steps to expand; name fewer workloads, or ranges that overlap less", errTooLarge, maxSteps)
		}
		for i := from; i < to; i++ {
			values[i] = e.join(values[i], v)
		}
	}
	return nil
}

// add is step 2.
func (c *cut) add(proto flow.Proto, points []int, values []policy.Value) {
	start := len(c.intervals)
	for i, v := range values[:len(values)-1] {
		if !v.Present() {
			continue
		}
		first, last := uint16(points[i]), uint16(points[i+1]-1)
		if n := len(c.intervals); n > start && c.intervals[n-1].value == v && int(c.intervals[n-1].last)+1 == points[i] {
			c.intervals[n-1].last = last
			continue
		}
		c.intervals = append(c.intervals, interval{proto, first, last, v})
	}
	for _, r := range c.intervals[start:] {
		for _, k := range prefixes(r.first, r.last) {
			k.Proto = proto
			c.entries = append(c.entries, policy.Entry{Key: k, Value: r.value})
		}
	}
}

// prefixes writes a range as Keys with a port and bits, the fewest that hold exactly its ports; one that is a single
// port has no bits.
func prefixes(first, last uint16) []policy.Key {
	var out []policy.Key
	for port := int(first); port <= int(last); {
		// The largest that begins here: as long as the port allows, and no longer than what is left.
		log := min(bits.TrailingZeros16(uint16(port)), 15) // of port 0 too: a Key has one bit at least
		for port+1<<log-1 > int(last) {
			log--
		}
		k := policy.Key{Port: uint16(port)}
		if log > 0 {
			k.Bits = uint8(16 - log)
		}
		out = append(out, k)
		port += 1 << log
	}
	return out
}

// at finds what a cut says of a port.
func (c *cut) at(proto flow.Proto, port uint16) (policy.Value, bool) {
	i, found := slices.BinarySearchFunc(c.intervals, port, func(r interval, port uint16) int {
		switch {
		case r.proto < proto || r.proto == proto && r.last < port:
			return -1
		case r.proto > proto || r.first > port:
			return 1
		}
		return 0
	})
	if !found {
		return policy.Value{}, false
	}
	return c.intervals[i].value, true
}

// within is step 3.
func (e *expander) within(cuts map[pair]*cut) {
	own := map[identity.Number]bool{}
	for p := range cuts {
		own[p.from], own[p.to] = true, true
	}
	for n := range own {
		rs := e.c.Rulesets[n]
		for k, v := range rs {
			if k.Port == 0 || k.Bits != 0 {
				continue
			}
			p := pair{n, k.Peer}
			if k.Dir == policy.Ingress {
				p = pair{k.Peer, n}
			}
			c, ok := cuts[p]
			if !ok {
				continue
			}
			if inside, ok := c.at(k.Proto, k.Port); ok {
				rs[k] = e.join(v, inside)
			}
		}
	}
}
