package registry

import (
	"context"
	"fmt"
	"time"

	"github.com/signet-overlay/signet/coordinator/store"
)

// AppliedReport is what a node says it enforces.
type AppliedReport struct {
	PolicyRevision uint64
	Epoch          uint64
	Error          string // empty when everything was applied
}

// NodeRollout is one node's line of a rollout.
type NodeRollout struct {
	Node           string
	Status         NodeStatus
	PolicyRevision uint64 // the last that it reported; 0: none yet
	Epoch          uint64
	Time           time.Time
	Error          string
	Done           bool // it reported the asked revision or a later one, without an error
}

// maxReportError bounds what a node may write into the store.
const maxReportError = 1000

// Applied records a node's report. It wakes no reader: a report that made a snapshot that made a report would never
// end.
func (r *Registry) Applied(ctx context.Context, node string, report AppliedReport) error {
	if len(report.Error) > maxReportError {
		report.Error = report.Error[:maxReportError]
	}
	if _, ok := r.State().Nodes[node]; !ok {
		return ErrNodeUnknown
	}
	_, err := r.store.Update(ctx, func(tx store.Tx) error {
		return tx.PutApplied(store.Applied{Node: node, PolicyRevision: report.PolicyRevision, Epoch: report.Epoch, Time: r.opts.Now(), Error: report.Error})
	})
	if err != nil {
		return fmt.Errorf("record report of %s: %w", node, err)
	}
	return nil
}

// Rollout says how far a policy revision has come, for every node that is not revoked, sorted by name.
func (r *Registry) Rollout(ctx context.Context, policyRevision uint64) (out []NodeRollout, err error) {
	err = r.store.View(ctx, func(tx store.Tx) error {
		nodes, err := tx.Nodes(0)
		if err != nil {
			return err
		}
		rows, err := tx.Applied()
		if err != nil {
			return err
		}
		byNode := make(map[string]store.Applied, len(rows))
		for _, a := range rows {
			byNode[a.Node] = a
		}
		for _, n := range nodes {
			if NodeStatus(n.Status) == NodeRevoked {
				continue
			}
			a := byNode[n.Name]
			out = append(out, NodeRollout{Node: n.Name, Status: NodeStatus(n.Status), PolicyRevision: a.PolicyRevision, Epoch: a.Epoch, Time: a.Time, Error: a.Error,
				Done: !a.Time.IsZero() && a.PolicyRevision >= policyRevision && a.Error == ""})
		}
		return nil
	})
	return out, err
}
