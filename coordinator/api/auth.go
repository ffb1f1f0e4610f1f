package api

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/registry"
)

// permission is what a route asks of a role.
type permission string

// The permissions. permPublic asks nothing; every other one asks for a token.
const (
	permPublic  permission = "public"
	permRead    permission = "read"    // see everything but secrets; check documents; explain
	permOperate permission = "operate" // join tokens, approve and revoke
	permPolicy  permission = "policy"  // change the policy
	permOwn     permission = "own"     // API tokens and authorities
)

// granted lists what each role may do. operator and policy-admin do not hold each other's rights on purpose: who lets
// hosts in need not be able to open paths between them. No right lets a role give itself another.
func granted(role string) []permission {
	switch role {
	case "viewer":
		return []permission{permRead}
	case "operator":
		return []permission{permRead, permOperate}
	case "policy-admin":
		return []permission{permRead, permPolicy}
	case "owner":
		return []permission{permRead, permOperate, permPolicy, permOwn}
	}
	return nil
}

// metaPermission is the key under which an operation carries its permission.
const metaPermission = "signet-permission"

// maxToken bounds the token's text; longer ones are not even hashed.
const maxToken = 256

type actorKey struct{}

// actor is who sent the request.
type actor struct {
	id     string // of the API token
	remote string // the socket's peer: no header can change it
	path   string
}

func actorOf(ctx context.Context) actor {
	a, _ := ctx.Value(actorKey{}).(actor)
	return a
}

// authorize runs after the route is known and before its body is read. A route that declares no permission is refused:
// forgetting must not open a door.
func (s *server) authorize(ctx huma.Context, next func(huma.Context)) {
	r, w := humago.Unwrap(ctx)
	perm, _ := ctx.Operation().Metadata[metaPermission].(permission)
	if perm == permPublic {
		next(ctx)
		return
	}
	who := actor{remote: peer(r), path: r.URL.Path}
	token, err := s.authenticate(r)
	if errors.Is(err, errUnauthorized) {
		s.auditRefusal(r, who, "unauthorized")
		w.Header().Set("WWW-Authenticate", `Bearer realm="signet"`)
		s.refuse(w, problem(http.StatusUnauthorized, apitypes.CodeUnauthorized, "a valid API token is needed", "send it as: Authorization: Bearer TOKEN"))
		return
	}
	if err != nil {
		s.deps.Log.Error("look up API token", "error", err)
		s.refuse(w, problem(http.StatusServiceUnavailable, apitypes.CodeUnavailable, "API tokens cannot be checked now", "try again"))
		return
	}
	who.id = token.ID
	if !slices.Contains(granted(token.Role), perm) {
		s.auditRefusal(r, who, "forbidden")
		s.refuse(w, problem(http.StatusForbidden, apitypes.CodeForbidden, fmt.Sprintf("role %s lacks the permission %q", token.Role, perm),
			"ask an owner for a token of another role"))
		return
	}
	next(huma.WithContext(ctx, registry.WithActor(context.WithValue(ctx.Context(), actorKey{}, who), who.name())))
}

var errUnauthorized = errors.New("unauthorized")

// authenticate finds the token. Whatever is wrong with it, the work and the answer are the same.
func (s *server) authenticate(r *http.Request) (APIToken, error) {
	text, wellFormed := bearer(r.Header.Values("Authorization"))
	token, err := s.deps.Tokens.TokenByHash(r.Context(), sha256.Sum256([]byte(text)))
	switch {
	case errors.Is(err, ErrNoToken), err == nil && !wellFormed:
		return APIToken{}, errUnauthorized
	case err != nil:
		return APIToken{}, fmt.Errorf("look up token: %w", err)
	case token.Revoked, !token.Expires.IsZero() && !s.deps.Now().Before(token.Expires), granted(token.Role) == nil:
		return APIToken{}, errUnauthorized
	}
	return token, nil
}

// bearer reads the one Authorization header. Two of them, or one with two meanings, are none.
func bearer(headers []string) (token string, ok bool) {
	if len(headers) != 1 {
		return "", false
	}
	scheme, text, found := strings.Cut(headers[0], " ")
	if !found || !strings.EqualFold(scheme, "Bearer") || text == "" || len(text) > maxToken {
		return "", false
	}
	for i := range len(text) {
		if text[i] <= ' ' || text[i] > '~' {
			return "", false
		}
	}
	return text, true
}

func peer(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}

// Bounds of what refusals write into the audit log: whoever can reach the port must not be able to fill the disk.
const (
	refusalBurst  = 60
	refusalRefill = time.Second
)

// refusals is a bucket of places for refusals in the audit log.
type refusals struct {
	mu      sync.Mutex
	used    int
	since   time.Time
	skipped uint64
}

// take reports whether there is a place, and how many refusals found none since the last one that did.
func (b *refusals) take(now time.Time) (skipped uint64, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := int(now.Sub(b.since) / refusalRefill); n > 0 {
		b.used, b.since = max(0, b.used-n), now
	}
	if b.used >= refusalBurst {
		b.skipped++
		return 0, false
	}
	b.used++
	skipped, b.skipped = b.skipped, 0
	return skipped, true
}

func (s *server) auditRefusal(r *http.Request, who actor, outcome string) {
	skipped, ok := s.refused.take(s.deps.Now())
	if !ok {
		return
	}
	detail := "from " + who.remote
	if skipped > 0 {
		detail += fmt.Sprintf("; %d refusals before it were not recorded", skipped)
	}
	s.audit(r.Context(), AuditEntry{Who: who.name(), What: r.Pattern, Object: who.path, Outcome: outcome, Detail: detail})
}

// name is how the audit log calls the actor.
func (a actor) name() string {
	if a.id == "" {
		return "anonymous"
	}
	return "token:" + a.id
}

// audit records an event that is not part of a transaction. A log that cannot be written is the operator's to know, and
// no reason to answer differently: nothing was changed.
func (s *server) audit(ctx context.Context, e AuditEntry) {
	// The client's going away must not lose the record.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), bodyTimeout)
	defer cancel()
	e.Time = s.deps.Now().UTC()
	if err := s.deps.Audit.Record(ctx, e); err != nil {
		s.deps.Log.Error("write audit record", "what", e.What, "who", e.Who, "error", err)
	}
}
