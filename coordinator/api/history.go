package api

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/policydoc"
)

func (s *server) listRevisions(ctx context.Context, in *page) (*output[apitypes.RevisionList], error) {
	history, err := s.deps.Policies.History(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the policy's history: %w", err)
	}
	after, err := in.after()
	if err != nil {
		return nil, err
	}
	if after != "" {
		last, err := strconv.ParseUint(after, 10, 64)
		if err != nil {
			return nil, invalid("cursor is not one that this API gave", "leave it out to begin at the start")
		}
		history = slices.DeleteFunc(history, func(r registry.PolicyInfo) bool { return r.Revision >= last })
	}
	out := &output[apitypes.RevisionList]{apitypes.RevisionList{Revisions: make([]apitypes.Revision, 0, min(len(history), in.limit()))}}
	current := s.deps.Mesh.State().PolicyRevision
	for i, r := range history {
		if i == in.limit() {
			out.Body.NextCursor = cursor(history[i-1].Revision)
			break
		}
		out.Body.Revisions = append(out.Body.Revisions, apitypes.Revision{
			Revision: r.Revision, Time: r.AppliedAt, By: r.By, Note: r.Comment, Current: r.Revision == current,
		})
	}
	return out, nil
}

// showRollout lists every host that is not revoked; one that is away is not waited for, and says so.
func (s *server) showRollout(ctx context.Context, in *revisionInput) (*output[apitypes.Rollout], error) {
	if in.N == 0 || in.N > s.deps.Mesh.State().PolicyRevision {
		return nil, notFound("policy revision", strconv.FormatUint(in.N, 10))
	}
	rows, err := s.deps.Policies.Rollout(ctx, in.N)
	if err != nil {
		return nil, fmt.Errorf("read the rollout: %w", err)
	}
	sessions := s.connected()
	out := &output[apitypes.Rollout]{apitypes.Rollout{Revision: in.N, Hosts: make([]apitypes.RolloutHost, 0, len(rows))}}
	for _, r := range rows {
		_, connected := sessions[r.Node]
		if connected && !r.Done {
			out.Body.Waiting++
		}
		out.Body.Hosts = append(out.Body.Hosts, apitypes.RolloutHost{
			Node: r.Node, Connected: connected, Revision: r.PolicyRevision, Applied: r.Time, Done: r.Done, Error: r.Error,
		})
	}
	return out, nil
}

type rollbackInput struct{ Body *apitypes.RollbackRequest }

func (s *server) rollbackPolicy(ctx context.Context, in *rollbackInput) (*appliedOutput, error) {
	before := s.deps.Mesh.State().PolicyRevision
	var target uint64
	if in.Body != nil {
		target = in.Body.Revision
	}
	if target == 0 {
		if before < 2 {
			return nil, problem(http.StatusConflict, apitypes.CodeConflict, "there is no earlier policy revision", "see: signet policy history")
		}
		target = before - 1
	}
	// The document is read and tested again: what was valid once may not be any more, and must not come in by this door.
	src, err := s.source(ctx, target)
	if err != nil {
		return nil, err
	}
	_, check := s.examine(documentFiles(src.Body.Files))
	if !check.OK {
		return nil, refusedDocument(check)
	}
	revision, err := s.deps.Policies.Rollback(ctx, target)
	if err != nil {
		return nil, err
	}
	return applied(revision, check), nil
}

func documentFiles(files []apitypes.File) []policydoc.File {
	out := make([]policydoc.File, 0, len(files))
	for _, f := range files {
		out = append(out, policydoc.File{Name: f.Name, Data: []byte(f.Data)})
	}
	return out
}
