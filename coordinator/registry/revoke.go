package registry

import (
	"context"
	"fmt"

	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
)

// Approve makes a pending node active and places its workloads. Approving an active one is success.
func (r *Registry) Approve(ctx context.Context, name string) (revision uint64, err error) {
	return r.update(ctx, func(tx store.Tx) error {
		row, err := tx.Node(name)
		if err != nil {
			return orSentinel(err, ErrNodeUnknown)
		}
		switch NodeStatus(row.Status) {
		case NodeActive:
			return nil
		case NodeRevoked:
			return ErrNodeRevoked
		}
		row.Status, row.Bound = string(NodeActive), tx.Revision()
		if err := tx.PutNode(row); err != nil {
			return err
		}
		if err := r.placeOn(tx, row); err != nil {
			return err
		}
		return r.audit(ctx, tx, "node.approve", name, "")
	})
}

// Revoke takes a node out for good: its key is refused and its workloads become tombstones. Revoking twice is success.
func (r *Registry) Revoke(ctx context.Context, name string) (revision uint64, err error) {
	return r.update(ctx, func(tx store.Tx) error {
		row, err := tx.Node(name)
		if err != nil {
			return orSentinel(err, ErrNodeUnknown)
		}
		if NodeStatus(row.Status) == NodeRevoked {
			return nil
		}
		row.Status, row.Bound = string(NodeRevoked), tx.Revision()
		if err := tx.PutNode(row); err != nil {
			return err
		}
		if err := tx.PutRevocation(store.Revocation{Kind: revokedNode, Subject: name, Time: r.opts.Now(), By: actor(ctx)}); err != nil {
			return err
		}
		if err := r.placeOn(tx, row); err != nil {
			return err
		}
		return r.audit(ctx, tx, "node.revoke", name, "")
	})
}

// RevokeWorkload takes a workload out on one node, or, with an empty node, on all and on those that enrol later. It
// lasts until a policy no longer places the workload there.
func (r *Registry) RevokeWorkload(ctx context.Context, id identity.ID, node string) (revision uint64, err error) {
	return r.update(ctx, func(tx store.Tx) error {
		doc, err := r.document(tx)
		if err != nil {
			return err
		}
		if !declares(doc, id) {
			return fmt.Errorf("%w: %s", ErrWorkloadUnknown, id)
		}
		if err := tx.PutRevocation(store.Revocation{Kind: revokedWorkload, Subject: id.String(), Node: node, Time: r.opts.Now(), By: actor(ctx)}); err != nil {
			return err
		}
		standing, err := tx.Instances(0)
		if err != nil {
			return err
		}
		found := node == ""
		for _, i := range standing {
			if i.Workload != id.String() || node != "" && i.Node != node || !i.Removed.IsZero() {
				continue
			}
			found = true
			if i.Revoked {
				continue
			}
			i.Revoked = true
			if err := tx.PutInstance(i); err != nil {
				return err
			}
		}
		if !found {
			return fmt.Errorf("%w: %s on %s", ErrNotPlaced, id, node)
		}
		return r.audit(ctx, tx, "workload.revoke", id.String(), node)
	})
}

func declares(doc cachedDoc, id identity.ID) bool {
	for _, w := range doc.doc.Workloads {
		if w.ID == id {
			return true
		}
	}
	return false
}
