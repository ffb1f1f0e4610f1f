package api

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/identity"
)

// Pages of lists.
const (
	defaultLimit = 100
	maxLimit     = 1000
)

// page is the input of lists. Its zero limit is the default one.
type page struct {
	Limit  int    `query:"limit" minimum:"1" maximum:"1000" doc:"At most so many; 100 when absent"`
	Cursor string `query:"cursor" maxLength:"1024" doc:"next_cursor of the page before"`
}

func (p page) limit() int {
	if p.Limit == 0 {
		return defaultLimit
	}
	return min(p.Limit, maxLimit)
}

// after is the key of the last item of the page before, "" for the first page.
func (p page) after() (string, error) {
	b, err := base64.RawURLEncoding.DecodeString(p.Cursor)
	// The decoder skips line ends; a cursor has one spelling.
	if err != nil || base64.RawURLEncoding.EncodeToString(b) != p.Cursor {
		return "", invalid("cursor is not one that this API gave", "leave it out to begin at the start")
	}
	return string(b), nil
}

// paged cuts one page out of items, which are sorted by key.
func paged[T any](items []T, key func(T) string, p page) (out []T, next string, err error) {
	after, err := p.after()
	if err != nil {
		return nil, "", err
	}
	if after != "" {
		at, found := slices.BinarySearchFunc(items, after, func(item T, k string) int { return cmp.Compare(key(item), k) })
		if found {
			at++
		}
		items = items[at:]
	}
	if n := p.limit(); len(items) > n {
		items = items[:n]
		next = base64.RawURLEncoding.EncodeToString([]byte(key(items[n-1])))
	}
	return items, next, nil
}

// output is an answer with a body and nothing else.
type output[T any] struct{ Body T }

type nothing struct{}

type nodeInput struct {
	Name string `path:"name" maxLength:"63"`
}

func (s *server) listNodes(ctx context.Context, in *page) (*output[apitypes.NodeList], error) {
	st := s.deps.Mesh.State()
	all := make([]registry.Node, 0, len(st.Nodes))
	for _, n := range st.Nodes {
		all = append(all, n)
	}
	slices.SortFunc(all, func(a, b registry.Node) int { return cmp.Compare(a.Name, b.Name) })
	some, next, err := paged(all, func(n registry.Node) string { return n.Name }, *in)
	if err != nil {
		return nil, err
	}
	view, err := s.nodeViewer(ctx, st)
	if err != nil {
		return nil, err
	}
	out := &output[apitypes.NodeList]{apitypes.NodeList{Nodes: make([]apitypes.Node, 0, len(some)), NextCursor: next}}
	for _, n := range some {
		out.Body.Nodes = append(out.Body.Nodes, view.node(n))
	}
	return out, nil
}

func (s *server) showNode(ctx context.Context, in *nodeInput) (*output[apitypes.Node], error) {
	st := s.deps.Mesh.State()
	n, ok := st.Nodes[in.Name]
	if !ok {
		return nil, notFound("node", in.Name)
	}
	view, err := s.nodeViewer(ctx, st)
	if err != nil {
		return nil, err
	}
	return &output[apitypes.Node]{view.node(n)}, nil
}

// nodeViewer joins what the registry, the rollout and the sessions know of nodes.
type nodeViewer struct {
	applied   map[string]registry.NodeRollout
	connected map[string]time.Time
	workloads map[string][]string
}

func (s *server) nodeViewer(ctx context.Context, st *registry.State) (nodeViewer, error) {
	v := nodeViewer{applied: map[string]registry.NodeRollout{}, connected: s.connected(), workloads: map[string][]string{}}
	applied, err := s.deps.Policies.Rollout(ctx, st.PolicyRevision)
	if err != nil {
		return v, fmt.Errorf("read the rollout: %w", err)
	}
	for _, a := range applied {
		v.applied[a.Node] = a
	}
	for _, i := range st.Instances {
		v.workloads[i.Node] = append(v.workloads[i.Node], i.Workload.String())
	}
	return v, nil
}

func (s *server) connected() map[string]time.Time {
	if s.deps.Sessions == nil {
		return nil
	}
	return s.deps.Sessions.Connected()
}

func (v nodeViewer) node(n registry.Node) apitypes.Node {
	seen, connected := v.connected[n.Name]
	out := apitypes.Node{
		Name: n.Name, ID: n.ID.String(), Number: uint32(n.Number), Status: string(n.Status), Connected: connected,
		Key: n.Key.String(), IPv4: n.IPv4, IPv6: n.IPv6, Created: n.Created, LastSeen: v.applied[n.Name].Time,
		PolicyRevision: v.applied[n.Name].PolicyRevision, Workloads: []string{},
	}
	if connected && seen.After(out.LastSeen) {
		out.LastSeen = seen
	}
	if ids := v.workloads[n.Name]; ids != nil {
		out.Workloads = ids
	}
	return out
}

func (s *server) approveNode(ctx context.Context, in *nodeInput) (*nothing, error) {
	_, err := s.deps.Mesh.Approve(ctx, in.Name)
	return nil, err
}

func (s *server) revokeNode(ctx context.Context, in *nodeInput) (*nothing, error) {
	_, err := s.deps.Mesh.Revoke(ctx, in.Name)
	return nil, err
}

type joinTokenInput struct{ Body apitypes.JoinTokenRequest }

func (s *server) createJoinToken(ctx context.Context, in *joinTokenInput) (*output[apitypes.JoinToken], error) {
	spec, err := tokenRequest(in.Body)
	if err != nil {
		return nil, err
	}
	text, token, err := s.deps.Mesh.CreateJoinToken(ctx, spec)
	if err != nil {
		return nil, err
	}
	return &output[apitypes.JoinToken]{apitypes.JoinToken{Token: text, Node: token.Node, Expires: token.Expires}}, nil
}

// globSigns have a meaning in path.Match.
const globSigns = `*?[]^\`

func tokenRequest(r apitypes.JoinTokenRequest) (registry.TokenRequest, error) {
	spec := registry.TokenRequest{Node: r.Node, Uses: uint32(r.Uses), Replace: r.Replace}
	if r.Ephemeral {
		// Nothing removes such nodes yet, and whoever asks for it relies on that.
		return spec, notBuilt("ephemeral")
	}
	if r.Replace && r.Node == "" {
		// Whoever held it could put any node of the mesh out of action by claiming its name.
		return spec, invalid("a token that may replace a node must name it", "give node as well")
	}
	if strings.ContainsFunc(r.Node, func(c rune) bool {
		return !strings.ContainsRune(globSigns, c) && identity.ParseName(string(c)) != nil && !strings.ContainsRune("._-", c)
	}) {
		return spec, invalid(fmt.Sprintf("%.70q is neither a node's name nor a glob over names: expected such as api-1 or api-*", r.Node), "")
	}
	if r.TTL == "" {
		return spec, nil
	}
	ttl, err := time.ParseDuration(r.TTL)
	if err != nil || ttl <= 0 {
		return spec, invalid(fmt.Sprintf("%.32q is not a life for a join token: expected such as 1h or 30m", r.TTL), "")
	}
	spec.TTL = ttl
	return spec, nil
}

// addresses lists those of an instance that has them.
func addresses(list ...netip.Addr) []netip.Addr {
	return slices.DeleteFunc(list, func(a netip.Addr) bool { return !a.IsValid() })
}
