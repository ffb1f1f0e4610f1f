package key

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// Size is the length of a WireGuard static key in bytes (Curve25519, RFC 7748).
const Size = 32

// ErrKey is returned for text or bytes that are not a key.
var ErrKey = errors.New("not a WireGuard key")

// Public is a WireGuard static public key. It is comparable and may be used as a map key.
type Public struct{ b [Size]byte }

// ParsePublic reads the base64 form that WireGuard tools print (44 characters). The all-zero key is refused: it is a
// low-order point, and "no key" in WireGuard's own configuration.
func ParsePublic(s string) (Public, error) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil {
		return Public{}, fmt.Errorf("%w: not base64", ErrKey)
	}
	return PublicFromBytes(b)
}

// PublicFromBytes reads the 32 raw bytes of a key and refuses the all-zero key.
func PublicFromBytes(b []byte) (Public, error) {
	var p Public
	if len(b) != Size {
		return p, fmt.Errorf("%w: %d bytes, expected %d", ErrKey, len(b), Size)
	}
	copy(p.b[:], b)
	if p.IsZero() {
		return p, fmt.Errorf("%w: all zero", ErrKey)
	}
	return p, nil
}

// IsZero reports whether p was never set.
func (p Public) IsZero() bool { return p == Public{} }

// Bytes returns the 32 raw bytes.
func (p Public) Bytes() []byte { return append([]byte(nil), p.b[:]...) }

// String is the base64 form.
func (p Public) String() string { return base64.StdEncoding.EncodeToString(p.b[:]) }

// Hex is the form of WireGuard's configuration protocol.
func (p Public) Hex() string { return hex.EncodeToString(p.b[:]) }

// Short is a fingerprint for logs: the first 8 bytes of the key's SHA-256, in hex.
func (p Public) Short() string {
	sum := sha256.Sum256(p.b[:])
	return hex.EncodeToString(sum[:8])
}

// MarshalText writes the base64 form.
func (p Public) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads the base64 form.
func (p *Public) UnmarshalText(b []byte) (err error) {
	*p, err = ParsePublic(string(b))
	return err
}

// Private is a WireGuard static private key. The func field makes == a compile error, because comparing secrets in
// variable time leaks them.
type Private struct {
	_ [0]func()
	b [Size]byte
}

// NewPrivate makes a key from the system's random source.
func NewPrivate() (Private, error) {
	var p Private
	if _, err := io.ReadFull(rand.Reader, p.b[:]); err != nil {
		return p, fmt.Errorf("make WireGuard key: %w", err)
	}
	p.clamp()
	return p, nil
}

// PrivateFromBytes takes 32 raw bytes, as kept in sealed state.
func PrivateFromBytes(b []byte) (Private, error) {
	var p Private
	if len(b) != Size {
		return p, fmt.Errorf("%w: %d bytes, expected %d", ErrKey, len(b), Size)
	}
	copy(p.b[:], b)
	p.clamp()
	return p, nil
}

// clamp sets the bits that RFC 7748, section 5, fixes.
func (p *Private) clamp() {
	p.b[0] &= 248
	p.b[31] = p.b[31]&127 | 64
}

// Public derives the public key.
func (p Private) Public() Public {
	k, err := ecdh.X25519().NewPrivateKey(p.b[:])
	if err != nil {
		panic("internal error: a 32-byte array is not an X25519 key: " + err.Error())
	}
	var pub Public
	copy(pub.b[:], k.PublicKey().Bytes())
	return pub
}

// Reveal returns the 32 raw bytes. Only two callers may want them: the tunnel, which hands them to WireGuard, and the
// state, which seals them.
func (p Private) Reveal() []byte { return append([]byte(nil), p.b[:]...) }

// IsZero reports whether p was never set.
func (p Private) IsZero() bool {
	var acc byte
	for _, b := range p.b {
		acc |= b
	}
	return acc == 0
}

// Format redacts under every verb, so that a key inside a printed struct stays secret.
func (Private) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalText refuses: a private key has no text form.
func (Private) MarshalText() ([]byte, error) {
	return nil, errors.New("a private key has no text form")
}

const redacted = "[private key]"
