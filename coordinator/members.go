package coordinator

import (
	"context"
	"fmt"

	"github.com/signet-overlay/signet/coordinator/authority"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/coordinator/session"
	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// members joins registry and authority: a host is let in and gets its certificate in one transaction, or neither.
type members struct {
	*registry.Registry
	authority *authority.Authority
}

var _ session.Members = members{}

// Enrol implements session.Members.
func (m members) Enrol(ctx context.Context, j session.Join) (out session.Issued, err error) {
	req, err := authority.ParseRequest(j.CSR)
	if err != nil {
		return out, err
	}
	token, err := m.token(j.Secret)
	if err != nil {
		return out, err
	}
	out.Node, _, err = m.Registry.Enrol(ctx, registry.EnrolRequest{Token: token, Node: j.Node, SPKI: req.SPKI, WireGuardKey: j.WireGuardKey,
		Issue: m.issue(req, &out)})
	return out, err
}

// Renew implements session.Members.
func (m members) Renew(ctx context.Context, r session.Renewal) (out session.Issued, err error) {
	req, err := authority.ParseRequest(r.CSR)
	if err != nil {
		return out, err
	}
	out.Node, err = m.Registry.Renew(ctx, registry.RenewRequest{ID: r.ID, SPKI: r.SPKI, NewSPKI: req.SPKI, Issue: m.issue(req, &out)})
	return out, err
}

// issue may run more than once, when the store tries a transaction again; the last certificate is the one that counts.
func (m members) issue(req authority.Request, out *session.Issued) func(store.Tx, registry.Node) error {
	return func(tx store.Tx, n registry.Node) error {
		issued, err := m.authority.IssueNodeIn(tx, req, n.ID)
		out.Chain = issued.Chain
		return err
	}
}

// token rebuilds a join token from the secret, which is all that travels. Its ID follows from the secret.
func (m members) token(secret [32]byte) (identity.JoinToken, error) {
	return identity.NewJoinToken(identity.JoinTokenID(secret), secret, m.authority.Bundle().Pin(), m.State().TrustDomain)
}

// parser reads stored policies.
func parser(td identity.TrustDomain) func([]store.SourceFile) (*policydoc.Document, error) {
	return func(files []store.SourceFile) (*policydoc.Document, error) {
		in := make([]policydoc.File, len(files))
		for i, f := range files {
			in[i] = policydoc.File{Name: f.Name, Data: f.Data}
		}
		doc, _, err := policydoc.Parse(td, in)
		if err != nil {
			return nil, fmt.Errorf("stored policy: %w", err)
		}
		return doc, nil
	}
}

func pinOf(a *authority.Authority) func() [32]byte {
	return func() [32]byte { return a.Bundle().Pin() }
}
