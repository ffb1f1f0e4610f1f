package state

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
)

// Identity is who this host is. One without a Chain is a draft: its keys were made and saved before the coordinator
// was asked, so that a lost answer can be asked for again with the same keys. It does not print.
type Identity struct {
	TrustDomain  identity.TrustDomain
	Node         string
	Key          *ecdsa.PrivateKey // P-256
	NextKey      *ecdsa.PrivateKey // of a renewal that was asked for and not answered yet; nil otherwise
	WireGuard    key.Private
	Coordinators []string
	Chain        []*x509.Certificate // leaf first, without the root
	Bundle       identity.Bundle
	// Overlay ranges, once a snapshot has named them: a host with a damaged snapshot must know what to deny.
	Overlay4, Overlay6 netip.Prefix
}

// NewDraft makes the keys of a host that wants to be node in td.
func NewDraft(td identity.TrustDomain, node string, coordinators []string) (Identity, error) {
	if err := identity.ParseName(node); err != nil {
		return Identity{}, fmt.Errorf("name of this node: %w", err)
	}
	k, err := NewKey()
	if err != nil {
		return Identity{}, err
	}
	wg, err := key.NewPrivate()
	if err != nil {
		return Identity{}, fmt.Errorf("make node keys: %w", err)
	}
	return Identity{TrustDomain: td, Node: node, Key: k, WireGuard: wg, Coordinators: coordinators}, nil
}

// NewKey makes a node key.
func NewKey() (*ecdsa.PrivateKey, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make node key: %w", err)
	}
	return k, nil
}

// Enrolled reports whether the coordinator has given this identity a certificate.
func (i Identity) Enrolled() bool { return len(i.Chain) > 0 }

// ID is the node's SPIFFE ID.
func (i Identity) ID() identity.ID {
	id, err := i.TrustDomain.Node(i.Node)
	if err != nil {
		return identity.ID{} // the zero Identity
	}
	return id
}

// Certificate is what TLS presents; nil for a draft.
func (i Identity) Certificate() *tls.Certificate {
	if !i.Enrolled() {
		return nil
	}
	c := &tls.Certificate{PrivateKey: i.Key, Leaf: i.Chain[0]}
	for _, one := range i.Chain {
		c.Certificate = append(c.Certificate, one.Raw)
	}
	return c
}

// Format redacts under every verb.
func (i Identity) Format(f fmt.State, _ rune) {
	_, _ = io.WriteString(f, "identity of node "+i.Node)
}

// MarshalJSON refuses, so that keys inside an encoded struct stay secret.
func (Identity) MarshalJSON() ([]byte, error) {
	return nil, errors.New("an identity has no text form")
}

// saved is the form inside the sealed file.
type saved struct {
	Version      int          `json:"version"`
	TrustDomain  string       `json:"trust_domain"`
	Node         string       `json:"node"`
	Key          []byte       `json:"key"` // PKCS#8
	NextKey      []byte       `json:"next_key,omitempty"`
	WireGuard    []byte       `json:"wireguard"`
	Coordinators []string     `json:"coordinators"`
	Chain        [][]byte     `json:"chain,omitempty"`
	Bundle       [][]byte     `json:"bundle,omitempty"`
	Sequence     uint64       `json:"bundle_sequence,omitempty"`
	Overlay4     netip.Prefix `json:"overlay4,omitzero"`
	Overlay6     netip.Prefix `json:"overlay6,omitzero"`
}

const savedVersion = 1

// SaveIdentity keeps an identity. When it returns, a crash does not lose it.
func (d *Dir) SaveIdentity(i Identity) error {
	b, err := i.marshal()
	if err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	return d.save(fileIdentity, b)
}

// LoadIdentity returns what SaveIdentity got, ErrNone on a host that never enrolled, or a Problem.
func (d *Dir) LoadIdentity() (Identity, error) {
	remedy := "restore it and the key file from a backup, or " + d.anew()
	b, err := d.load(fileIdentity, remedy)
	if errors.Is(err, ErrNone) {
		if _, other := d.load(fileSnapshot, ""); !errors.Is(other, ErrNone) {
			return Identity{}, &Problem{File: d.file(fileIdentity), Problem: "is missing, although this host was enrolled", Remedy: remedy}
		}
		return Identity{}, ErrNone
	}
	if err != nil {
		return Identity{}, err
	}
	i, err := parseIdentity(b)
	if err != nil {
		return Identity{}, &Problem{File: d.file(fileIdentity), Problem: "does not hold an identity (" + err.Error() + ")", Remedy: remedy, cause: err}
	}
	return i, nil
}

func (i Identity) marshal() ([]byte, error) {
	k, err := x509.MarshalPKCS8PrivateKey(i.Key)
	if err != nil {
		return nil, fmt.Errorf("encode node key: %w", err)
	}
	s := saved{Version: savedVersion, TrustDomain: i.TrustDomain.String(), Node: i.Node, Key: k, WireGuard: i.WireGuard.Reveal(),
		Coordinators: i.Coordinators, Bundle: i.Bundle.DER(), Sequence: i.Bundle.Sequence(), Overlay4: i.Overlay4, Overlay6: i.Overlay6}
	if i.NextKey != nil {
		if s.NextKey, err = x509.MarshalPKCS8PrivateKey(i.NextKey); err != nil {
			return nil, fmt.Errorf("encode next node key: %w", err)
		}
	}
	for _, c := range i.Chain {
		s.Chain = append(s.Chain, c.Raw)
	}
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode identity: %w", err)
	}
	return b, nil
}

// parseIdentity believes nothing: the file was sealed by this host, but perhaps by another version.
func parseIdentity(b []byte) (Identity, error) {
	var s saved
	if err := decodeStrict(b, &s); err != nil {
		return Identity{}, err
	}
	if s.Version != savedVersion {
		return Identity{}, fmt.Errorf("version %d, expected %d", s.Version, savedVersion)
	}
	var i Identity
	var err error
	if i.TrustDomain, err = identity.ParseTrustDomain(s.TrustDomain); err != nil {
		return Identity{}, fmt.Errorf("read trust domain: %w", err)
	}
	if err := identity.ParseName(s.Node); err != nil {
		return Identity{}, fmt.Errorf("read node: %w", err)
	}
	i.Node, i.Coordinators = s.Node, s.Coordinators
	if i.Key, err = parseKey(s.Key); err != nil {
		return Identity{}, err
	}
	if len(s.NextKey) > 0 {
		if i.NextKey, err = parseKey(s.NextKey); err != nil {
			return Identity{}, err
		}
	}
	if i.WireGuard, err = key.PrivateFromBytes(s.WireGuard); err != nil {
		return Identity{}, fmt.Errorf("read WireGuard key: %w", err)
	}
	if s.Overlay4.IsValid() != s.Overlay6.IsValid() || s.Overlay4.IsValid() && (!s.Overlay4.Addr().Is4() || !s.Overlay6.Addr().Is6()) {
		return Identity{}, errors.New("overlay ranges are not one IPv4 and one IPv6 range")
	}
	i.Overlay4, i.Overlay6 = s.Overlay4, s.Overlay6
	return i, i.parseCertificates(s)
}

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, errors.New("the node key is not PKCS#8")
	}
	ec, ok := k.(*ecdsa.PrivateKey)
	if !ok || ec.Curve != elliptic.P256() {
		return nil, errors.New("the node key is not P-256")
	}
	return ec, nil
}

func (i *Identity) parseCertificates(s saved) error {
	if len(s.Chain) == 0 {
		return nil
	}
	var err error
	if i.Chain, err = identity.ParseChain(s.Chain); err != nil {
		return fmt.Errorf("read certificates: %w", err)
	}
	if i.Bundle, err = identity.ParseBundleDER(i.TrustDomain, s.Bundle, s.Sequence); err != nil {
		return fmt.Errorf("read trust bundle: %w", err)
	}
	if pub, ok := i.Chain[0].PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(&i.Key.PublicKey) {
		return errors.New("the certificate belongs to another key")
	}
	if uris := i.Chain[0].URIs; len(uris) != 1 || uris[0].String() != i.ID().String() {
		return errors.New("the certificate belongs to another node")
	}
	return nil
}

// decodeStrict reads one JSON value and nothing else.
func decodeStrict(b []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return fmt.Errorf("decode: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the content")
	}
	return nil
}
