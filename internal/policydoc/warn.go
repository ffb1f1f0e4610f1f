package policydoc

import (
	"fmt"
	"slices"
	"strings"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

const (
	// maxWarnings bounds what one document reports; a last warning says that there are more.
	maxWarnings = 100
	// maxCompared bounds the comparison of rules with what workloads serve; a warning says where it stopped.
	maxCompared = 2_000_000
)

// Single reports whether svc is one question that a packet can ask: one port of tcp or udp, or icmp.
func Single(svc policy.Service) bool {
	return svc.Proto == flow.ICMP || svc.First != 0 && svc.First == svc.Last
}

// warnings says what is legal in a consistent document, and probably not meant.
func (r *reader) warnings() []Warning {
	w := &warner{doc: r.doc, ix: r.doc.Index(), named: make([]bool, len(r.doc.Workloads)), seen: map[string][]int{}, twins: map[string][]int{}}
	for i := range r.doc.Rules {
		w.rule(&r.doc.Rules[i])
	}
	for i := range r.doc.Workloads {
		w.workload(i)
	}
	return w.out
}

type warner struct {
	doc      *Document
	ix       *Index
	named    []bool
	seen     map[string][]int // matches of a pattern by its text
	twins    map[string][]int // workloads by their selectors
	out      []Warning
	compared int
}

func (w *warner) add(at Position, format string, args ...any) {
	switch {
	case len(w.out) < maxWarnings:
		w.out = append(w.out, Warning{at, fmt.Sprintf(format, args...)})
	case len(w.out) == maxWarnings:
		w.out = append(w.out, Warning{at, "more warnings are not shown"})
	}
}

// matches marks the workloads that a pattern names, once for each different pattern.
func (w *warner) matches(p Pattern) []int {
	text := p.String()
	m, ok := w.seen[text]
	if !ok {
		m = w.ix.Match(p)
		w.seen[text] = m
		for _, i := range m {
			w.named[i] = true
		}
	}
	return m
}

func (w *warner) rule(rule *Rule) {
	if rule.Audit && rule.Action == policy.ActionAllow && rule.Expires.IsZero() {
		w.add(rule.At, "rule %s is in mode audit and has no condition that could withhold anything, so the mode changes nothing", rule.ID)
	}
	for _, side := range [...]struct {
		name string
		list []Pattern
	}{{"from", rule.From}, {"to", rule.To}} {
		for _, p := range side.list {
			m := w.matches(p)
			if len(m) == 0 {
				w.add(rule.At, "rule %s: %s in %s selects no workload, so it matches nothing", rule.ID, p, side.name)
			}
			if side.name == "to" && rule.Action == policy.ActionAllow {
				w.serves(rule, m)
			}
		}
	}
}

func (w *warner) serves(rule *Rule, targets []int) {
	for _, i := range targets {
		wl := &w.doc.Workloads[i]
		if len(wl.Serves) == 0 {
			continue
		}
		for _, svc := range rule.Services {
			w.compared += len(wl.Serves)
			if w.compared > maxCompared {
				if w.compared < 2*maxCompared {
					w.compared = 2 * maxCompared
					w.add(rule.At, "rules from here on were not compared with what workloads serve: there are too many")
				}
				return
			}
			if !slices.ContainsFunc(wl.Serves, func(s policy.Service) bool { return Covers(s, svc) }) {
				w.add(rule.At, "rule %s allows %v, which %s does not serve", rule.ID, svc, wl.ID.Short())
			}
		}
	}
}

// Covers reports whether everything in inner is in outer.
func Covers(outer, inner policy.Service) bool {
	if outer.Proto != flow.AnyProto && outer.Proto != inner.Proto {
		return false
	}
	return outer.First == 0 || inner.First != 0 && outer.First <= inner.First && inner.Last <= outer.Last
}

func (w *warner) workload(i int) {
	wl := &w.doc.Workloads[i]
	if !w.named[i] {
		w.add(wl.At, "workload %s is named by no rule, so it can talk to nothing", wl.ID.Short())
	}
	if !slices.ContainsFunc(wl.Selectors, func(s policy.Selector) bool { return s.Kind != policy.SelectUID }) {
		w.add(wl.At, "workload %s is selected by its user alone: every process of that user, however it was started, has its identity", wl.ID.Short())
	}
	w.twin(i)
}

// twin finds workloads that one process would match together; it would get neither identity.
func (w *warner) twin(i int) {
	wl := &w.doc.Workloads[i]
	var parts []string
	for _, s := range wl.Selectors {
		parts = append(parts, s.String())
	}
	slices.Sort(parts)
	key := strings.Join(parts, "\x00")
	for _, j := range w.twins[key] {
		other := &w.doc.Workloads[j]
		if slices.ContainsFunc(wl.Nodes, func(g string) bool { return slices.Contains(other.Nodes, g) }) {
			who := "a process that matches both"
			if wl.Selectors[0].Kind == policy.SelectInterface {
				who = "what arrives from the device"
			}
			w.add(wl.At, "workloads %s and %s have the same selectors on the same nodes: %s gets neither identity", other.ID.Short(), wl.ID.Short(), who)
			break
		}
	}
	if len(w.twins[key]) < maxTwins {
		w.twins[key] = append(w.twins[key], i)
	}
}

// maxTwins bounds how many workloads with equal selectors are compared with the next one.
const maxTwins = 16
