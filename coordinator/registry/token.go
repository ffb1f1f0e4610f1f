package registry

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
)

// Bounds of what a join token may be.
const (
	DefaultTokenTTL = time.Hour
	MaxTokenTTL     = 30 * 24 * time.Hour
	MaxTokenUses    = 100_000
)

// TokenRequest asks for a join token.
type TokenRequest struct {
	Node      string        // name or glob that the token binds; empty: any name, which waits for approval
	TTL       time.Duration // 0: DefaultTokenTTL
	Uses      uint32        // 0: 1
	Ephemeral bool
	Replace   bool // may take over an existing name
}

// JoinToken describes a token without its secret.
type JoinToken struct {
	ID        string // hex
	Node      string
	Uses, Max uint32
	Ephemeral bool
	Replace   bool
	Revoked   bool
	Created   time.Time
	Expires   time.Time
	By        string
}

// CreateJoinToken makes a token. The text is returned this once; only the hash of its secret is kept.
func (r *Registry) CreateJoinToken(ctx context.Context, req TokenRequest) (text string, _ JoinToken, err error) {
	if req, err = checkTokenRequest(req); err != nil {
		return "", JoinToken{}, err
	}
	if r.opts.Pin == nil {
		return "", JoinToken{}, fmt.Errorf("%w: no trust root to pin was given", ErrSettings)
	}
	var secret [32]byte
	// crypto/rand.Read never fails: it ends the process instead.
	_, _ = rand.Read(secret[:])
	id := identity.JoinTokenID(secret)
	token, err := identity.NewJoinToken(id, secret, r.opts.Pin(), r.State().TrustDomain)
	if err != nil {
		return "", JoinToken{}, err
	}
	now := r.opts.Now().UTC()
	row := store.JoinToken{ID: id, SecretHash: token.SecretHash(), Node: req.Node, MaxUses: req.Uses, Ephemeral: req.Ephemeral,
		Replace: req.Replace, Created: now, Expires: now.Add(req.TTL), By: actor(ctx)}
	_, err = r.store.Update(ctx, func(tx store.Tx) error {
		if err := tx.PutJoinToken(row); err != nil {
			return err
		}
		return r.audit(ctx, tx, "join-token.create", hex.EncodeToString(id[:]), fmt.Sprintf("node %q, uses %d, expires %s", req.Node, req.Uses, row.Expires.Format(time.RFC3339)))
	})
	if err != nil {
		return "", JoinToken{}, fmt.Errorf("create join token: %w", err)
	}
	return token.Reveal(), tokenFromRow(row), nil
}

func checkTokenRequest(req TokenRequest) (TokenRequest, error) {
	if req.TTL == 0 {
		req.TTL = DefaultTokenTTL
	}
	if req.Uses == 0 {
		req.Uses = 1
	}
	if req.TTL < 0 || req.TTL > MaxTokenTTL {
		return req, fmt.Errorf("%w: ttl %v, expected at most %v", ErrTokenRequest, req.TTL, MaxTokenTTL)
	}
	if req.Uses > MaxTokenUses {
		return req, fmt.Errorf("%w: %d uses, expected at most %d", ErrTokenRequest, req.Uses, MaxTokenUses)
	}
	if req.Node == "" && req.Replace {
		// Such a token could push any node out of its name.
		return req, fmt.Errorf("%w: a token that may replace a node must name it", ErrTokenRequest)
	}
	if req.Node == "" {
		return req, nil
	}
	if !isGlob(req.Node) {
		if err := identity.ParseName(req.Node); err != nil {
			return req, fmt.Errorf("%w: %w", ErrTokenRequest, err)
		}
		return req, nil
	}
	if _, err := path.Match(req.Node, ""); err != nil || strings.Contains(req.Node, "/") || len(req.Node) > 4*identity.MaxNameLength {
		return req, fmt.Errorf("%w: %.100q is no pattern of node names, such as api-*", ErrTokenRequest, req.Node)
	}
	return req, nil
}

func isGlob(s string) bool { return strings.ContainsAny(s, `*?[\`) }

// JoinTokens lists the tokens, oldest first.
func (r *Registry) JoinTokens(ctx context.Context) (out []JoinToken, err error) {
	err = r.store.View(ctx, func(tx store.Tx) error {
		rows, err := tx.JoinTokens()
		for _, row := range rows {
			out = append(out, tokenFromRow(row))
		}
		return err
	})
	return out, err
}

// RevokeJoinToken ends a token, named by its ID in hex. Nodes that joined with it stay.
func (r *Registry) RevokeJoinToken(ctx context.Context, id string) error {
	raw, err := hex.DecodeString(id)
	if err != nil || len(raw) != 16 {
		return ErrTokenUnknown
	}
	_, err = r.store.Update(ctx, func(tx store.Tx) error {
		row, err := tx.JoinToken([16]byte(raw))
		if err != nil {
			return orSentinel(err, ErrTokenUnknown)
		}
		row.Revoked = true
		if err := tx.PutJoinToken(row); err != nil {
			return err
		}
		return r.audit(ctx, tx, "join-token.revoke", id, "")
	})
	return err
}

func tokenFromRow(row store.JoinToken) JoinToken {
	return JoinToken{ID: hex.EncodeToString(row.ID[:]), Node: row.Node, Uses: row.Uses, Max: row.MaxUses, Ephemeral: row.Ephemeral,
		Replace: row.Replace, Revoked: row.Revoked, Created: row.Created, Expires: row.Expires, By: row.By}
}
