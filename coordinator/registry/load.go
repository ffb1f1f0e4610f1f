package registry

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// refresh brings State to at least a revision. It reads only what changed since the last time, and one reading serves
// every transaction that was committed before it: callers that come later find their revision loaded.
func (r *Registry) refresh(ctx context.Context, atLeast uint64, wake bool) error {
	// The transaction is committed whether its caller still waits or not; State must follow.
	ctx = context.WithoutCancel(ctx)
	r.loading.Lock()
	defer r.loading.Unlock()
	if !wake && r.loading.revision >= atLeast {
		return nil
	}
	var next *State
	var seen, quiet bool
	err := r.store.View(ctx, func(tx store.Tx) (err error) {
		next, seen, quiet, err = r.loadLocked(tx)
		return err
	})
	if err != nil {
		return fmt.Errorf("read state back: %w", err)
	}
	r.loading.revision = next.Revision
	if !seen && !quiet && !wake {
		return nil // only logs or reports changed
	}
	r.state.Store(next)
	if seen || wake {
		r.signal()
	}
	return nil
}

// loadLocked makes the next State. seen: something changed that other nodes see; quiet: something else did.
func (r *Registry) loadLocked(tx store.Tx) (next *State, seen, quiet bool, err error) {
	next = new(State)
	*next = *r.state.Load()
	since := r.loading.revision
	if seen, err = loadMeta(tx, next); err != nil {
		return nil, false, false, err
	}
	nodesSeen, quiet, err := loadNodes(tx, next, since)
	if err != nil {
		return nil, false, false, err
	}
	instances, err := loadInstances(tx, next, since)
	if err != nil {
		return nil, false, false, err
	}
	numbers, err := loadNumbers(tx, next)
	if err != nil {
		return nil, false, false, err
	}
	doc, err := r.documentLocked(tx)
	if err != nil {
		return nil, false, false, err
	}
	policyChanged := doc.revision != next.PolicyRevision
	r.loading.policy = doc
	next.Policy, next.PolicyRevision = doc.doc, doc.revision
	next.Revision = tx.Revision()
	return next, seen || nodesSeen || instances || numbers || policyChanged, quiet, nil
}

func loadMeta(tx store.Tx, next *State) (changed bool, err error) {
	m, err := tx.Meta()
	if err != nil {
		return false, err
	}
	before := *next
	if next.TrustDomain, err = identity.ParseTrustDomain(m.TrustDomain); err != nil {
		return false, err
	}
	if next.Overlay4, err = netip.ParsePrefix(m.Overlay4); err != nil {
		return false, fmt.Errorf("stored overlay: %w", err)
	}
	if next.Overlay6, err = netip.ParsePrefix(m.Overlay6); err != nil {
		return false, fmt.Errorf("stored overlay: %w", err)
	}
	next.Incarnation, next.Lease = m.Incarnation, m.Lease
	return before.Incarnation != next.Incarnation || before.Lease != next.Lease || before.Overlay4 != next.Overlay4 || before.Overlay6 != next.Overlay6, nil
}

func loadNodes(tx store.Tx, next *State, since uint64) (seen, quiet bool, err error) {
	rows, err := tx.Nodes(since)
	if err != nil {
		return false, false, err
	}
	if next.Nodes == nil || len(rows) > 0 {
		fresh := make(map[string]Node, len(next.Nodes)+len(rows))
		maps.Copy(fresh, next.Nodes)
		next.Nodes = fresh
	}
	for _, row := range rows {
		n, err := nodeFromRow(row)
		if err != nil {
			return false, false, err
		}
		if old, ok := next.Nodes[n.Name]; !ok || old.Revision != n.Revision {
			seen = true
		}
		next.Nodes[n.Name] = n
	}
	return seen, len(rows) > 0, nil
}

func loadInstances(tx store.Tx, next *State, since uint64) (changed bool, err error) {
	rows, err := tx.Instances(since)
	if err != nil || len(rows) == 0 {
		return false, err
	}
	type place struct{ workload, node string }
	touched := make(map[place]bool, len(rows))
	var fresh []Instance
	for _, row := range rows {
		touched[place{row.Workload, row.Node}] = true
		if !row.Removed.IsZero() {
			continue
		}
		i, err := instanceFromRow(row)
		if err != nil {
			return false, err
		}
		fresh = append(fresh, i)
	}
	for _, i := range next.Instances {
		if !touched[place{i.Workload.String(), i.Node}] {
			fresh = append(fresh, i)
		}
	}
	slices.SortFunc(fresh, func(a, b Instance) int {
		return cmp.Or(cmp.Compare(a.Workload.String(), b.Workload.String()), cmp.Compare(a.Node, b.Node))
	})
	next.Instances = fresh
	return true, nil
}

// loadNumbers follows by the numbers themselves: they only grow.
func loadNumbers(tx store.Tx, next *State) (changed bool, err error) {
	var top identity.Number
	for _, n := range next.Numbers {
		top = max(top, n)
	}
	ids, err := tx.Numbers(uint32(top))
	if err != nil {
		return false, err
	}
	if next.Numbers == nil || len(ids) > 0 {
		next.Numbers = maps.Clone(next.Numbers)
		if next.Numbers == nil {
			next.Numbers = map[identity.ID]identity.Number{}
		}
	}
	for text, n := range ids {
		id, err := identity.ParseID(text)
		if err != nil {
			return false, fmt.Errorf("stored number %d: %w", n, err)
		}
		next.Numbers[id] = identity.Number(n)
	}
	var topRule uint32
	for _, n := range next.RuleNumbers {
		topRule = max(topRule, n)
	}
	rules, err := tx.RuleNumbers(topRule)
	if err != nil {
		return false, err
	}
	if next.RuleNumbers == nil || len(rules) > 0 {
		fresh := make(map[string]uint32, len(next.RuleNumbers)+len(rules))
		maps.Copy(fresh, next.RuleNumbers)
		maps.Copy(fresh, rules)
		next.RuleNumbers = fresh
	}
	return len(ids)+len(rules) > 0, nil
}

// documentLocked returns the newest policy that tx sees.
func (r *Registry) documentLocked(tx store.Tx) (cachedDoc, error) {
	return r.parseStored(tx, r.loading.policy)
}

// document is documentLocked for writers: State may be behind what the transaction sees, and is then not used. What was
// parsed inside a transaction is not kept, because the transaction may yet fail.
func (r *Registry) document(tx store.Tx) (cachedDoc, error) {
	st := r.state.Load()
	return r.parseStored(tx, cachedDoc{st.PolicyRevision, st.Policy})
}

func (r *Registry) parseStored(tx store.Tx, known cachedDoc) (cachedDoc, error) {
	rev, err := tx.PolicyRevision()
	if err != nil || rev == known.revision {
		return known, err
	}
	p, err := tx.Policy(rev)
	if err != nil {
		return known, err
	}
	doc, err := r.parse(p.Files)
	if err != nil {
		return known, fmt.Errorf("policy revision %d, as stored: %w", rev, err)
	}
	return cachedDoc{rev, doc}, nil
}

func (r *Registry) parse(files []store.SourceFile) (*policydoc.Document, error) {
	if r.opts.Parse == nil {
		return nil, fmt.Errorf("%w: no parser for policy sources was given", ErrSettings)
	}
	return r.opts.Parse(files)
}

func nodeFromRow(row store.Node) (n Node, err error) {
	n = Node{Name: row.Name, Number: identity.Number(row.Number), Status: NodeStatus(row.Status), SPKI: row.SPKI,
		Created: row.Created, Revision: row.Bound, PrevSPKI: row.PrevSPKI, Ephemeral: row.Ephemeral}
	if n.ID, err = identity.ParseID(row.ID); err != nil {
		return n, fmt.Errorf("stored node %s: %w", row.Name, err)
	}
	if n.Key, err = key.PublicFromBytes(row.Key); err != nil {
		return n, fmt.Errorf("stored node %s: %w", row.Name, err)
	}
	n.IPv4, n.IPv6, err = parseAddresses(row.IPv4, row.IPv6)
	if err != nil {
		return n, fmt.Errorf("stored node %s: %w", row.Name, err)
	}
	return n, nil
}

func instanceFromRow(row store.Instance) (i Instance, err error) {
	i = Instance{Number: identity.Number(row.Number), Node: row.Node, Revoked: row.Revoked, Revision: row.Revision}
	if i.Workload, err = identity.ParseID(row.Workload); err != nil {
		return i, fmt.Errorf("stored instance: %w", err)
	}
	i.IPv4, i.IPv6, err = parseAddresses(row.IPv4, row.IPv6)
	if err != nil {
		return i, fmt.Errorf("stored instance of %s on %s: %w", row.Workload, row.Node, err)
	}
	return i, nil
}

func parseAddresses(v4, v6 string) (a4, a6 netip.Addr, err error) {
	if a4, err = netip.ParseAddr(v4); err != nil {
		return a4, a6, err
	}
	a6, err = netip.ParseAddr(v6)
	return a4, a6, err
}
