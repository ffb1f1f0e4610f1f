package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"
)

var testNow = time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)

// pki is a root, an issuer and a way to make leaves with one thing wrong.
type pki struct {
	t            testing.TB
	td           TrustDomain
	root, issuer signed
	bundle       Bundle
}

type signed struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newPKI(t testing.TB, name string) *pki {
	t.Helper()
	td, err := ParseTrustDomain(name)
	if err != nil {
		t.Fatal(err)
	}
	p := &pki{t: t, td: td}
	p.root = p.sign(caTemplate(name+" root"), newKey(t), signed{})
	p.issuer = p.sign(caTemplate(name+" issuer"), newKey(t), p.root)
	if p.bundle, err = NewBundle(td, []*x509.Certificate{p.root.cert}, 1); err != nil {
		t.Fatal(err)
	}
	return p
}

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func caTemplate(name string) *x509.Certificate {
	return &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: testNow.Add(-time.Hour), NotAfter: testNow.Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
}

func leafTemplate(uris ...string) *x509.Certificate {
	c := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: testNow.Add(-time.Minute), NotAfter: testNow.Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			panic(err)
		}
		c.URIs = append(c.URIs, u)
	}
	return c
}

func (p *pki) sign(tmpl *x509.Certificate, k crypto.Signer, parent signed) signed {
	p.t.Helper()
	if parent.cert == nil {
		parent = signed{tmpl, k}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent.cert, k.Public(), parent.key)
	if err != nil {
		p.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return signed{c, k}
}

// leaf signs a template, after one change, with the issuer.
func (p *pki) leaf(change func(*x509.Certificate)) []*x509.Certificate {
	p.t.Helper()
	tmpl := leafTemplate("spiffe://" + p.td.String() + "/app/api-server")
	if change != nil {
		change(tmpl)
	}
	return []*x509.Certificate{p.sign(tmpl, newKey(p.t), p.issuer).cert, p.issuer.cert}
}

// under signs a good leaf with an issuer made from a changed template.
func (p *pki) under(change func(*x509.Certificate)) []*x509.Certificate {
	p.t.Helper()
	tmpl := caTemplate("odd issuer")
	change(tmpl)
	issuer := p.sign(tmpl, newKey(p.t), p.root)
	return []*x509.Certificate{p.sign(leafTemplate("spiffe://"+p.td.String()+"/app/api-server"), newKey(p.t), issuer).cert, issuer.cert}
}

func extensionOf(id asn1.ObjectIdentifier, critical bool, value []byte) pkix.Extension {
	return pkix.Extension{Id: id, Critical: critical, Value: value}
}

// sanOf encodes URI names as they are, without url.URL.
func sanOf(t testing.TB, critical bool, uris ...string) pkix.Extension {
	t.Helper()
	var names []asn1.RawValue
	for _, u := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tagURI, Bytes: []byte(u)})
	}
	der, err := asn1.Marshal(names)
	if err != nil {
		t.Fatal(err)
	}
	return extensionOf(oidSubjectAltName, critical, der)
}

func (p *pki) rawSAN(uris ...string) []*x509.Certificate {
	return p.leaf(func(c *x509.Certificate) {
		c.URIs = nil
		c.ExtraExtensions = []pkix.Extension{sanOf(p.t, true, uris...)}
	})
}

type defect struct {
	name  string
	code  Code // "" is valid
	chain []*x509.Certificate
	opts  Options
}

func defects(t testing.TB) (*pki, []defect) {
	p, stranger := newPKI(t, "settler.example"), newPKI(t, "settler.example")
	other := newPKI(t, "other.example")
	good := p.leaf(nil)
	set := func(f func(*x509.Certificate)) []*x509.Certificate { return p.leaf(f) }
	list := []defect{
		{name: "good", chain: good},
		{name: "good with its root", chain: append(p.leaf(nil), p.root.cert)},
		{name: "directly under the root", chain: []*x509.Certificate{p.sign(leafTemplate("spiffe://settler.example/a/b"), newKey(t), p.root).cert}},
		{name: "no chain", code: CodeNoCertificate},
		{name: "expired", code: CodeExpired, chain: set(func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Second) })},
		{name: "expired, in grace", chain: set(func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Second) }), opts: Options{ExpiredGrace: time.Minute}},
		{name: "expired, past grace", code: CodeExpired, chain: set(func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = testNow.Add(-time.Hour), testNow.Add(-2*time.Minute)
		}), opts: Options{ExpiredGrace: time.Minute}},
		{name: "not yet valid", code: CodeNotYetValid, chain: set(func(c *x509.Certificate) { c.NotBefore = testNow.Add(time.Minute) })},
		{name: "not yet valid, within skew", chain: set(func(c *x509.Certificate) { c.NotBefore = testNow.Add(time.Second) }), opts: Options{Skew: time.Minute}},
		{name: "lives too long", code: CodeLimit, chain: good, opts: Options{MaxLifetime: time.Minute}},
		{name: "stranger with our names", code: CodeUnknownCA, chain: stranger.leaf(nil)},
		{name: "stranger with its root", code: CodeUnknownCA, chain: append(stranger.leaf(nil), stranger.root.cert)},
		{name: "self-signed", code: CodeUnknownCA, chain: []*x509.Certificate{p.sign(func() *x509.Certificate {
			c := leafTemplate("spiffe://settler.example/app/api-server")
			c.Subject.CommonName = "me"
			return c
		}(), newKey(t), signed{}).cert}},
		{name: "issuer missing", code: CodeChainIncomplete, chain: good[:1]},
		{name: "wrong order", code: CodeURICount, chain: []*x509.Certificate{good[1], good[0]}},
		{name: "foreign issuer in between", code: CodeChainIncomplete, chain: []*x509.Certificate{good[0], other.issuer.cert}},
		{name: "issuer of another key", code: CodeUnknownCA, chain: []*x509.Certificate{good[0], stranger.issuer.cert}},
		{name: "other trust domain", code: CodeTrustDomain, chain: other.leaf(nil)},
		{name: "our root vouches for another domain", code: CodeTrustDomain, chain: p.rawSAN("spiffe://other.example/app/a")},
		{name: "no URI", code: CodeURICount, chain: set(func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"a.example"} })},
		{name: "two SPIFFE IDs", code: CodeURICount, chain: p.rawSAN("spiffe://settler.example/a/b", "spiffe://settler.example/a/c")},
		{name: "SPIFFE ID and a web address", code: CodeURICount, chain: p.rawSAN("spiffe://settler.example/a/b", "https://a.example/")},
		{name: "DNS name besides", chain: set(func(c *x509.Certificate) { c.DNSNames = []string{"a.example"} })},
		{name: "trust domain alone", code: CodeRootPath, chain: p.rawSAN("spiffe://settler.example")},
		{name: "root path", code: CodeRootPath, chain: p.rawSAN("spiffe://settler.example/")},
		{name: "web address", code: CodeBadID, chain: p.rawSAN("https://settler.example/a/b")},
		{name: "upper-case scheme", code: CodeBadID, chain: p.rawSAN("SPIFFE://settler.example/a/b")},
		{name: "upper-case domain", code: CodeBadID, chain: p.rawSAN("spiffe://Settler.example/a/b")},
		{name: "empty fragment", code: CodeBadID, chain: p.rawSAN("spiffe://settler.example/a/b#")},
		{name: "empty query", code: CodeBadID, chain: p.rawSAN("spiffe://settler.example/a/b?")},
		{name: "port", code: CodeBadID, chain: p.rawSAN("spiffe://settler.example:1/a/b")},
		{name: "user", code: CodeBadID, chain: p.rawSAN("spiffe://u@settler.example/a/b")},
		{name: "escaped letter", code: CodeBadID, chain: p.rawSAN("spiffe://settler.example/%61/b")},
		{name: "dot segment", code: CodeBadID, chain: p.rawSAN("spiffe://settler.example/a/../b")},
		{name: "double slash", code: CodeBadID, chain: p.rawSAN("spiffe://settler.example//b")},
		{name: "too long", code: CodeBadID, chain: p.rawSAN("spiffe://settler.example/" + strings.Repeat("a", 2048))},
	}
	list = append(list, usageDefects(t, p)...)
	return p, append(list, structuralDefects(t, p)...)
}

// usageDefects are what a leaf or its issuer may be used for.
func usageDefects(t testing.TB, p *pki) []defect {
	good, set := p.leaf(nil), p.leaf
	return []defect{
		{name: "is a CA", code: CodeKeyUsage, chain: set(func(c *x509.Certificate) { c.IsCA = true })},
		{name: "may sign certificates", code: CodeKeyUsage, chain: set(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign })},
		{name: "may sign revocation lists", code: CodeKeyUsage, chain: set(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign })},
		{name: "no digitalSignature", code: CodeKeyUsage, chain: set(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })},
		{name: "no key usage", code: CodeKeyUsage, chain: set(func(c *x509.Certificate) { c.KeyUsage = 0 })},
		{name: "key usage not critical", code: CodeKeyUsage, chain: set(func(c *x509.Certificate) {
			c.KeyUsage = 0
			c.ExtraExtensions = []pkix.Extension{extensionOf(oidKeyUsage, false, []byte{3, 2, 7, 0x80})}
		})},
		{name: "no basic constraints", chain: set(func(c *x509.Certificate) { c.BasicConstraintsValid = false })},
		{name: "serverAuth alone", code: CodeExtKeyUsage, chain: set(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] })},
		{name: "clientAuth alone", code: CodeExtKeyUsage, chain: set(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] })},
		{name: "codeSigning alone", code: CodeExtKeyUsage, chain: set(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} })},
		{name: "no extended key usage", chain: set(func(c *x509.Certificate) { c.ExtKeyUsage = nil })},
		{name: "signs snapshots too", code: CodeExtKeyUsage, chain: set(func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{DistributionEKU()} })},
		{name: "SAN not critical, no subject", code: CodeSubjectAlt, chain: set(func(c *x509.Certificate) {
			c.URIs = nil
			c.ExtraExtensions = []pkix.Extension{sanOf(t, false, "spiffe://settler.example/a/b")}
		})},
		{name: "SAN not critical, with subject", chain: set(func(c *x509.Certificate) { c.Subject.CommonName = "a" })},
		{name: "unknown critical extension", code: CodeCriticalExtn, chain: set(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{extensionOf([]int{1, 2, 3, 4}, true, []byte{5, 0})}
		})},
		{name: "huge", code: CodeLimit, chain: set(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{extensionOf([]int{1, 2, 3, 4}, false, make([]byte, MaxCertificateSize))}
		})},
		{name: "chain too long", code: CodeLimit, chain: []*x509.Certificate{good[0], good[1], good[1], good[1], good[1], good[1]}},
		{name: "issuer twice", code: CodeChainIncomplete, chain: []*x509.Certificate{good[0], good[1], good[1]}},
		{name: "issuer is no CA", code: CodeKeyUsage, chain: p.under(func(c *x509.Certificate) { c.IsCA = false })},
		{name: "issuer lacks keyCertSign", code: CodeKeyUsage, chain: p.under(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })},
		{name: "issuer expired", code: CodeExpired, chain: p.under(func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Second) })},
		{name: "issuer expired, in grace", code: CodeExpired, chain: p.under(func(c *x509.Certificate) { c.NotAfter = testNow.Add(-time.Second) }), opts: Options{ExpiredGrace: time.Hour}},
		{name: "issuer not yet valid", code: CodeNotYetValid, chain: p.under(func(c *x509.Certificate) { c.NotBefore = testNow.Add(time.Second) })},
		{name: "issuer of another domain", code: CodeTrustDomain, chain: p.under(func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "other.example"}} })},
		{name: "issuer with a workload's ID", code: CodeBadID, chain: p.under(func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "settler.example", Path: "/a/b"}}
		})},
		{name: "issuer may not name this", code: CodeConstraint, chain: p.under(func(c *x509.Certificate) {
			c.PermittedDNSDomainsCritical, c.PermittedURIDomains = true, []string{"elsewhere.example"}
		})},
		{name: "issuer for mail only", code: CodeExtKeyUsage, chain: p.under(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} })},
	}
}

// structuralDefects need keys or depths of their own.
func structuralDefects(t testing.TB, p *pki) []defect {
	leaf := leafTemplate("spiffe://settler.example/app/api-server")
	short := caTemplate("no more below")
	short.MaxPathLenZero = true
	a := p.sign(short, newKey(t), p.root)
	b := p.sign(caTemplate("one too many"), newKey(t), a)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cut := p.leaf(nil)
	broken := bytes.Clone(cut[0].Raw)
	broken[len(broken)-1] ^= 1
	forged, err := x509.ParseCertificate(broken)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return []defect{
		{name: "path length", code: CodeConstraint, chain: []*x509.Certificate{p.sign(leaf, newKey(t), b).cert, b.cert, a.cert}},
		{name: "RSA 1024", code: CodeAlgorithm, chain: []*x509.Certificate{p.sign(leaf, weak, p.issuer).cert, p.issuer.cert}},
		{name: "P-224", code: CodeAlgorithm, chain: []*x509.Certificate{p.sign(leaf, p224, p.issuer).cert, p.issuer.cert}},
		{name: "signature changed", code: CodeUnknownCA, chain: []*x509.Certificate{forged, cut[1]}},
		{name: "Ed25519", chain: []*x509.Certificate{p.sign(leaf, ed, p.issuer).cert, p.issuer.cert}},
		{name: "RSA beyond the limit", code: CodeAlgorithm, chain: []*x509.Certificate{{Raw: []byte{1}, PublicKey: &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), MaxRSABits), E: 65537}}}},
		{name: "the root as a peer", code: CodeURICount, chain: []*x509.Certificate{p.root.cert}},
	}
}

func TestOneDefectEach(t *testing.T) {
	p, list := defects(t)
	for _, d := range list {
		t.Run(d.name, func(t *testing.T) {
			d.opts.Now = testNow
			v, err := VerifyX509(p.bundle, d.chain, d.opts)
			if CodeOf(err) != d.code || (err == nil) != (d.code == "") {
				t.Fatalf("got %v, want %q", err, d.code)
			}
			if err == nil && (v.ID.IsZero() || v.Leaf != d.chain[0] || v.Expired != (d.opts.ExpiredGrace > 0)) {
				t.Errorf("%+v", v)
			}
			var ve *VerifyError
			if errors.As(err, &ve) && (ve.Code == CodeExpired || ve.Code == CodeNotYetValid) && ve.Skew <= 0 {
				t.Error("no skew is named")
			}
		})
	}
	if len(list) < 60 {
		t.Errorf("%d cases", len(list))
	}
}

func TestBundle(t *testing.T) {
	p, other := newPKI(t, "settler.example"), newPKI(t, "other.example")
	for _, b := range [][]byte{p.bundle.PEM(), append([]byte("\n"), p.bundle.PEM()...)} {
		got, err := ParseBundlePEM(p.td, b, 7)
		if err != nil || got.Pin() != p.bundle.Pin() || got.Sequence() != 7 || got.TrustDomain() != p.td {
			t.Errorf("%+v %v", got, err)
		}
	}
	if got, err := ParseBundleDER(p.td, p.bundle.DER(), 1); err != nil || !bytes.Equal(got.PEM(), p.bundle.PEM()) {
		t.Error(err)
	}
	roots := p.bundle.Roots()
	roots[0] = nil
	if p.bundle.Roots()[0] == nil {
		t.Error("a reader changed the bundle")
	}
	for what, text := range map[string]string{
		"empty": "", "text": "hello", "cut": string(p.bundle.PEM()[:100]), "twice": string(p.bundle.PEM()) + string(p.bundle.PEM()),
		"text after": string(p.bundle.PEM()) + "x", "key": "-----BEGIN PRIVATE KEY-----\nMAo=\n-----END PRIVATE KEY-----\n",
	} {
		if _, err := ParseBundlePEM(p.td, []byte(text), 1); !errors.Is(err, ErrBundle) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := NewBundle(p.td, p.leaf(nil)[:1], 1); !errors.Is(err, ErrBundle) {
		t.Errorf("a leaf as a root: %v", err)
	}
	// Two roots trust both; the same IDs under another domain's bundle are trusted by neither.
	both, err := NewBundle(p.td, []*x509.Certificate{p.root.cert, other.root.cert}, 2)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyX509(both, p.leaf(nil), Options{Now: testNow}); err != nil {
		t.Error(err)
	}
	if _, err := VerifyX509(both, other.leaf(nil), Options{Now: testNow}); CodeOf(err) != CodeTrustDomain {
		t.Errorf("%v", err)
	}
	if _, err := VerifyX509(Bundle{}, p.leaf(nil), Options{Now: testNow}); CodeOf(err) != CodeTrustDomain {
		t.Errorf("zero bundle: %v", err)
	}
}

func TestVerifyPinned(t *testing.T) {
	p, mallory := newPKI(t, "settler.example"), newPKI(t, "settler.example")
	coordinator := func(q *pki) []*x509.Certificate {
		return []*x509.Certificate{q.sign(leafTemplate("spiffe://settler.example/signet/coordinator"), newKey(t), q.issuer).cert, q.issuer.cert, q.root.cert}
	}
	pin := p.bundle.Pin()
	if b, id, err := VerifyPinned(pin, coordinator(p), testNow); err != nil || id != p.td.Coordinator() || b.Pin() != pin {
		t.Fatalf("%v %v", id, err)
	}
	// The pinned public key in a certificate that someone else signed proves nothing.
	wrapped := caTemplate("settler.example root")
	der, err := x509.CreateCertificate(rand.Reader, wrapped, mallory.root.cert, p.root.key.Public(), mallory.root.key)
	if err != nil {
		t.Fatal(err)
	}
	fake, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	good := coordinator(p)
	for what, c := range map[string]struct {
		chain []*x509.Certificate
		code  Code
	}{
		"nothing":             {nil, CodeNoCertificate},
		"another root":        {coordinator(mallory), CodeUnknownCA},
		"root left out":       {good[:2], CodeUnknownCA},
		"real root appended":  {append(coordinator(mallory)[:2], p.root.cert), CodeUnknownCA},
		"wrapped key":         {append(coordinator(mallory)[:2], fake), CodeUnknownCA},
		"node, not the coord": {append(p.leaf(nil), p.root.cert), CodeIDMismatch},
		"root alone":          {[]*x509.Certificate{p.root.cert}, CodeURICount},
	} {
		if _, _, err := VerifyPinned(pin, c.chain, testNow); CodeOf(err) != c.code {
			t.Errorf("%s: got %v, want %s", what, err, c.code)
		}
	}
}

func TestVerifyDistribution(t *testing.T) {
	p := newPKI(t, "settler.example")
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	make := func(k crypto.Signer, parent signed, change func(*x509.Certificate)) []byte {
		c := leafTemplate("spiffe://settler.example/signet/distribution")
		c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, []asn1.ObjectIdentifier{DistributionEKU()}
		if change != nil {
			change(c)
		}
		return p.sign(c, k, parent).cert.Raw
	}
	good := make(ed, p.root, nil)
	if pub, err := VerifyDistribution(p.bundle, good, testNow); err != nil || !pub.Equal(ed.Public()) {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		der  []byte
		at   time.Time
		code Code
	}{
		"below the issuing key": {make(ed, p.issuer, nil), testNow, CodeChainIncomplete},
		"P-256":                 {make(newKey(t), p.root, nil), testNow, CodeAlgorithm},
		"expired":               {good, testNow.Add(2 * time.Hour), CodeExpired},
		"early":                 {good, testNow.Add(-2 * time.Hour), CodeNotYetValid},
		"TLS usage":             {make(ed, p.root, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), testNow, CodeExtKeyUsage},
		"no usage":              {make(ed, p.root, func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }), testNow, CodeExtKeyUsage},
		"CA":                    {make(ed, p.root, func(c *x509.Certificate) { c.IsCA = true }), testNow, CodeKeyUsage},
		"another ID":            {make(ed, p.root, func(c *x509.Certificate) { c.URIs = leafTemplate("spiffe://settler.example/a/b").URIs }), testNow, CodeIDMismatch},
		"another root":          {make(ed, newPKI(t, "settler.example").root, nil), testNow, CodeUnknownCA},
	} {
		if _, err := VerifyDistribution(p.bundle, c.der, c.at); CodeOf(err) != c.code {
			t.Errorf("%s: got %v, want %s", what, err, c.code)
		}
	}
	if _, err := VerifyDistribution(p.bundle, []byte("x"), testNow); err == nil {
		t.Error("bytes that are no certificate")
	}
}

// FuzzVerifyX509 changes bytes of a good chain. Nothing may panic, and only the chain as signed may pass.
func FuzzVerifyX509(f *testing.F) {
	p, list := defects(f)
	for _, d := range list {
		if len(d.chain) == 2 && len(d.chain[0].Raw) < 2000 {
			f.Add(d.chain[0].Raw, d.chain[1].Raw)
		}
	}
	known := map[string]bool{}
	for _, d := range list {
		if d.code == "" {
			known[string(d.chain[0].Raw)] = true
		}
	}
	f.Fuzz(func(t *testing.T, leaf, issuer []byte) {
		chain, err := ParseChain([][]byte{leaf, issuer})
		if err != nil {
			return
		}
		v, err := VerifyX509(p.bundle, chain, Options{Now: testNow})
		if err == nil && !sameBody(known, chain[0]) {
			t.Errorf("%s passed with a certificate that nobody signed", v.ID)
		}
		_, _, _ = VerifyPinned(p.bundle.Pin(), chain, testNow)
		_, _ = VerifyDistribution(p.bundle, leaf, testNow)
	})
}

// sameBody compares what was signed: an ECDSA signature itself can be written in more than one way.
func sameBody(known map[string]bool, c *x509.Certificate) bool {
	for raw := range known {
		if k, err := x509.ParseCertificate([]byte(raw)); err == nil && bytes.Equal(k.RawTBSCertificate, c.RawTBSCertificate) {
			return true
		}
	}
	return false
}
