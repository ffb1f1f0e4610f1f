package policydoc

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

const (
	wantZone     = "a zone's name: a-z 0-9 and -, at most 63 letters"
	wantWorkload = "zone/workload"
	wantService  = "tcp/PORT, tcp/FIRST-LAST, udp/PORT, sctp/PORT, icmp or any, with ports 1 to 65535"
	wantSelector = "unit:NAME.service, cgroup:/PATH, uid:NUMBER, container:KEY=VALUE or interface:NAME"
)

func zoneKeys() keys { return keys{what: "a zone", known: []string{"name", "internet"}} }

func (r *reader) zone(n *node) {
	var name *node
	zone := Zone{At: n.at}
	ok := r.object(n, zoneKeys(), func(key string, v *node) {
		if key == "name" {
			name = v
			return
		}
		zone.Confined = r.choice(v, "internet", "allow", "deny")
	})
	if !ok {
		return
	}
	if name == nil {
		r.missing(n, "name", "the zone")
		return
	}
	s, ok := r.text(name, wantZone)
	if !ok {
		return
	}
	z, err := identity.ParseZone(s)
	switch first, dup := r.zones[z]; {
	case err != nil:
		r.bad(name, "is not a zone", wantZone, "")
	case z == identity.ReservedZone:
		r.bad(name, "is reserved for Signet itself", "another name", "")
	case dup:
		r.bad(name, "is a duplicate zone", "each zone once", earlier(first))
	default:
		r.zones[z] = name.at
		zone.Name = z
		r.doc.Zones = append(r.doc.Zones, zone)
	}
}

// choice reads one of two words, and reports whether it is the second; the first is the default.
func (r *reader) choice(n *node, key, first, second string) bool {
	want := first + " or " + second
	s, ok := r.text(n, want)
	if ok && s != first && s != second {
		r.bad(n, "is not a choice of "+key, want, "")
	}
	return ok && s == second
}

func workloadKeys() keys {
	return keys{what: "a workload", known: []string{"id", "selectors", "nodes", "labels", "serves", "listen"},
		later: []string{"tokens", "x509", "files"}}
}

func (r *reader) workload(n *node) {
	w := Workload{At: n.at}
	var id, selectors, nodes *node
	ok := r.object(n, workloadKeys(), func(key string, v *node) {
		switch key {
		case "id":
			id = v
		case "selectors":
			selectors = v
			w.Selectors = r.selectors(v)
		case "nodes":
			nodes = v
			w.Nodes = r.globs(v)
		case "labels":
			w.Labels = r.labels(v)
		case "serves":
			w.Serves = r.services(v)
		case "listen":
			w.OverlayOnly = r.choice(v, "listen", "any", "overlay")
		}
	})
	if !ok {
		return
	}
	if selectors == nil {
		r.missing(n, "selectors", "the workload")
	}
	if nodes == nil {
		r.missing(n, "nodes", "the workload")
	}
	if id == nil {
		r.missing(n, "id", "the workload")
		return
	}
	if w.ID, ok = r.workloadID(id); !ok {
		return
	}
	if first, dup := r.workloads[w.ID]; dup {
		r.bad(id, "is a duplicate workload", "each id once", earlier(first))
		return
	}
	r.workloads[w.ID] = id.at
	r.refs = append(r.refs, ref{zone: w.ID.Zone(), at: id})
	r.doc.Workloads = append(r.doc.Workloads, w)
}

// workloadID reads zone/workload; whether it is declared is another question.
func (r *reader) workloadID(n *node) (identity.ID, bool) {
	s, ok := r.text(n, wantWorkload)
	if !ok {
		return identity.ID{}, false
	}
	id, err := r.td.ParseShort(s)
	if err == nil {
		return id, true
	}
	hint := ""
	switch short, full := strings.CutPrefix(s, "spiffe://"+r.td.String()+"/"); {
	case full:
		hint = "write " + quote(short)
	case strings.HasPrefix(s, identity.ReservedZone.String()+"/"):
		hint = "the zone signet is reserved for Signet itself"
	case strings.Contains(s, "*"):
		hint = "only a whole zone can be named with a star, and only in from and to: zone/*"
	}
	r.bad(n, "is not a workload's id", wantWorkload, hint)
	return identity.ID{}, false
}

func (r *reader) selectors(n *node) []policy.Selector {
	var out []policy.Selector
	var device *node
	for _, item := range r.filled(n, "selectors", maxSelectors) {
		s, ok := r.text(item, "kind:value")
		if !ok {
			continue
		}
		sel, err := policy.ParseSelector(s)
		switch {
		case errors.Is(err, policy.ErrNotBuilt):
			r.later(item, "the selector "+quote(s), "use unit:, cgroup:, uid:, container: or interface:")
		case err != nil:
			r.bad(item, "is not a selector", wantSelector, "")
		case slices.Contains(out, sel):
			r.bad(item, "is a duplicate selector", "each selector once", "")
		default:
			out = append(out, sel)
			if sel.Kind == policy.SelectInterface {
				device = item
			}
		}
	}
	if device != nil && policy.CheckSelectors(out) != nil {
		r.bad(device, "stands beside other selectors", "a network device alone",
			"the processes behind it are in a network namespace of their own, where this host cannot tell them apart")
	}
	return out
}

func (r *reader) globs(n *node) []string {
	const want = "a node's name, or a pattern such as api-*"
	var out []string
	for _, item := range r.filled(n, "node names", maxGlobs) {
		s, ok := r.text(item, want)
		if !ok {
			continue
		}
		if !validGlob(s) {
			r.bad(item, "is not a node pattern", want, "")
			continue
		}
		out = append(out, s)
	}
	return out
}

// validGlob accepts path.Match syntax over the letters of node names.
func validGlob(s string) bool {
	if len(s) > 4*identity.MaxNameLength || strings.Contains(s, "/") {
		return false
	}
	if !strings.ContainsAny(s, `*?[\`) {
		return identity.ParseName(s) == nil
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return false
		}
	}
	_, err := path.Match(s, "")
	return err == nil
}

func (r *reader) labels(n *node) map[string]string {
	const want = "labels: {key: value}, of a-z A-Z 0-9 . - _"
	if n.kind != kindMap {
		r.wrong(n, want, "")
		return nil
	}
	if len(n.pairs) > maxLabels {
		r.bad(n.pairs[maxLabels].key, "is one label too many", fmt.Sprintf("at most %d labels", maxLabels), "")
		return nil
	}
	out := make(map[string]string, len(n.pairs))
	for _, p := range n.pairs {
		if identity.ParseName(p.key.text) != nil {
			r.bad(p.key, "is not a label's key", want, "")
			continue
		}
		s, ok := r.text(p.value, want)
		if !ok {
			continue
		}
		if identity.ParseName(s) != nil {
			r.bad(p.value, "is not a label's value", want, "")
			continue
		}
		out[p.key.text] = s
	}
	return out
}

func (r *reader) services(n *node) []policy.Service {
	var out []policy.Service
	for _, item := range r.filled(n, "services", maxServices) {
		if svc, ok := r.service(item); ok {
			out = append(out, svc)
		}
	}
	return out
}

func (r *reader) service(n *node) (policy.Service, bool) {
	s, ok := r.text(n, wantService)
	if !ok {
		return policy.Service{}, false
	}
	if svc, known := r.parsed[s]; known {
		return svc, true
	}
	svc, err := policy.ParseService(s)
	if err != nil {
		r.bad(n, "is not a service", wantService, "")
		return svc, false
	}
	r.parsed[s] = svc
	return svc, true
}

func ruleKeys() keys {
	return keys{what: "a rule", known: []string{"id", "from", "to", "allow", "deny", "expires", "mode"}, later: []string{"when", "hours"}}
}

func (r *reader) rule(n *node) {
	rule := Rule{At: n.at}
	at := map[string]*node{}
	ok := r.object(n, ruleKeys(), func(key string, v *node) {
		at[key] = v
		switch key {
		case "from":
			rule.From = r.patterns(v, key)
		case "to":
			rule.To = r.patterns(v, key)
		case "allow":
			rule.Action = policy.ActionAllow
			rule.Services = r.services(v)
		case "deny":
			rule.Action = policy.ActionDeny
			rule.Services = r.services(v)
		case "expires":
			rule.Expires = r.instant(v)
		case "mode":
			rule.Audit = r.choice(v, "mode", "enforce", "audit")
		}
	})
	if !ok {
		return
	}
	for _, key := range []string{"from", "to"} {
		if at[key] == nil {
			r.missing(n, key, "the rule")
		}
	}
	switch {
	case at["allow"] != nil && at["deny"] != nil:
		r.add(Error{Pos: n.at, Problem: "the rule has both allow and deny", Want: "exactly one of them", Hint: "write two rules"})
	case at["allow"] == nil && at["deny"] == nil:
		r.add(Error{Pos: n.at, Problem: "the rule has neither allow nor deny", Want: "exactly one of them"})
	}
	if at["id"] == nil {
		r.missing(n, "id", "the rule")
		return
	}
	rule.ID, ok = r.ruleID(at["id"])
	if ok {
		r.doc.Rules = append(r.doc.Rules, rule)
	}
}

func (r *reader) ruleID(n *node) (string, bool) {
	const want = "a rule's name: a-z A-Z 0-9 . - _, at most 63 letters"
	s, ok := r.text(n, want)
	if !ok {
		return "", false
	}
	if identity.ParseName(s) != nil {
		r.bad(n, "is not a rule's name", want, "")
		return "", false
	}
	if first, dup := r.rules[s]; dup {
		r.bad(n, "is a duplicate rule", "each id once", earlier(first))
		return "", false
	}
	r.rules[s] = n.at
	return s, true
}

// latestExpiry keeps every instant of the kernel's clock, which counts nanoseconds in 64 bits, in range.
const latestExpiry = 2200

func (r *reader) instant(n *node) time.Time {
	const want = "a time as in RFC 3339, 2027-01-31T00:00:00Z"
	s, ok := r.text(n, want)
	if !ok {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339, s)
	switch {
	case err != nil:
		hint := ""
		if _, err := time.Parse(time.DateOnly, s); err == nil {
			hint = "write " + quote(s+"T00:00:00Z")
		}
		r.bad(n, "is not a time", want, hint)
		return time.Time{}
	case t.Year() < 1970 || t.Year() > latestExpiry:
		r.bad(n, "is out of range", fmt.Sprintf("a year from 1970 to %d", latestExpiry), "a rule without expires never expires")
		return time.Time{}
	}
	return t.UTC()
}

func patternKeys() keys { return keys{what: "a pattern", known: []string{"labels"}} }

// patterns reads from and to: a list, or one mapping with labels.
func (r *reader) patterns(n *node, key string) []Pattern {
	items := []*node{n}
	if n.kind != kindMap {
		items = r.filled(n, "workloads for "+key, maxPatterns)
	}
	out := make([]Pattern, 0, len(items))
	for _, item := range items {
		p, ok := r.pattern(item)
		if !ok {
			continue
		}
		out = append(out, p)
	}
	return out
}

func (r *reader) pattern(n *node) (p Pattern, ok bool) {
	if n.kind == kindMap {
		r.object(n, patternKeys(), func(_ string, v *node) { p.Labels = r.labels(v) })
		if p.Labels != nil && len(p.Labels) == 0 {
			r.bad(n, "labels without a label", "at least one label", "no labels at all would select every workload")
		}
		return p, len(p.Labels) > 0
	}
	s, ok := r.text(n, "zone/workload, zone/* or labels: {key: value}")
	if !ok {
		return p, false
	}
	if zone, whole := strings.CutSuffix(s, "/*"); whole {
		z, err := identity.ParseZone(zone)
		switch {
		case err != nil:
			r.bad(n, "does not name a zone", "zone/*", "name each zone on its own")
			return p, false
		case z == identity.ReservedZone:
			r.bad(n, "is reserved for Signet itself", "another zone", "")
			return p, false
		}
		r.refs = append(r.refs, ref{zone: z, at: n})
		return Pattern{Zone: z}, true
	}
	if p.ID, ok = r.workloadID(n); ok {
		r.refs = append(r.refs, ref{id: p.ID, at: n})
	}
	return p, ok
}

// String is the form of documents.
func (p Pattern) String() string {
	switch {
	case !p.ID.IsZero():
		return p.ID.Short()
	case !p.Zone.IsZero():
		return p.Zone.String() + "/*"
	}
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(p.Labels)) {
		parts = append(parts, k+": "+p.Labels[k])
	}
	return "labels: {" + strings.Join(parts, ", ") + "}"
}

func testKeys() keys { return keys{what: "a test", known: []string{"from", "to", "port", "expect"}} }

func (r *reader) test(n *node) {
	t := Test{At: n.at}
	at := map[string]*node{}
	ok := r.object(n, testKeys(), func(key string, v *node) {
		at[key] = v
		switch key {
		case "from":
			t.From = r.declared(v)
		case "to":
			t.To = r.declared(v)
		case "port":
			t.Service = r.port(v)
		case "expect":
			t.Expect = r.expect(v)
		}
	})
	if !ok {
		return
	}
	for _, key := range testKeys().known {
		if at[key] == nil {
			r.missing(n, key, "the test")
		}
	}
	r.doc.Tests = append(r.doc.Tests, t)
}

func (r *reader) declared(n *node) identity.ID {
	id, ok := r.workloadID(n)
	if ok {
		r.refs = append(r.refs, ref{id: id, at: n})
	}
	return id
}

func (r *reader) port(n *node) policy.Service {
	svc, ok := r.service(n)
	if ok && !Single(svc) {
		r.bad(n, "is more than one port", "one port: tcp/5432, udp/53 or icmp", "")
	}
	return svc
}

func (r *reader) expect(n *node) flow.Verdict {
	switch s, ok := r.text(n, "allow or deny"); {
	case s == "allow":
		return flow.Allow
	case ok && s != "deny":
		r.bad(n, "is not a verdict", "allow or deny", "")
	}
	return flow.Deny
}
