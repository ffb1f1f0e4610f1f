package authority_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/coordinator/authority"
	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var epoch = time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)

type bench struct {
	*authority.Authority
	t     *testing.T
	store *store.SQLite
	opts  authority.Options
	now   atomic.Int64
}

func (b *bench) time() time.Time         { return epoch.Add(time.Duration(b.now.Load())) }
func (b *bench) advance(d time.Duration) { b.now.Add(int64(d)) }

func newBench(t *testing.T) *bench {
	t.Helper()
	td, err := identity.ParseTrustDomain("settler.example")
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t}
	if b.store, err = store.OpenSQLite(context.Background(), t.TempDir()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.store.Close() })
	k, err := key.NewStateKey()
	if err != nil {
		t.Fatal(err)
	}
	b.opts = authority.Options{TrustDomain: td, Key: k, Now: b.time}
	if err := authority.Init(context.Background(), b.store, b.opts); err != nil {
		t.Fatal(err)
	}
	b.open()
	return b
}

func (b *bench) open() {
	b.t.Helper()
	a, err := authority.Open(context.Background(), b.store, b.opts)
	if err != nil {
		b.t.Fatal(err)
	}
	b.Authority = a
}

func (b *bench) id(name string) identity.ID {
	b.t.Helper()
	id, err := b.opts.TrustDomain.Node(name)
	if err != nil {
		b.t.Fatal(err)
	}
	return id
}

func p256(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func request(t *testing.T, tmpl *x509.CertificateRequest, k crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (b *bench) issue(name string, k *ecdsa.PrivateKey) []*x509.Certificate {
	b.t.Helper()
	chain, notAfter, err := b.IssueNode(context.Background(), request(b.t, &x509.CertificateRequest{}, k), b.id(name))
	if err != nil {
		b.t.Fatal(err)
	}
	certs, err := identity.ParseChain(chain)
	if err != nil || !certs[0].NotAfter.Equal(notAfter) {
		b.t.Fatalf("%v; ends %v, said %v", err, certs[0].NotAfter, notAfter)
	}
	return certs
}

func TestInitRefusesToOverwrite(t *testing.T) {
	b := newBench(t)
	pin := b.Bundle().Pin()
	if err := authority.Init(context.Background(), b.store, b.opts); !errors.Is(err, authority.ErrExists) {
		t.Errorf("got %v", err)
	}
	b.open()
	if b.Bundle().Pin() != pin {
		t.Error("the root changed")
	}
}

func TestOpenRefusals(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	wrong := b.opts
	var err error
	if wrong.Key, err = key.NewStateKey(); err != nil {
		t.Fatal(err)
	}
	if _, err := authority.Open(ctx, b.store, wrong); !errors.Is(err, key.ErrSealed) {
		t.Errorf("another key file: %v", err)
	}
	other := b.opts
	if other.TrustDomain, err = identity.ParseTrustDomain("other.example"); err != nil {
		t.Fatal(err)
	}
	if _, err := authority.Open(ctx, b.store, other); !errors.Is(err, authority.ErrDamaged) {
		t.Errorf("another trust domain: %v", err)
	}
	none := b.opts
	none.TrustDomain = identity.TrustDomain{}
	if a, err := authority.Open(ctx, b.store, none); err != nil || a.Bundle().TrustDomain() != b.opts.TrustDomain {
		t.Errorf("trust domain from the root: %v", err)
	}
	empty, err := store.OpenSQLite(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	if _, err := authority.Open(ctx, empty, b.opts); !errors.Is(err, authority.ErrMissing) {
		t.Errorf("empty store: %v", err)
	}
}

func TestNodeCertificateIsTheTemplate(t *testing.T) {
	b := newBench(t)
	k := p256(t)
	evil, err := url.Parse("spiffe://settler.example/signet/coordinator")
	if err != nil {
		t.Fatal(err)
	}
	csr := request(t, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "root", Organization: []string{"evil"}},
		URIs:    []*url.URL{evil}, DNSNames: []string{"evil.example"}, IPAddresses: []net.IP{net.IPv4(1, 2, 3, 4)}, EmailAddresses: []string{"a@b.example"},
		ExtraExtensions: []pkix.Extension{
			{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}, // cA=true
			{Id: []int{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 1, 6}},          // keyCertSign, cRLSign
		},
	}, k)
	chain, notAfter, err := b.IssueNode(context.Background(), csr, b.id("api-1"))
	if err != nil {
		t.Fatal(err)
	}
	certs, err := identity.ParseChain(chain)
	if err != nil {
		t.Fatal(err)
	}
	c := certs[0]
	if len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://settler.example/signet/node/api-1" || len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses) != 0 ||
		c.IsCA || !c.BasicConstraintsValid || c.KeyUsage != x509.KeyUsageDigitalSignature || c.Subject.String() != "" || len(c.UnknownExtKeyUsage) != 0 || len(c.ExtKeyUsage) != 2 {
		t.Errorf("the request had its wishes: %+v", c)
	}
	if !c.NotBefore.Equal(epoch.Add(-authority.Backdate)) || !notAfter.Equal(epoch.Add(time.Hour)) || c.SerialNumber.BitLen() > 128 || c.SerialNumber.BitLen() < 64 {
		t.Errorf("from %v to %v, serial of %d bits", c.NotBefore, notAfter, c.SerialNumber.BitLen())
	}
	v, err := identity.VerifyX509(b.Bundle(), certs, identity.Options{Now: b.time()})
	if err != nil || v.ID != b.id("api-1") {
		t.Errorf("verify: %+v %v", v, err)
	}
	if !k.PublicKey.Equal(c.PublicKey) {
		t.Error("another key")
	}
}

func TestBadRequests(t *testing.T) {
	b := newBench(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged := request(t, &x509.CertificateRequest{}, p256(t))
	forged[len(forged)-3] ^= 1
	for what, csr := range map[string][]byte{
		"P-384": request(t, &x509.CertificateRequest{}, p384), "RSA": request(t, &x509.CertificateRequest{}, r), "Ed25519": request(t, &x509.CertificateRequest{}, ed),
		"forged": forged, "empty": nil, "huge": make([]byte, 1<<20), "text": []byte("hello"),
	} {
		if _, _, err := b.IssueNode(context.Background(), csr, b.id("api-1")); !errors.Is(err, authority.ErrRequest) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, _, err := b.IssueNode(context.Background(), request(t, &x509.CertificateRequest{}, p256(t)), b.opts.TrustDomain.Coordinator()); err == nil {
		t.Error("a node got the coordinator's ID")
	}
}

func TestIssuanceIsLogged(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	before, err := store.VerifyIssuance(ctx, b.store)
	if err != nil {
		t.Fatal(err)
	}
	b.issue("api-1", p256(t))
	boom := errors.New("boom")
	req, err := authority.ParseRequest(request(t, &x509.CertificateRequest{}, p256(t)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.store.Update(ctx, func(tx store.Tx) error {
		if _, err := b.IssueNodeIn(tx, req, b.id("api-2")); err != nil {
			return err
		}
		return boom
	}); !errors.Is(err, boom) {
		t.Fatal(err)
	}
	after, err := store.VerifyIssuance(ctx, b.store)
	if err != nil || after.Lines != before.Lines+1 {
		t.Errorf("%d lines, then %d: %v", before.Lines, after.Lines, err)
	}
	if err := b.store.View(ctx, func(tx store.Tx) error {
		lines, err := tx.Issuances(0, 100)
		ids := map[string]int{}
		for _, l := range lines {
			ids[l.ID]++
		}
		if len(lines) != 5 || ids["spiffe://settler.example/signet/node/api-1"] != 1 || ids["spiffe://settler.example/signet/coordinator"] != 1 || ids["spiffe://settler.example/signet/distribution"] != 1 {
			t.Errorf("%v", ids)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

func TestDistributionKey(t *testing.T) {
	b := newBench(t)
	pub, err := identity.VerifyDistribution(b.Bundle(), b.DistributionChain(), b.time())
	if err != nil {
		t.Fatal(err)
	}
	if !ed25519.Verify(pub, []byte("snapshot"), b.Sign([]byte("snapshot"))) {
		t.Error("the signature does not verify")
	}
	certs, err := identity.ParseChain([][]byte{b.DistributionChain()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := identity.VerifyX509(b.Bundle(), certs, identity.Options{Now: b.time()}); identity.CodeOf(err) != identity.CodeExtKeyUsage {
		t.Errorf("as a TLS peer: %v", err)
	}
	leaf := b.issue("api-1", p256(t))[0]
	if _, err := identity.VerifyDistribution(b.Bundle(), leaf.Raw, b.time()); err == nil {
		t.Error("an SVID may sign snapshots")
	}
	if _, err := identity.VerifyDistribution(newBench(t).Bundle(), b.DistributionChain(), b.time()); identity.CodeOf(err) != identity.CodeUnknownCA {
		t.Errorf("another root: %v", err)
	}
}

func TestServingCertificate(t *testing.T) {
	b := newBench(t)
	first := b.ServerCertificate()
	certs, err := identity.ParseChain(first.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	bundle, id, err := identity.VerifyPinned(b.Bundle().Pin(), certs, b.time())
	if err != nil || id != b.opts.TrustDomain.Coordinator() || bundle.Pin() != b.Bundle().Pin() {
		t.Fatalf("first contact: %v %v", id, err)
	}
	b.advance(authority.ServingLife/2 - authority.Backdate - time.Second)
	if b.ServerCertificate() != first {
		t.Error("renewed before half of its life")
	}
	b.advance(authority.Backdate + time.Second)
	second := b.ServerCertificate()
	if second == first || !second.Leaf.NotAfter.After(first.Leaf.NotAfter) {
		t.Error("not renewed at half of its life")
	}
	b.store.Close()
	b.advance(authority.ServingLife / 2)
	if b.ServerCertificate() != second {
		t.Error("a valid certificate was thrown away because renewal failed")
	}
	b.advance(authority.ServingLife)
	if b.ServerCertificate() != nil {
		t.Error("an expired certificate is served")
	}
}

func TestKeysRenewBelowTheRoot(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	pin, dist := b.Bundle().Pin(), b.DistributionChain()
	old := b.issue("api-1", p256(t))
	b.advance(authority.IssuingLife * 2 / 3)
	b.open()
	if b.Bundle().Pin() != pin || string(b.DistributionChain()) == string(dist) {
		t.Error("the root must stay and the distribution key change")
	}
	fresh := b.issue("api-1", p256(t))
	if fresh[1].Equal(old[1]) {
		t.Error("the issuing key stayed")
	}
	if _, err := identity.VerifyX509(b.Bundle(), fresh, identity.Options{Now: b.time()}); err != nil {
		t.Error(err)
	}
	if _, err := identity.VerifyDistribution(b.Bundle(), b.DistributionChain(), b.time()); err != nil {
		t.Error(err)
	}
	list, err := b.List(ctx)
	retired := 0
	for _, i := range list {
		if i.Slot == authority.SlotRetired {
			retired++
		}
	}
	if err != nil || len(list) != 5 || retired != 2 {
		t.Errorf("%+v %v", list, err)
	}
	// A leaf never outlives its issuer.
	b.advance(authority.RootLife - authority.IssuingLife*2/3 - time.Minute)
	b.open()
	if c := b.issue("api-1", p256(t))[0]; c.NotAfter.After(b.Bundle().Roots()[0].NotAfter) {
		t.Error("a leaf outlives the root")
	}
	b.advance(time.Hour)
	if _, _, err := b.IssueNode(ctx, request(t, &x509.CertificateRequest{}, p256(t)), b.id("api-1")); err == nil {
		t.Error("issued after the end of the issuing key")
	}
}

// TestWholeHandshake connects over TLS as agents do: pinned first, then with an SVID, then with an expired one.
func TestWholeHandshake(t *testing.T) {
	b := newBench(t)
	k := p256(t)
	chain := b.issue("api-1", k)
	svid := &tls.Certificate{Certificate: [][]byte{chain[0].Raw, chain[1].Raw}, PrivateKey: k, Leaf: chain[0]}
	server := identity.ServerTLS(b.ServerCertificate, b.Bundle, identity.RenewGrace)
	server.Time = b.time
	dial := func(cfg *tls.Config) (client, srv error) {
		cfg.Time = b.time
		c, s := net.Pipe()
		defer c.Close()
		defer s.Close()
		done := make(chan error, 1)
		go func() {
			conn := tls.Server(s, server)
			err := conn.Handshake()
			if err == nil {
				_, err = conn.Write([]byte{1})
			}
			s.Close()
			done <- err
		}()
		conn := tls.Client(c, cfg)
		client = conn.Handshake()
		if client == nil {
			_, client = conn.Read(make([]byte, 1))
		}
		c.Close()
		return client, <-done
	}
	withSVID := identity.ClientTLS(func() *tls.Certificate { return svid }, b.Bundle, b.opts.TrustDomain.Coordinator())
	if c, s := dial(identity.PinnedTLS(b.Bundle().Pin())); c != nil || s != nil {
		t.Errorf("pinned: %v %v", c, s)
	}
	if c, _ := dial(identity.PinnedTLS([32]byte{1})); identity.CodeOf(c) != identity.CodeUnknownCA {
		t.Errorf("interceptor: %v", c)
	}
	if c, s := dial(withSVID); c != nil || s != nil {
		t.Errorf("with SVID: %v %v", c, s)
	}
	if c, _ := dial(identity.ClientTLS(func() *tls.Certificate { return svid }, b.Bundle, b.id("api-1"))); identity.CodeOf(c) != identity.CodeIDMismatch {
		t.Errorf("another server: %v", c)
	}
	b.advance(20 * 24 * time.Hour)
	if c, s := dial(withSVID); c != nil || s != nil {
		t.Errorf("expired, within the grace: %v %v", c, s)
	}
	b.advance(11 * 24 * time.Hour)
	if _, s := dial(withSVID); identity.CodeOf(s) != identity.CodeExpired {
		t.Errorf("expired, after the grace: %v", s)
	}
	stranger := newBench(t)
	sk := p256(t)
	sc := stranger.issue("api-1", sk)
	foreign := &tls.Certificate{Certificate: [][]byte{sc[0].Raw, sc[1].Raw}, PrivateKey: sk}
	b.now.Store(0)
	b.open()
	server.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return b.ServerCertificate(), nil }
	if _, s := dial(identity.ClientTLS(func() *tls.Certificate { return foreign }, b.Bundle, b.opts.TrustDomain.Coordinator())); identity.CodeOf(s) != identity.CodeUnknownCA {
		t.Errorf("a stranger's SVID: %v", s)
	}
}

func BenchmarkIssueParallel(b *testing.B) {
	t := &testing.T{}
	s, err := store.OpenSQLite(context.Background(), b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	td, err := identity.ParseTrustDomain("settler.example")
	if err != nil {
		b.Fatal(err)
	}
	k, err := key.NewStateKey()
	if err != nil {
		b.Fatal(err)
	}
	opts := authority.Options{TrustDomain: td, Key: k}
	if err := authority.Init(context.Background(), s, opts); err != nil {
		b.Fatal(err)
	}
	a, err := authority.Open(context.Background(), s, opts)
	if err != nil {
		b.Fatal(err)
	}
	id, err := td.Node("api-1")
	if err != nil {
		b.Fatal(err)
	}
	csr := request(t, &x509.CertificateRequest{}, p256(t))
	b.SetParallelism(64)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, _, err := a.IssueNode(context.Background(), csr, id); err != nil {
				b.Error(err)
			}
		}
	})
}
