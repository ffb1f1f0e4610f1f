package api

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/store"
)

// Access is Tokens and AuditLog over the coordinator's store.
type Access struct{ store store.Store }

var (
	_ Tokens   = (*Access)(nil)
	_ AuditLog = (*Access)(nil)
)

// OverStore reads tokens from, and writes refusals to, the store that the registry uses too.
func OverStore(s store.Store) *Access { return &Access{s} }

// TokenByHash finds a token, revoked and expired ones included.
func (a *Access) TokenByHash(ctx context.Context, hash [32]byte) (APIToken, error) {
	var row store.APIToken
	err := a.store.View(ctx, func(tx store.Tx) (err error) {
		row, err = tx.APITokenByHash(hash)
		return err
	})
	if errors.Is(err, store.ErrNotFound) {
		return APIToken{}, ErrNoToken
	}
	if err != nil {
		return APIToken{}, fmt.Errorf("read API token: %w", err)
	}
	return APIToken{ID: row.ID, Role: row.Role, Expires: row.Expires, Revoked: !row.Revoked.IsZero()}, nil
}

// Record appends one line, in a transaction of its own.
func (a *Access) Record(ctx context.Context, e AuditEntry) error {
	_, err := a.store.Update(ctx, func(tx store.Tx) error {
		_, err := tx.AppendAudit(store.Audit{Time: e.Time, Who: e.Who, What: e.What, Object: e.Object, Outcome: e.Outcome, Detail: e.Detail})
		return err
	})
	if err != nil {
		return fmt.Errorf("append to the audit log: %w", err)
	}
	return nil
}

// List reads lines in order.
func (a *Access) List(ctx context.Context, after uint64, limit int) ([]apitypes.AuditRecord, error) {
	var rows []store.Audit
	err := a.store.View(ctx, func(tx store.Tx) (err error) {
		rows, err = tx.Audits(after, limit)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the audit log: %w", err)
	}
	out := make([]apitypes.AuditRecord, 0, len(rows))
	for _, r := range rows {
		out = append(out, apitypes.AuditRecord{Seq: r.Seq, Time: r.Time, Who: r.Who, What: r.What, Object: r.Object, Outcome: r.Outcome, Detail: r.Detail, Hash: hex.EncodeToString(r.Hash[:])})
	}
	return out, nil
}

// Verify walks through the whole chain. A broken one is an answer, not an error.
func (a *Access) Verify(ctx context.Context) (apitypes.AuditVerification, error) {
	head, err := store.VerifyAudit(ctx, a.store)
	out := apitypes.AuditVerification{OK: err == nil, Records: head.Lines}
	if errors.Is(err, store.ErrTampered) {
		out.Problem = err.Error()
		return out, nil
	}
	if err != nil {
		return out, fmt.Errorf("read the audit log: %w", err)
	}
	out.Head = hex.EncodeToString(head.Hash[:])
	return out, nil
}
