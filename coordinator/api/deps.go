package api

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// Deps is what the API stands on. Mesh, Policies, Tokens, Audit and Log are required; a *registry.Registry is both Mesh
// and Policies, and OverStore gives Tokens and Audit.
type Deps struct {
	Mesh     Mesh
	Policies Policies
	Tokens   Tokens
	Audit    AuditLog
	// Sessions may be nil: then no node counts as connected.
	Sessions Sessions
	// HostNames are the names, in lower case, under which the API may be asked besides IP addresses and localhost:
	// those of its TLS certificate. A request for any other name is refused (DNS rebinding).
	HostNames []string
	// Ready says why the coordinator cannot serve yet; nil means that it always can.
	Ready   func(context.Context) error
	Version string
	Log     *slog.Logger
	Now     func() time.Time // nil means time.Now
}

// Mesh is the registry of nodes and workloads. Each change is audited, in its own transaction, under the actor that
// registry.WithActor put into the context.
type Mesh interface {
	State() *registry.State
	CreateJoinToken(ctx context.Context, r registry.TokenRequest) (text string, token registry.JoinToken, err error)
	Approve(ctx context.Context, node string) (revision uint64, err error)
	Revoke(ctx context.Context, node string) (revision uint64, err error)
	// RevokeWorkload takes a workload back on one node, or on all when node is empty.
	RevokeWorkload(ctx context.Context, id identity.ID, node string) (revision uint64, err error)
}

// Policies keeps documents. Changes are audited as those of Mesh.
type Policies interface {
	// ApplyPolicy commits a document that was parsed and tested; with ifMatch, only on top of that revision.
	ApplyPolicy(ctx context.Context, doc *policydoc.Document, sources []registry.SourceFile, by string, ifMatch *uint64) (revision uint64, err error)
	PolicySource(ctx context.Context, revision uint64) ([]registry.SourceFile, error)
	History(ctx context.Context) ([]registry.PolicyInfo, error) // newest first
	// Rollback brings the document of a revision into force again, as a new revision.
	Rollback(ctx context.Context, revision uint64) (newRevision uint64, err error)
	// Rollout lists the nodes that are not revoked, by name.
	Rollout(ctx context.Context, revision uint64) ([]registry.NodeRollout, error)
}

// ErrNoToken is what Tokens says of a hash that it does not know.
var ErrNoToken = errors.New("no such API token")

// Tokens finds API tokens by the SHA-256 of their text.
type Tokens interface {
	TokenByHash(ctx context.Context, hash [32]byte) (APIToken, error) // ErrNoToken
}

// APIToken is what the store knows of a token; never the token itself.
type APIToken struct {
	ID      string
	Role    string
	Expires time.Time // zero: never
	Revoked bool
}

// AuditLog is the hash-chained log.
type AuditLog interface {
	// Record adds what no registry method records: refusals, and mutating requests that failed.
	Record(ctx context.Context, e AuditEntry) error
	// List returns at most limit records after seq, oldest first.
	List(ctx context.Context, after uint64, limit int) ([]apitypes.AuditRecord, error)
	Verify(ctx context.Context) (apitypes.AuditVerification, error)
}

// AuditEntry is one event for the log.
type AuditEntry struct {
	Time                               time.Time
	Who, What, Object, Outcome, Detail string
}

// Sessions knows which nodes are connected.
type Sessions interface {
	Connected() map[string]time.Time // node name to when it was last heard of
}
