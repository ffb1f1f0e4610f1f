package identity

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
)

// JoinTokenPrefix begins every join token, so that people and secret scanners know one when they see it.
const JoinTokenPrefix = "sgt1_"

const (
	joinTokenVersion  = 1
	joinIDSize        = 16
	joinSecretSize    = 32
	joinPinSize       = 32
	joinChecksumSize  = 4
	joinTokenFixed    = 1 + joinIDSize + joinSecretSize + joinPinSize + 1 // then the trust domain and the checksum
	maxJoinTokenBytes = 1 << 10
)

// What is wrong with a join token's text. No error ever repeats the token.
var (
	ErrTokenForeign   = errors.New("this is not a Signet join token: it does not begin with " + JoinTokenPrefix)
	ErrTokenTruncated = errors.New("the join token was cut short: copy it again, whole and on one line")
	ErrTokenDamaged   = errors.New("the join token is damaged: some of its characters were changed; copy it again")
	ErrTokenVersion   = errors.New("the join token was made by a newer Signet: upgrade this host first")
)

// JoinToken is what a new host holds: a secret that the coordinator knows the hash of, and the pin of the root that
// the coordinator must show before it is told the secret. It does not print and cannot be compared with ==.
type JoinToken struct {
	_           [0]func()
	ID          [joinIDSize]byte // names the token in logs and lists; not secret
	Pin         [joinPinSize]byte
	TrustDomain TrustDomain
	secret      [joinSecretSize]byte
}

// NewJoinToken puts a token together. id and secret come from the system's random source.
func NewJoinToken(id [16]byte, secret, pin [32]byte, td TrustDomain) (JoinToken, error) {
	if td.IsZero() {
		return JoinToken{}, fmt.Errorf("make join token: %w: no trust domain", ErrID)
	}
	return JoinToken{ID: id, secret: secret, Pin: pin, TrustDomain: td}, nil
}

// JoinTokenID names the token with that secret: hosts send the secret alone. It is half of the hash that the coordinator
// keeps, and tells nobody the secret.
func JoinTokenID(secret [joinSecretSize]byte) [joinIDSize]byte {
	sum := sha256.Sum256(secret[:])
	return [joinIDSize]byte(sum[:joinIDSize])
}

// Secret is what a host proves the token with. It goes only to a coordinator that has shown the pinned root.
func (t JoinToken) Secret() []byte { return append([]byte(nil), t.secret[:]...) }

// Reveal writes the token's text. Only the command that hands it to the operator may want it.
func (t JoinToken) Reveal() string {
	b := append([]byte{joinTokenVersion}, t.ID[:]...)
	b = append(b, t.secret[:]...)
	b = append(b, t.Pin[:]...)
	b = append(b, byte(len(t.TrustDomain.name)))
	b = append(b, t.TrustDomain.name...)
	sum := sha256.Sum256(b)
	b = append(b, sum[:joinChecksumSize]...)
	return JoinTokenPrefix + base64.RawURLEncoding.EncodeToString(b)
}

// ParseJoinToken reads a token's text; white space around it is ignored. The checksum catches mistakes, not forgery.
func ParseJoinToken(text string) (JoinToken, error) {
	body, ok := strings.CutPrefix(strings.TrimSpace(text), JoinTokenPrefix)
	if !ok {
		return JoinToken{}, ErrTokenForeign
	}
	if len(body) > maxJoinTokenBytes || strings.ContainsAny(body, "\r\n") {
		return JoinToken{}, ErrTokenDamaged
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil {
		// A cut can leave a last group that no encoder writes; anything wrong before that is a change.
		if whole := len(body) / 4 * 4; tooShort(body[:whole]) {
			return JoinToken{}, ErrTokenTruncated
		}
		return JoinToken{}, ErrTokenDamaged
	}
	if len(b) > 0 && b[0] != joinTokenVersion {
		return JoinToken{}, ErrTokenVersion
	}
	if len(b) < joinTokenFixed {
		return JoinToken{}, ErrTokenTruncated
	}
	tdEnd := joinTokenFixed + int(b[joinTokenFixed-1])
	switch want := tdEnd + joinChecksumSize; {
	case len(b) < want:
		return JoinToken{}, ErrTokenTruncated
	case len(b) > want:
		return JoinToken{}, ErrTokenDamaged
	}
	sum := sha256.Sum256(b[:tdEnd])
	if subtle.ConstantTimeCompare(sum[:joinChecksumSize], b[tdEnd:]) != 1 {
		return JoinToken{}, ErrTokenDamaged
	}
	td, err := ParseTrustDomain(string(b[joinTokenFixed:tdEnd]))
	if err != nil {
		return JoinToken{}, ErrTokenDamaged
	}
	t := JoinToken{TrustDomain: td}
	copy(t.ID[:], b[1:])
	copy(t.secret[:], b[1+joinIDSize:])
	copy(t.Pin[:], b[1+joinIDSize+joinSecretSize:])
	return t, nil
}

// tooShort reports whether whole base64 groups decode to the start of a token that announces more than is there.
func tooShort(groups string) bool {
	b, err := base64.RawURLEncoding.DecodeString(groups)
	if err != nil || len(b) > 0 && b[0] != joinTokenVersion {
		return false
	}
	return len(b) < joinTokenFixed || len(b) < joinTokenFixed+int(b[joinTokenFixed-1])+joinChecksumSize
}

// SecretHash is what the coordinator keeps: the SHA-256 of the secret. The secret has 256 random bits, so that a slow
// hash would add nothing.
func (t JoinToken) SecretHash() [32]byte { return sha256.Sum256(t.secret[:]) }

// Format redacts under every verb.
func (JoinToken) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[join token]") }

// MarshalText refuses, so that a token inside a logged or encoded struct stays secret.
func (JoinToken) MarshalText() ([]byte, error) {
	return nil, errors.New("a join token has no text form but Reveal")
}
