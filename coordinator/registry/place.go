package registry

import (
	"fmt"
	"path"
	"time"

	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// The kinds of revocations.
const (
	revokedNode     = "node"
	revokedWorkload = "workload"
)

// placement is what should stand on one node.
type placement struct {
	add    []identity.ID
	remove []store.Instance
	revoke []store.Instance
}

// place compares what a document puts on a node with what stands there. It is pure. current may hold removed rows.
//
//  1. A workload is placed on every active node whose name one of its globs matches.
//  2. What stands there and is not placed is removed.
//  3. What is revoked, by its node or by itself, stays as a tombstone while it is placed, and nothing new is made of it.
func place(doc *policydoc.Document, node store.Node, current []store.Instance, revoked revocations) placement {
	standing := make(map[string]store.Instance, len(current))
	for _, i := range current {
		if i.Removed.IsZero() {
			standing[i.Workload] = i
		}
	}
	status := NodeStatus(node.Status)
	var p placement
	placed := map[string]bool{}
	for _, w := range doc.Workloads {
		if status == NodePending || !matches(w.Nodes, node.Name) {
			continue
		}
		id := w.ID.String()
		placed[id] = true
		i, stands := standing[id]
		takenBack := status == NodeRevoked || revoked.hold(id, node.Name)
		switch {
		case stands && takenBack && !i.Revoked:
			p.revoke = append(p.revoke, i)
		case !stands && !takenBack:
			p.add = append(p.add, w.ID)
		}
	}
	for _, i := range current {
		if i.Removed.IsZero() && !placed[i.Workload] {
			p.remove = append(p.remove, i)
		}
	}
	return p
}

// matches reports whether one of the globs matches a node's name. A pattern that does not parse matches nothing; the
// document's parser refuses it.
func matches(globs []string, name string) bool {
	for _, g := range globs {
		if ok, err := path.Match(g, name); err == nil && ok {
			return true
		}
	}
	return false
}

// revocations are the tombstones of workloads.
type revocations map[[2]string]bool // ID and node, or ID and ""

func (r revocations) hold(id, node string) bool {
	return r[[2]string{id, ""}] || r[[2]string{id, node}]
}

func readRevocations(tx store.Tx) (revocations, error) {
	rows, err := tx.Revocations()
	if err != nil {
		return nil, err
	}
	out := revocations{}
	for _, r := range rows {
		if r.Kind == revokedWorkload {
			out[[2]string{r.Subject, r.Node}] = true
		}
	}
	return out, nil
}

// placeOn makes the placement on one node real.
func (r *Registry) placeOn(tx store.Tx, node store.Node) error {
	doc, err := r.document(tx)
	if err != nil {
		return err
	}
	revoked, err := readRevocations(tx)
	if err != nil {
		return err
	}
	current, err := tx.InstancesOn(node.Name)
	if err != nil {
		return err
	}
	return r.realise(tx, node, current, place(doc.doc, node, current, revoked))
}

// placeAll makes a whole document real, and forgets revocations of what it no longer places.
func (r *Registry) placeAll(tx store.Tx, doc *policydoc.Document) error {
	nodes, err := tx.Nodes(0)
	if err != nil {
		return err
	}
	instances, err := tx.Instances(0)
	if err != nil {
		return err
	}
	byNode := map[string][]store.Instance{}
	for _, i := range instances {
		byNode[i.Node] = append(byNode[i.Node], i)
	}
	if err := forgetRevocations(tx, doc, nodes); err != nil {
		return err
	}
	revoked, err := readRevocations(tx)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if err := r.realise(tx, n, byNode[n.Name], place(doc, n, byNode[n.Name], revoked)); err != nil {
			return err
		}
	}
	// Rows stay for twice the quarantine, so that a reader who follows by revision cannot miss a removal.
	return tx.PruneInstances(r.opts.Now().Add(-2 * Quarantine))
}

func forgetRevocations(tx store.Tx, doc *policydoc.Document, nodes []store.Node) error {
	rows, err := tx.Revocations()
	if err != nil {
		return err
	}
	for _, rev := range rows {
		if rev.Kind != revokedWorkload || stillPlaced(doc, nodes, rev) {
			continue
		}
		if err := tx.DeleteRevocation(rev.Kind, rev.Subject, rev.Node); err != nil {
			return err
		}
	}
	return nil
}

func stillPlaced(doc *policydoc.Document, nodes []store.Node, rev store.Revocation) bool {
	for _, w := range doc.Workloads {
		if w.ID.String() != rev.Subject {
			continue
		}
		for _, n := range nodes {
			if (rev.Node == "" || rev.Node == n.Name) && matches(w.Nodes, n.Name) {
				return true
			}
		}
	}
	return false
}

func (r *Registry) realise(tx store.Tx, node store.Node, current []store.Instance, p placement) error {
	now := r.opts.Now()
	for _, i := range p.remove {
		if err := removeInstance(tx, i, now); err != nil {
			return err
		}
	}
	for _, i := range p.revoke {
		i.Revoked = true
		if err := tx.PutInstance(i); err != nil {
			return err
		}
	}
	for _, id := range p.add {
		if err := addInstance(tx, id, node.Name, current, now); err != nil {
			return fmt.Errorf("place %s on %s: %w", id, node.Name, err)
		}
	}
	return nil
}

func removeInstance(tx store.Tx, i store.Instance, now time.Time) error {
	if err := tx.ReleaseAddress(i.IPv4, now.Add(Quarantine)); err != nil {
		return err
	}
	i.Removed = now
	return tx.PutInstance(i)
}

// addInstance gives an instance that comes back within its quarantine the addresses that it had, unless it was revoked:
// those addresses may still be cut off somewhere.
func addInstance(tx store.Tx, id identity.ID, node string, current []store.Instance, now time.Time) error {
	number, err := tx.NumberFor(id.String())
	if err != nil {
		return err
	}
	fresh := store.Instance{Workload: id.String(), Number: number, Node: node}
	owner := instanceOwner(id, node)
	for _, old := range current {
		if old.Workload != fresh.Workload || old.Revoked || old.Removed.IsZero() {
			continue
		}
		back, err := tx.ReclaimAddress(old.IPv4, owner)
		if err != nil {
			return err
		}
		if back {
			fresh.IPv4, fresh.IPv6 = old.IPv4, old.IPv6
			return tx.PutInstance(fresh)
		}
	}
	if fresh.IPv4, fresh.IPv6, err = takeAddresses(tx, owner, now); err != nil {
		return err
	}
	return tx.PutInstance(fresh)
}

func instanceOwner(id identity.ID, node string) string { return id.String() + "@" + node }
func nodeOwner(node string) string                     { return "node:" + node }
