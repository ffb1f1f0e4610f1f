package api

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/compile"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// WorkloadInput names a workload by its path. It is exported for huma, which reads embedded structs only then.
type WorkloadInput struct {
	Zone string `path:"zone" maxLength:"63"`
	Name string `path:"name" maxLength:"63"`
}

// id reads the two path segments.
func (in WorkloadInput) id(td identity.TrustDomain) (identity.ID, error) {
	id, err := td.ParseShort(in.Zone + "/" + in.Name)
	if err != nil {
		return identity.ID{}, invalid(err.Error(), "")
	}
	return id, nil
}

// readID reads zone/workload or a whole SPIFFE ID of the trust domain.
func readID(td identity.TrustDomain, s string) (identity.ID, error) {
	if !strings.Contains(s, "://") {
		id, err := td.ParseShort(s)
		if err != nil {
			return id, invalid(err.Error(), "")
		}
		return id, nil
	}
	id, err := identity.ParseID(s)
	if err != nil {
		return id, invalid(err.Error(), "")
	}
	if id.TrustDomain() != td {
		return identity.ID{}, invalid(fmt.Sprintf("%.200q is not in the trust domain %v", s, td), "")
	}
	return id, nil
}

func (s *server) listWorkloads(_ context.Context, in *page) (*output[apitypes.WorkloadList], error) {
	st := s.deps.Mesh.State()
	ids := make([]identity.ID, 0, len(st.Policy.Workloads))
	for i := range st.Policy.Workloads {
		ids = append(ids, st.Policy.Workloads[i].ID)
	}
	// Instances of workloads that the document no longer has are in quarantine, and worth seeing.
	for _, i := range st.Instances {
		ids = append(ids, i.Workload)
	}
	slices.SortFunc(ids, func(a, b identity.ID) int { return cmp.Compare(a.String(), b.String()) })
	ids = slices.Compact(ids)
	some, next, err := paged(ids, identity.ID.String, *in)
	if err != nil {
		return nil, err
	}
	out := &output[apitypes.WorkloadList]{apitypes.WorkloadList{Workloads: make([]apitypes.Workload, 0, len(some)), NextCursor: next}}
	placed := placements(st)
	declared := st.Policy.Index()
	for _, id := range some {
		w, _ := declared.Workload(id)
		out.Body.Workloads = append(out.Body.Workloads, workload(st, id, w, placed[id]))
	}
	return out, nil
}

func placements(st *registry.State) map[identity.ID][]registry.Instance {
	out := map[identity.ID][]registry.Instance{}
	for _, i := range st.Instances {
		out[i.Workload] = append(out[i.Workload], i)
	}
	return out
}

func workload(st *registry.State, id identity.ID, w *policydoc.Workload, placed []registry.Instance) apitypes.Workload {
	_, name, _ := strings.Cut(id.Short(), "/")
	out := apitypes.Workload{
		ID: id.String(), Zone: id.Zone().String(), Name: name, Number: uint32(st.Numbers[id]),
		Selectors: []string{}, Nodes: []string{}, Instances: instances(placed),
	}
	if w == nil {
		return out
	}
	out.Declared, out.Labels = true, w.Labels
	out.Nodes = append(out.Nodes, w.Nodes...)
	for _, sel := range w.Selectors {
		out.Selectors = append(out.Selectors, sel.String())
	}
	for _, svc := range w.Serves {
		out.Serves = append(out.Serves, svc.String())
	}
	return out
}

func instances(placed []registry.Instance) []apitypes.Instance {
	out := make([]apitypes.Instance, 0, len(placed))
	for _, i := range placed {
		out = append(out, apitypes.Instance{Node: i.Node, Addresses: addresses(i.IPv4, i.IPv6), Revoked: i.Revoked})
	}
	return out
}

// find is the workload with its placements; ok is false when neither document nor registry know it.
func find(st *registry.State, id identity.ID) (w *policydoc.Workload, placed []registry.Instance, ok bool) {
	w, ok = st.Policy.Index().Workload(id)
	for _, i := range st.Instances {
		if i.Workload == id {
			placed = append(placed, i)
		}
	}
	return w, placed, ok || len(placed) > 0
}

func (s *server) showWorkload(_ context.Context, in *WorkloadInput) (*output[apitypes.Workload], error) {
	st := s.deps.Mesh.State()
	id, err := in.id(st.TrustDomain)
	if err != nil {
		return nil, err
	}
	w, placed, ok := find(st, id)
	if !ok {
		return nil, notFound("workload", id.Short())
	}
	return &output[apitypes.Workload]{workload(st, id, w, placed)}, nil
}

type revokeWorkloadInput struct {
	WorkloadInput
	Body *apitypes.RevokeRequest
}

func (s *server) revokeWorkload(ctx context.Context, in *revokeWorkloadInput) (*nothing, error) {
	st := s.deps.Mesh.State()
	id, err := in.id(st.TrustDomain)
	if err != nil {
		return nil, err
	}
	if _, _, ok := find(st, id); !ok {
		return nil, notFound("workload", id.Short())
	}
	node := ""
	if in.Body != nil {
		node = in.Body.Node
	}
	if node != "" {
		if _, ok := st.Nodes[node]; !ok {
			return nil, notFound("node", node)
		}
	}
	_, err = s.deps.Mesh.RevokeWorkload(ctx, id, node)
	return nil, err
}

type resolveInput struct {
	ID string `query:"id" required:"true" maxLength:"2048" doc:"zone/workload or a whole SPIFFE ID"`
}

func (s *server) resolve(_ context.Context, in *resolveInput) (*output[apitypes.Resolution], error) {
	st := s.deps.Mesh.State()
	id, err := readID(st.TrustDomain, in.ID)
	if err != nil {
		return nil, err
	}
	_, placed, ok := find(st, id)
	if !ok {
		return nil, notFound("workload", id.Short())
	}
	return &output[apitypes.Resolution]{apitypes.Resolution{ID: id.String(), Number: uint32(st.Numbers[id]), Instances: instances(placed)}}, nil
}

type explainInput struct{ Body apitypes.ExplainRequest }

func (s *server) explain(ctx context.Context, in *explainInput) (*output[apitypes.Explanation], error) {
	st := s.deps.Mesh.State()
	from, err := readID(st.TrustDomain, in.Body.From)
	if err != nil {
		return nil, err
	}
	to, err := readID(st.TrustDomain, in.Body.To)
	if err != nil {
		return nil, err
	}
	svc, err := policy.ParseService(in.Body.Port)
	if err != nil {
		return nil, invalid(err.Error(), "")
	}
	compiled, err := s.judged.compile(st)
	if err != nil {
		return nil, fmt.Errorf("compile the policy: %w", err)
	}
	return &output[apitypes.Explanation]{explanation(compile.Explain(st, compiled, from, to, svc, s.deps.Now()))}, nil
}

func explanation(x compile.Explanation) apitypes.Explanation {
	end := func(e compile.End) apitypes.Peer {
		return apitypes.Peer{ID: e.ID.String(), Number: uint32(e.Number), Node: e.Node, Nodes: e.Nodes}
	}
	out := apitypes.Explanation{
		Verdict: x.Verdict.String(), Code: x.Code.String(), Stage: x.Stage, Rule: x.Rule, PolicyRevision: x.PolicyRevision,
		From: end(x.From), To: end(x.To), Service: x.Service.String(), Observed: x.Observed, Expected: x.Expected,
		Nearest: make([]apitypes.Near, 0, len(x.Nearest)), Remedy: x.Remedy, Warnings: x.Warnings,
	}
	for _, n := range x.Nearest {
		out.Nearest = append(out.Nearest, apitypes.Near{Rule: n.Rule, Action: n.Action, At: n.At, Fails: n.Fails})
	}
	return out
}

// judged keeps the compilation of the last State: States are immutable, and compiling a large policy takes long.
type judged struct {
	mu       sync.Mutex
	state    *registry.State
	compiled *compile.Compiled
}

// compile holds the lock while it works, so that a hundred questions after a change cost one compilation.
func (j *judged) compile(st *registry.State) (*compile.Compiled, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.state == st {
		return j.compiled, nil
	}
	c, err := compile.Compile(st)
	if err != nil {
		return nil, err
	}
	j.state, j.compiled = st, c
	return c, nil
}
