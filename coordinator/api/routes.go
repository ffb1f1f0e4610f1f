package api

import (
	"context"
	"net/http"
	"reflect"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
)

// Prefix is where the API's routes are.
const Prefix = "/api/v1"

// server answers requests. It holds no state of the mesh.
type server struct {
	deps    Deps
	api     huma.API
	mux     *http.ServeMux
	refused refusals
	judged  judged
}

// New returns the whole web API. It panics when a required dependency is missing, which is a bug of the caller.
func New(deps Deps) http.Handler {
	s := newServer(deps)
	return s.guard(s.mux)
}

func newServer(deps Deps) *server {
	if deps.Mesh == nil || deps.Policies == nil || deps.Tokens == nil || deps.Audit == nil || deps.Log == nil {
		panic("internal error: api: a dependency is missing")
	}
	if deps.Now == nil {
		deps.Now = time.Now
	}
	s := &server{deps: deps, mux: http.NewServeMux()}
	s.api = humago.NewWithPrefix(s.mux, Prefix, s.config())
	s.api.UseMiddleware(s.authorize)
	s.routes()
	s.plainRoutes()
	return s
}

func (s *server) config() huma.Config {
	format := huma.Format{Marshal: huma.DefaultJSONFormat.Marshal, Unmarshal: huma.DefaultJSONFormat.Unmarshal}
	return huma.Config{
		OpenAPI: &huma.OpenAPI{
			OpenAPI: "3.1.0",
			Info:    &huma.Info{Title: "Signet coordinator", Version: "v1", Description: "Identity overlay network: nodes, workloads, policy, audit."},
			Components: &huma.Components{
				Schemas:         huma.NewMapRegistry("#/components/schemas/", huma.DefaultSchemaNamer),
				SecuritySchemes: map[string]*huma.SecurityScheme{"bearer": {Type: "http", Scheme: "bearer"}},
			},
		},
		// No OpenAPIPath, DocsPath or SchemasPath: those routes would stand outside of authorize, and the docs page loads scripts
		// from elsewhere.
		Formats:                      map[string]huma.Format{typeJSON: format, "json": format},
		DefaultFormat:                typeJSON,
		RejectUnknownQueryParameters: true,
		Transformers:                 []huma.Transformer{translate},
	}
}

// routes is the table of the API: method, path, permission, name, summary.
func (s *server) routes() {
	route(s, "GET", "/nodes", permRead, "list-nodes", "List nodes", s.listNodes)
	route(s, "GET", "/nodes/{name}", permRead, "show-node", "Show a node", s.showNode)
	route(s, "POST", "/nodes/{name}/approve", permOperate, "approve-node", "Let a pending node have its workloads", s.approveNode)
	route(s, "POST", "/nodes/{name}/revoke", permOperate, "revoke-node", "Take a node back, for good", s.revokeNode)
	route(s, "POST", "/join-tokens", permOperate, "create-join-token", "Make a token that hosts may join with", s.createJoinToken, status(http.StatusCreated))

	route(s, "GET", "/workloads", permRead, "list-workloads", "List workloads", s.listWorkloads)
	route(s, "GET", "/workloads/{zone}/{name}", permRead, "show-workload", "Show a workload", s.showWorkload)
	route(s, "POST", "/workloads/{zone}/{name}/revoke", permOperate, "revoke-workload", "Cut a workload off, on one node or on all", s.revokeWorkload, optionalBody)
	route(s, "GET", "/resolve", permRead, "resolve", "Overlay addresses of a workload", s.resolve)

	route(s, "GET", "/policy", permRead, "get-policy", "The document in force; its ETag is the policy revision", s.getPolicy)
	route(s, "PUT", "/policy", permPolicy, "put-policy", "Check, test and commit a document", s.putPolicy, s.documentBody)
	route(s, "POST", "/policy/check", permRead, "check-policy", "Check and test a document, without committing it", s.checkPolicy, s.documentBody)
	route(s, "GET", "/policy/revisions", permRead, "list-revisions", "History of the policy, newest first", s.listRevisions)
	route(s, "GET", "/policy/revisions/{n}", permRead, "show-revision", "The document of a revision", s.showRevision)
	route(s, "GET", "/policy/revisions/{n}/rollout", permRead, "show-rollout", "Which hosts have applied a revision", s.showRollout)
	route(s, "POST", "/policy/rollback", permPolicy, "rollback-policy", "Bring an earlier document into force again", s.rollbackPolicy, optionalBody)
	route(s, "POST", "/explain", permRead, "explain", "Would it work, and why (not)", s.explain)

	route(s, "GET", "/stats", permRead, "stats", "Counts of the whole mesh", s.stats)
	route(s, "GET", "/audit", permRead, "list-audit", "The audit log, oldest first", s.listAudit)
	route(s, "GET", "/audit/verify", permRead, "verify-audit", "Check the audit log's hash chain", s.verifyAudit)

	for _, r := range []struct {
		method, path string
		perm         permission
		name, what   string
	}{
		{"POST", "/policy/plan", permRead, "plan-policy", "planning a policy against recorded flows"},
		{"GET", "/flows", permRead, "list-flows", "the list of flows"},
		{"GET", "/flows/stream", permRead, "stream-flows", "the stream of flows"},
		{"GET", "/authorities", permRead, "list-authorities", "the list of authorities"},
		{"POST", "/authorities/rotate", permOwn, "rotate-authority", "rotating an authority"},
		{"GET", "/tokens", permOwn, "list-tokens", "the list of API tokens"},
		{"POST", "/tokens", permOwn, "create-token", "making an API token"},
		{"DELETE", "/tokens/{id}", permOwn, "revoke-token", "revoking an API token"},
	} {
		refusal := notBuilt(r.what)
		route(s, r.method, r.path, r.perm, r.name, "Not built yet: "+r.what, func(context.Context, *anything) (*struct{}, error) {
			return nil, refusal
		}, anyQuery)
	}
	// The document is complete only now; huma adds its own form of errors, which no route sends.
	for _, unused := range []string{"ErrorModel", "ErrorDetail"} {
		delete(s.api.OpenAPI().Components.Schemas.Map(), unused)
	}
}

// anything is the input of routes that are not built: their parameters are not read.
type anything struct{}

// route registers one line of the table.
func route[I, O any](s *server, method, path string, perm permission, name, summary string, h func(context.Context, *I) (*O, error), options ...func(*huma.Operation)) {
	op := huma.Operation{
		OperationID:     name,
		Method:          method,
		Path:            path,
		Summary:         summary,
		MaxBodyBytes:    apitypes.MaxBody + 1, // huma refuses at the limit, not above it
		BodyReadTimeout: bodyTimeout,
		Metadata:        map[string]any{metaPermission: perm},
		Extensions:      map[string]any{"x-signet-permission": string(perm)},
		Responses:       map[string]*huma.Response{"default": s.problemResponse()},
	}
	if perm != permPublic {
		op.Security = []map[string][]string{{"bearer": {}}}
	}
	for _, option := range options {
		option(&op)
	}
	huma.Register(s.api, op, func(ctx context.Context, in *I) (*O, error) {
		out, err := h(ctx, in)
		return out, s.answer(ctx, name, perm, err)
	})
}

func (s *server) problemResponse() *huma.Response {
	schema := s.api.OpenAPI().Components.Schemas.Schema(reflect.TypeFor[apitypes.Problem](), true, "Problem")
	return &huma.Response{Description: "Refused", Content: map[string]*huma.MediaType{apitypes.ProblemType: {Schema: schema}}}
}

func status(code int) func(*huma.Operation) {
	return func(op *huma.Operation) { op.DefaultStatus = code }
}

func optionalBody(op *huma.Operation) {
	op.RequestBody = &huma.RequestBody{}
}

// anyQuery lets a route that is not built be refused by name whatever was asked.
func anyQuery(op *huma.Operation) { op.SkipValidateParams = true }
