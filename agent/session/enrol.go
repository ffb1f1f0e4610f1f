package session

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/version"
	"github.com/signet-overlay/signet/proto/signetv1"
)

// Application is what a host says of itself when it wants to join. The keys must be on disk before it is sent: the
// same application gives the same answer, so that one that was lost can be asked for again.
type Application struct {
	Coordinators []string // tried in order
	Token        identity.JoinToken
	Node         string
	Key          *ecdsa.PrivateKey
	WireGuard    key.Public
}

// Admission is the coordinator's answer, verified.
type Admission struct {
	Chain   []*x509.Certificate // leaf first, without the root
	Bundle  identity.Bundle
	Pending bool // the name waits for approval
}

// Enrol asks until it is admitted, refused for good (Permanent), or ctx ends. The token leaves the host only over a
// connection whose certificate chain ends in the root that it pins.
func Enrol(ctx context.Context, a Application, log *slog.Logger) (Admission, error) {
	if len(a.Coordinators) == 0 {
		return Admission{}, errors.New("enrol: no coordinator is named: set coordinator in the configuration, or give signet up --coordinator ADDR")
	}
	csr, err := CSR(a.Key)
	if err != nil {
		return Admission{}, err
	}
	for attempt := 0; ; attempt++ {
		var last error
		for _, addr := range a.Coordinators {
			adm, err := a.ask(ctx, addr, csr)
			if err == nil {
				return adm, nil
			}
			// One unreachable coordinator must not hide that another has refused.
			if last == nil || Permanent(err) {
				last = err
			}
			var e *Error
			if errors.As(err, &e) && e.Kind == Refused {
				break
			}
		}
		if Permanent(last) {
			return Admission{}, last
		}
		if ctx.Err() != nil {
			return Admission{}, fmt.Errorf("enrol: %w", errors.Join(ctx.Err(), last))
		}
		wait := backoff(attempt)
		log.Warn("not enrolled yet", "error", last, "again_in", wait)
		if err := pause(ctx, wait, nil); err != nil {
			return Admission{}, fmt.Errorf("enrol: %w", errors.Join(err, last))
		}
	}
}

func (a Application) ask(ctx context.Context, addr string, csr []byte) (Admission, error) {
	w, err := dial(addr, identity.PinnedTLS(a.Token.Pin))
	if err != nil {
		return Admission{}, err
	}
	defer w.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := signetv1.NewEnrolmentClient(w).Enrol(ctx, &signetv1.EnrolRequest{TokenSecret: a.Token.Secret(),
		Node: a.Node, Csr: csr, WireguardKey: a.WireGuard.Bytes(), Version: version.Version})
	if err != nil {
		return Admission{}, w.explain(err)
	}
	adm, err := a.admission(res)
	if err != nil {
		return Admission{}, &Error{Coordinator: addr, Kind: Untrusted, Message: "its answer does not hold: " + err.Error(), cause: err}
	}
	return adm, nil
}

// admission checks that the answer is ours: roots that include the pinned one, and a certificate for our key and name.
func (a Application) admission(res *signetv1.EnrolResponse) (Admission, error) {
	bundle, err := identity.ParseBundleDER(a.Token.TrustDomain, res.GetBundle(), 0)
	if err != nil {
		return Admission{}, fmt.Errorf("read trust bundle: %w", err)
	}
	pinned := func(c *x509.Certificate) bool { return identity.SPKIHash(c) == a.Token.Pin }
	if !slices.ContainsFunc(bundle.Roots(), pinned) {
		return Admission{}, errors.New("the trust bundle lacks the root that the join token pins")
	}
	want, err := a.Token.TrustDomain.Node(a.Node)
	if err != nil {
		return Admission{}, fmt.Errorf("read own name: %w", err)
	}
	chain, err := verifyOwn(bundle, res.GetChain(), want, &a.Key.PublicKey)
	if err != nil {
		return Admission{}, err
	}
	return Admission{Chain: chain, Bundle: bundle, Pending: res.GetPending()}, nil
}

// verifyOwn checks a certificate that was issued to this host.
func verifyOwn(bundle identity.Bundle, ders [][]byte, want identity.ID, pub *ecdsa.PublicKey) ([]*x509.Certificate, error) {
	chain, err := identity.ParseChain(ders)
	if err != nil {
		return nil, fmt.Errorf("read own certificate: %w", err)
	}
	// A host whose clock is a little behind must be able to join.
	v, err := identity.VerifyX509(bundle, chain, identity.Options{Now: time.Now(), Skew: time.Hour})
	if err != nil {
		return nil, fmt.Errorf("verify own certificate: %w", err)
	}
	if v.ID != want {
		return nil, fmt.Errorf("the certificate is for %v, expected %v", v.ID, want)
	}
	if got, ok := chain[0].PublicKey.(*ecdsa.PublicKey); !ok || !got.Equal(pub) {
		return nil, errors.New("the certificate is for another key")
	}
	return chain, nil
}

// CSR makes a certificate request: it proves possession of the key and asks for nothing, because the coordinator
// issues from its own template.
func CSR(k *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	return der, nil
}
