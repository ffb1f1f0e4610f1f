package api

import (
	"context"
	"encoding/base64"
	"fmt"
	"strconv"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/registry"
)

func cursor(n uint64) string {
	return base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatUint(n, 10)))
}

func (s *server) listAudit(ctx context.Context, in *page) (*output[apitypes.AuditList], error) {
	text, err := in.after()
	if err != nil {
		return nil, err
	}
	var after uint64
	if text != "" {
		if after, err = strconv.ParseUint(text, 10, 64); err != nil {
			return nil, invalid("cursor is not one that this API gave", "leave it out to begin at the start")
		}
	}
	// One more than the page, to know whether there is another.
	records, err := s.deps.Audit.List(ctx, after, in.limit()+1)
	if err != nil {
		return nil, fmt.Errorf("read the audit log: %w", err)
	}
	out := &output[apitypes.AuditList]{apitypes.AuditList{Records: records}}
	if len(records) > in.limit() {
		out.Body.Records = records[:in.limit()]
		out.Body.NextCursor = cursor(records[in.limit()-1].Seq)
	}
	if records == nil {
		out.Body.Records = []apitypes.AuditRecord{}
	}
	return out, nil
}

func (s *server) verifyAudit(ctx context.Context, _ *nothing) (*output[apitypes.AuditVerification], error) {
	v, err := s.deps.Audit.Verify(ctx)
	if err != nil {
		return nil, fmt.Errorf("verify the audit log: %w", err)
	}
	return &output[apitypes.AuditVerification]{v}, nil
}

func (s *server) stats(_ context.Context, _ *nothing) (*output[apitypes.Stats], error) {
	st := s.deps.Mesh.State()
	nodes := map[string]int{
		string(registry.NodePending): 0, string(registry.NodeActive): 0, string(registry.NodeRevoked): 0, "connected": len(s.connected()),
	}
	for _, n := range st.Nodes {
		nodes[string(n.Status)]++
	}
	return &output[apitypes.Stats]{apitypes.Stats{
		TrustDomain: st.TrustDomain.String(), Version: s.deps.Version, StoreRevision: st.Revision, PolicyRevision: st.PolicyRevision,
		Incarnation: st.Incarnation, Nodes: nodes, Workloads: len(st.Policy.Workloads), Instances: len(st.Instances), Rules: len(st.Policy.Rules),
		Overlay4: st.Overlay4.String(), Overlay6: st.Overlay6.String(), Lease: st.Lease.String(),
	}}, nil
}
