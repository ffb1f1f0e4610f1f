package registry

import (
	"context"
	"fmt"
	"time"

	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// Bounds of one policy. Beyond them it is refused.
const (
	MaxPolicyBytes = 8 << 20
	MaxPolicyFiles = 1000
)

// SourceFile is one file of a policy as it was applied.
type SourceFile = store.SourceFile

// PolicyInfo is one line of the policy's history.
type PolicyInfo struct {
	Revision  uint64
	AppliedAt time.Time
	By        string
	Comment   string
}

// ApplyPolicy stores a document's sources as the next policy revision and places its workloads. doc must be what the
// sources parse to. With ifMatch the newest revision must still be that one (0: none was applied).
func (r *Registry) ApplyPolicy(ctx context.Context, doc *policydoc.Document, sources []SourceFile, by string, ifMatch *uint64) (uint64, error) {
	return r.applyPolicy(ctx, doc, store.Policy{Files: sources, By: by}, ifMatch)
}

func (r *Registry) applyPolicy(ctx context.Context, doc *policydoc.Document, p store.Policy, ifMatch *uint64) (policyRev uint64, err error) {
	if err := checkPolicySize(p.Files); err != nil {
		return 0, err
	}
	if doc == nil {
		return 0, fmt.Errorf("internal error: no document")
	}
	p.AppliedAt = r.opts.Now().UTC()
	rev, err := r.store.Update(ctx, func(tx store.Tx) error {
		newest, err := tx.PolicyRevision()
		if err != nil {
			return err
		}
		if ifMatch != nil && *ifMatch != newest {
			return fmt.Errorf("%w: it is at revision %d, not %d", ErrPolicyConflict, newest, *ifMatch)
		}
		if policyRev, err = tx.AddPolicy(p); err != nil {
			return err
		}
		if err := giveNumbers(tx, doc); err != nil {
			return err
		}
		if err := r.placeAll(tx, doc); err != nil {
			return err
		}
		return r.audit(WithActor(ctx, p.By), tx, "policy.apply", fmt.Sprint(policyRev), p.Comment)
	})
	if err != nil {
		return 0, fmt.Errorf("apply policy: %w", err)
	}
	r.loading.Lock()
	r.loading.policy = cachedDoc{policyRev, doc} // now that it is committed, it need not be parsed again
	r.loading.Unlock()
	return policyRev, r.refresh(ctx, rev, false)
}

func checkPolicySize(files []SourceFile) error {
	total := 0
	for _, f := range files {
		total += len(f.Name) + len(f.Data)
	}
	if total > MaxPolicyBytes || len(files) > MaxPolicyFiles {
		return fmt.Errorf("%w: %d bytes in %d files, at most %d in %d", ErrPolicyTooLarge, total, len(files), MaxPolicyBytes, MaxPolicyFiles)
	}
	return nil
}

// giveNumbers numbers every workload, placed or not, because explain judges those too.
func giveNumbers(tx store.Tx, doc *policydoc.Document) error {
	for _, w := range doc.Workloads {
		if _, err := tx.NumberFor(w.ID.String()); err != nil {
			return err
		}
	}
	for _, rule := range doc.Rules {
		if _, err := tx.RuleNumberFor(rule.ID); err != nil {
			return err
		}
	}
	return nil
}

// Rollback applies the text of an earlier revision again, as a new revision. 0 means the one before the newest.
func (r *Registry) Rollback(ctx context.Context, revision uint64) (uint64, error) {
	newest := r.State().PolicyRevision
	if revision == 0 {
		if newest < 2 {
			return 0, fmt.Errorf("%w: there is none before %d", ErrPolicyUnknown, newest)
		}
		revision = newest - 1
	}
	sources, err := r.PolicySource(ctx, revision)
	if err != nil {
		return 0, err
	}
	doc, err := r.parse(sources)
	if err != nil {
		return 0, fmt.Errorf("roll back to policy revision %d: %w", revision, err)
	}
	p := store.Policy{Files: sources, By: actor(ctx), Comment: fmt.Sprintf("rollback to %d", revision)}
	return r.applyPolicy(ctx, doc, p, &newest)
}

// History lists the policy revisions, newest first.
func (r *Registry) History(ctx context.Context) (out []PolicyInfo, err error) {
	err = r.store.View(ctx, func(tx store.Tx) error {
		rows, err := tx.Policies()
		for _, p := range rows {
			out = append(out, PolicyInfo{p.Revision, p.AppliedAt, p.By, p.Comment})
		}
		return err
	})
	return out, err
}

// PolicySource returns a revision's files as they were applied; 0 means the newest.
func (r *Registry) PolicySource(ctx context.Context, revision uint64) (files []SourceFile, err error) {
	err = r.store.View(ctx, func(tx store.Tx) error {
		if revision == 0 {
			if revision, err = tx.PolicyRevision(); err != nil {
				return err
			}
		}
		p, err := tx.Policy(revision)
		files = p.Files
		return orSentinel(err, fmt.Errorf("%w: %d", ErrPolicyUnknown, revision))
	})
	return files, err
}
