package session_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net/url"
	"testing"

	"google.golang.org/grpc/status"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/proto/signetv1"
)

// csrs are requests that ask for more than they get, or prove less than they must.
func csrs(t testing.TB) [][]byte {
	p256 := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	p384 := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))(t)
	weak := must(rsa.GenerateKey(rand.Reader, 2048))(t)
	grand := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "coordinator"}, DNSNames: []string{"settler.example"},
		URIs:            []*url.URL{{Scheme: "spiffe", Host: "settler.example", Path: "/signet/coordinator"}},
		ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}}} // CA: true
	plain := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, p256))(t)
	forged := append([]byte{}, plain...)
	forged[len(forged)-1] ^= 1
	return [][]byte{
		plain, forged, plain[:len(plain)/2], append(append([]byte{}, plain...), 0), nil, make([]byte, 5000),
		must(x509.CreateCertificateRequest(rand.Reader, grand, p256))(t),
		must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, p384))(t),
		must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, weak))(t),
	}
}

// FuzzEnrol brings arbitrary requests to the handler, with real registry and authority behind it. Nothing panics; who is
// refused leaves nothing; who is let in gets exactly the name that the registry says, whatever the request asked for.
func FuzzEnrol(f *testing.F) {
	r := newRig(f)
	wg := r.newHost("seed").wg.Bytes()
	// One token lets any name in, pending; the other one binds a glob.
	tokens := [][32]byte{r.token(registry.TokenRequest{Uses: registry.MaxTokenUses}), r.token(registry.TokenRequest{Node: "api-*", Uses: registry.MaxTokenUses}), {1}}
	for i, csr := range csrs(f) {
		f.Add(uint8(i), []byte(nil), fmt.Sprintf("api-%d", i), wg, csr, "test")
	}
	ok := csrs(f)[0]
	for _, name := range []string{"", "..", "a/b", "coordinator", "api-1\x00", "ä", "signet/coordinator"} {
		f.Add(uint8(0), []byte(nil), name, wg, ok, "\x1b[31m")
	}
	f.Add(uint8(1), []byte(nil), "db-1", wg, ok, "")
	f.Add(uint8(2), []byte(nil), "api-1", wg, ok, "")
	f.Add(uint8(0), []byte("short"), "api-1", wg, ok, "")
	f.Add(uint8(0), []byte(nil), "api-1", make([]byte, 32), ok, "")
	f.Fuzz(func(t *testing.T, which uint8, secret []byte, name string, wg, csr []byte, version string) {
		if len(secret) == 0 {
			s := tokens[int(which)%len(tokens)]
			secret = s[:]
		}
		before := r.reg.State().Nodes
		resp, err := r.srv.Enrol(t.Context(), &signetv1.EnrolRequest{TokenSecret: secret, Node: name, WireguardKey: wg, Csr: csr, Version: version})
		after := r.reg.State().Nodes
		if err != nil {
			if _, is := status.FromError(err); !is {
				t.Errorf("refused with something that is no status: %v", err)
			}
			if len(after) != len(before) {
				t.Errorf("a refusal (%v) left %d nodes, there were %d", err, len(after), len(before))
			}
			return
		}
		id := must(identity.ParseID(resp.NodeId))(t)
		node, known := after[id.NodeName()]
		// The same key again, with the same token, gets the same answer, whatever name it claims now.
		_, repeated := before[id.NodeName()]
		if !known || node.ID != id || id.NodeName() != name && !repeated || resp.Pending != (node.Status == registry.NodePending) {
			t.Fatalf("%q is let in as %v, the registry has %+v", name, id, node)
		}
		r.checkSVID(t, resp.Chain, node, csr)
	})
}

// checkSVID compares a certificate with the template for nodes.
func (r *rig) checkSVID(t *testing.T, ders [][]byte, node registry.Node, csr []byte) {
	chain := must(identity.ParseChain(ders))(t)
	v, err := identity.VerifyX509(r.auth.Bundle(), chain, identity.Options{Now: chain[0].NotBefore.Add(1)})
	if err != nil || v.ID != node.ID {
		t.Fatalf("the certificate is for %v (%v), the node is %v", v.ID, err, node.ID)
	}
	leaf := chain[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != node.ID.String() || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 || leaf.IsCA || leaf.Subject.CommonName == "coordinator" {
		t.Errorf("the certificate says %v %v %v, CA %t, subject %v", leaf.URIs, leaf.DNSNames, leaf.IPAddresses, leaf.IsCA, leaf.Subject)
	}
	req := must(x509.ParseCertificateRequest(csr))(t)
	if identity.SPKIHash(leaf) != node.SPKI || string(leaf.RawSubjectPublicKeyInfo) != string(req.RawSubjectPublicKeyInfo) {
		t.Error("the certificate is for another key than the one that was proven")
	}
}
