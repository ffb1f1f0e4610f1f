package authority

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
)

// What callers must tell apart.
var (
	ErrExists  = errors.New("the authority exists already and is not overwritten")
	ErrMissing = errors.New("the store has no authority: run signet-coordinator init first")
	ErrRequest = errors.New("invalid certificate request")
	ErrDamaged = errors.New("the stored authority does not hold together")
)

// Lives of certificates.
const (
	RootLife         = 10 * 365 * 24 * time.Hour
	IssuingLife      = 365 * 24 * time.Hour
	DistributionLife = 365 * 24 * time.Hour
	NodeLife         = time.Hour
	ServingLife      = time.Hour
	// Backdate lets a peer whose clock is a little late accept a certificate at once.
	Backdate = 10 * time.Second
)

// Store is what the authority needs of coordinator/store.
type Store interface {
	Update(ctx context.Context, fn func(store.Tx) error) (uint64, error)
	View(ctx context.Context, fn func(store.Tx) error) error
}

// Options are fixed for the life of an Authority.
type Options struct {
	TrustDomain identity.TrustDomain // may be zero in Open: taken from the root
	Key         key.StateKey         // seals private keys at rest
	Now         func() time.Time
	NodeLife    time.Duration // 0: the constant NodeLife
}

func (o Options) withDefaults() Options {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.NodeLife == 0 {
		o.NodeLife = NodeLife
	}
	return o
}

// Kind says what a signing key is for.
type Kind string

// The kinds.
const (
	Root         Kind = "root"
	Issuing      Kind = "issuing"
	Distribution Kind = "distribution"
)

// Slot says where a signing key is in its life.
type Slot string

// The slots. There is at most one of each kind in next and in current.
const (
	SlotNext    Slot = "next"
	SlotCurrent Slot = "current"
	SlotRetired Slot = "retired"
)

// Authority is safe for concurrent use.
type Authority struct {
	store Store
	opts  Options

	keys struct {
		sync.RWMutex
		bundle                      identity.Bundle
		root, issuing, distribution signer
	}
	serving struct {
		sync.Mutex
		cert    *tls.Certificate
		nextTry time.Time // after a renewal that failed
	}
	// maintaining is held while keys are renewed. It is not keys' lock: a transaction that issues waits for that one,
	// and renewal waits for transactions.
	maintaining sync.Mutex
}

// signer is a private key with its certificate.
type signer struct {
	key  crypto.Signer
	cert *x509.Certificate
}

// Init makes the root, the issuing key and the distribution key, in one transaction. It refuses a store that has any.
func Init(ctx context.Context, s Store, opts Options) error {
	opts = opts.withDefaults()
	if opts.TrustDomain.IsZero() {
		return fmt.Errorf("make authority: no trust domain")
	}
	root, err := newRoot(opts.TrustDomain, opts.Now())
	if err != nil {
		return fmt.Errorf("make authority: %w", err)
	}
	issuing, err := newIssuing(opts.TrustDomain, root, opts.Now())
	if err != nil {
		return fmt.Errorf("make authority: %w", err)
	}
	distribution, err := newDistribution(opts.TrustDomain, root, opts.Now())
	if err != nil {
		return fmt.Errorf("make authority: %w", err)
	}
	_, err = s.Update(ctx, func(tx store.Tx) error {
		rows, err := tx.Authorities()
		if err != nil {
			return err
		}
		if len(rows) > 0 {
			return ErrExists
		}
		for kind, sg := range map[Kind]signer{Root: root, Issuing: issuing, Distribution: distribution} {
			if err := put(tx, opts, kind, sg); err != nil {
				return err
			}
		}
		_, err = tx.AppendAudit(store.Audit{Time: opts.Now(), Who: "coordinator", What: "authority.init", Object: opts.TrustDomain.String(), Outcome: "ok"})
		return err
	})
	if err != nil {
		return fmt.Errorf("make authority: %w", err)
	}
	return nil
}

// Open unseals the keys, checks that they fit their certificates and each other, renews what is past two thirds of its
// life, and makes the serving certificate.
func Open(ctx context.Context, s Store, opts Options) (*Authority, error) {
	a := &Authority{store: s, opts: opts.withDefaults()}
	var rows []store.Authority
	err := s.View(ctx, func(tx store.Tx) (err error) {
		rows, err = tx.Authorities()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open authority: %w", err)
	}
	if len(rows) == 0 {
		return nil, ErrMissing
	}
	if err := a.unseal(rows); err != nil {
		return nil, fmt.Errorf("open authority: %w", err)
	}
	if err := a.Maintain(ctx); err != nil {
		return nil, fmt.Errorf("open authority: %w", err)
	}
	if a.serving.cert, err = a.newServing(ctx); err != nil {
		return nil, fmt.Errorf("open authority: %w", err)
	}
	return a, nil
}

func (a *Authority) unseal(rows []store.Authority) error {
	into := map[Kind]*signer{Root: &a.keys.root, Issuing: &a.keys.issuing, Distribution: &a.keys.distribution}
	var sequence uint64
	for _, row := range rows {
		if Kind(row.Kind) == Root {
			sequence++ // each root that ever was is a change of the bundle
		}
		dst := into[Kind(row.Kind)]
		if dst == nil || Slot(row.Slot) != SlotCurrent {
			continue
		}
		sg, err := a.unsealOne(row)
		if err != nil {
			return err
		}
		*dst = sg
	}
	for kind, sg := range into {
		if sg.cert == nil {
			return fmt.Errorf("%w: no current %s key", ErrDamaged, kind)
		}
	}
	return a.checkTogether(sequence)
}

func (a *Authority) unsealOne(row store.Authority) (signer, error) {
	cert, err := x509.ParseCertificate(row.Cert)
	if err != nil {
		return signer{}, fmt.Errorf("%w: certificate of the %s key: %w", ErrDamaged, row.Kind, err)
	}
	der, err := a.opts.Key.Open(sealName(Kind(row.Kind), row.Serial), row.Sealed)
	if err != nil {
		return signer{}, fmt.Errorf("%s key: is this the key file that it was made with? %w", row.Kind, err)
	}
	defer clear(der)
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return signer{}, fmt.Errorf("%w: %s key does not parse", ErrDamaged, row.Kind)
	}
	var same bool
	priv, ok := parsed.(crypto.Signer)
	if ok {
		switch pub := priv.Public().(type) {
		case *ecdsa.PublicKey:
			same = pub.Equal(cert.PublicKey)
		case ed25519.PublicKey:
			same = pub.Equal(cert.PublicKey)
		}
	}
	if !same {
		return signer{}, fmt.Errorf("%w: the %s key is not that of its certificate", ErrDamaged, row.Kind)
	}
	return signer{priv, cert}, nil
}

// checkTogether verifies the stored certificates as any agent will.
func (a *Authority) checkTogether(sequence uint64) (err error) {
	root := a.keys.root.cert
	td, err := rootTrustDomain(root)
	if err != nil {
		return err
	}
	if a.opts.TrustDomain.IsZero() {
		a.opts.TrustDomain = td
	}
	if td != a.opts.TrustDomain {
		return fmt.Errorf("%w: the root belongs to trust domain %s, the settings say %s", ErrDamaged, td, a.opts.TrustDomain)
	}
	if a.keys.bundle, err = identity.NewBundle(td, []*x509.Certificate{root}, sequence); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	for _, c := range []*x509.Certificate{a.keys.issuing.cert, a.keys.distribution.cert} {
		if err := c.CheckSignatureFrom(root); err != nil {
			return fmt.Errorf("%w: %s is not signed by the root", ErrDamaged, c.Subject)
		}
	}
	return nil
}

func rootTrustDomain(root *x509.Certificate) (identity.TrustDomain, error) {
	if len(root.URIs) != 1 || root.URIs[0].Scheme != "spiffe" {
		return identity.TrustDomain{}, fmt.Errorf("%w: the root names no trust domain", ErrDamaged)
	}
	return identity.ParseTrustDomain(root.URIs[0].Host)
}

// Maintain renews the issuing and distribution keys past two thirds of their life. The root stays, so that agents need
// not learn anything first. Call it now and then; once a day is plenty.
func (a *Authority) Maintain(ctx context.Context) error {
	a.maintaining.Lock()
	defer a.maintaining.Unlock()
	renewable := []struct {
		kind Kind
		have *signer
		make func(identity.TrustDomain, signer, time.Time) (signer, error)
	}{
		{Issuing, &a.keys.issuing, newIssuing},
		{Distribution, &a.keys.distribution, newDistribution},
	}
	for _, m := range renewable {
		now := a.opts.Now()
		if life := m.have.cert.NotAfter.Sub(m.have.cert.NotBefore); now.Before(m.have.cert.NotBefore.Add(life * 2 / 3)) {
			continue
		}
		fresh, err := m.make(a.opts.TrustDomain, a.keys.root, now) // only Maintain changes keys, so reading needs no lock
		if err != nil {
			return fmt.Errorf("renew %s key: %w", m.kind, err)
		}
		if err := a.replace(ctx, m.kind, *m.have, fresh); err != nil {
			return fmt.Errorf("renew %s key: %w", m.kind, err)
		}
		a.keys.Lock()
		*m.have = fresh
		a.keys.Unlock()
	}
	return nil
}

func (a *Authority) replace(ctx context.Context, kind Kind, old, fresh signer) error {
	_, err := a.store.Update(ctx, func(tx store.Tx) error {
		retired := store.Authority{Kind: string(kind), Serial: serialText(old.cert), Slot: string(SlotRetired), Cert: old.cert.Raw, Sealed: []byte{},
			Created: old.cert.NotBefore, NotAfter: old.cert.NotAfter}
		if err := tx.PutAuthority(retired); err != nil {
			return err
		}
		if err := put(tx, a.opts, kind, fresh); err != nil {
			return err
		}
		_, err := tx.AppendAudit(store.Audit{Time: a.opts.Now(), Who: "coordinator", What: "authority.renew", Object: string(kind), Outcome: "ok", Detail: serialText(fresh.cert)})
		return err
	})
	return err
}

// put seals a key into the current slot and logs its certificate.
func put(tx store.Tx, opts Options, kind Kind, sg signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(sg.key)
	if err != nil {
		return fmt.Errorf("encode %s key: %w", kind, err)
	}
	defer clear(der)
	sealed, err := opts.Key.Seal(sealName(kind, serialText(sg.cert)), der)
	if err != nil {
		return err
	}
	row := store.Authority{Kind: string(kind), Slot: string(SlotCurrent), Serial: serialText(sg.cert), Cert: sg.cert.Raw, Sealed: sealed,
		Created: opts.Now(), NotAfter: sg.cert.NotAfter}
	if err := tx.PutAuthority(row); err != nil {
		return err
	}
	return record(tx, sg.cert, opts.Now())
}

// sealName binds sealed bytes to their place: a key cannot be put in another's row.
func sealName(kind Kind, serial string) string { return "authority/" + string(kind) + "/" + serial }

// Info describes one signing key for operators.
type Info struct {
	Kind     Kind
	Slot     Slot
	Serial   string
	Created  time.Time
	NotAfter time.Time
}

// List describes all signing keys, retired ones included, oldest first.
func (a *Authority) List(ctx context.Context) (out []Info, err error) {
	err = a.store.View(ctx, func(tx store.Tx) error {
		rows, err := tx.Authorities()
		for _, row := range rows {
			out = append(out, Info{Kind(row.Kind), Slot(row.Slot), row.Serial, row.Created, row.NotAfter})
		}
		return err
	})
	return out, err
}

// Bundle is what others verify against.
func (a *Authority) Bundle() identity.Bundle {
	a.keys.RLock()
	defer a.keys.RUnlock()
	return a.keys.bundle
}

// DistributionChain is the DER certificate of the key that Sign uses; identity.VerifyDistribution takes it.
func (a *Authority) DistributionChain() []byte {
	a.keys.RLock()
	defer a.keys.RUnlock()
	return append([]byte(nil), a.keys.distribution.cert.Raw...)
}

// Sign signs with the distribution key (Ed25519, RFC 8032). The caller puts a word for the purpose into payload, so
// that a signature over one kind of thing never counts for another.
func (a *Authority) Sign(payload []byte) []byte {
	sig, _ := a.SignWithChain(payload)
	return sig
}

// SignWithChain is Sign together with the certificate of the very key that signed, whatever renews meanwhile.
func (a *Authority) SignWithChain(payload []byte) (signature, certDER []byte) {
	a.keys.RLock()
	defer a.keys.RUnlock()
	priv, ok := a.keys.distribution.key.(ed25519.PrivateKey)
	if !ok {
		panic("internal error: the distribution key is not Ed25519")
	}
	return ed25519.Sign(priv, payload), append([]byte(nil), a.keys.distribution.cert.Raw...)
}
