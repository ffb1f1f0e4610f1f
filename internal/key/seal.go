package key

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// ErrSealed is returned when sealed bytes do not open: another key, a changed byte or a truncation. AES-GCM cannot
// tell these apart.
var ErrSealed = errors.New("sealed state does not open")

// sealMagic starts every sealed blob, so that foreign bytes are named as such; it is authenticated with the rest.
const sealMagic = "signet-sealed-1\n"

// StateKey seals state at rest with AES-256-GCM (NIST SP 800-38D). A random 96-bit nonce is drawn for each Seal; a
// state file is written far fewer than 2^32 times, the bound for random nonces.
type StateKey struct {
	_ [0]func()
	b [32]byte
}

// NewStateKey draws a key from the system's random source.
func NewStateKey() (StateKey, error) {
	var k StateKey
	if _, err := io.ReadFull(rand.Reader, k.b[:]); err != nil {
		return k, fmt.Errorf("make state key: %w", err)
	}
	return k, nil
}

// LoadOrCreateStateKey reads the key file, or makes it with mode 0600 when it does not exist. A file that others may
// read is refused: it would protect nothing.
func LoadOrCreateStateKey(path string) (StateKey, error) {
	k, err := LoadStateKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	if k, err = NewStateKey(); err != nil {
		return k, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return StateKey{}, fmt.Errorf("make folder of key file: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return StateKey{}, fmt.Errorf("create key file: %w", err)
	}
	_, werr := io.WriteString(f, base64.StdEncoding.EncodeToString(k.b[:])+"\n")
	if err := errors.Join(werr, f.Sync(), f.Close()); err != nil {
		return StateKey{}, fmt.Errorf("write key file %s: %w", path, err)
	}
	return k, nil
}

// LoadStateKey reads a key file made by LoadOrCreateStateKey.
func LoadStateKey(path string) (StateKey, error) {
	var k StateKey
	f, err := os.Open(path)
	if err != nil {
		return k, fmt.Errorf("open key file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return k, fmt.Errorf("read key file: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return k, fmt.Errorf("key file %s has mode %v, expected a regular file with 0600: run chmod 600 %s", path, info.Mode(), path)
	}
	text, err := io.ReadAll(io.LimitReader(f, 128))
	if err != nil {
		return k, fmt.Errorf("read key file: %w", err)
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(raw) != len(k.b) {
		return k, fmt.Errorf("key file %s does not hold a state key of %d bytes in base64", path, len(k.b))
	}
	copy(k.b[:], raw)
	return k, nil
}

// Seal encrypts plain. name binds the blob to its purpose: it opens only under the same name, so that one sealed file
// cannot be put in another's place.
func (k StateKey) Seal(name string, plain []byte) ([]byte, error) {
	aead := k.aead()
	nonce := make([]byte, aead.NonceSize())
	if _, err := io.ReadFull(rand.Reader, nonce); err != nil {
		return nil, fmt.Errorf("seal %s: %w", name, err)
	}
	out := append([]byte(sealMagic), nonce...)
	return aead.Seal(out, nonce, plain, []byte(sealMagic+name)), nil
}

// Open decrypts what Seal made under the same name.
func (k StateKey) Open(name string, sealed []byte) ([]byte, error) {
	aead := k.aead()
	rest, ok := strings.CutPrefix(string(sealed), sealMagic)
	if !ok || len(rest) < aead.NonceSize()+aead.Overhead() {
		return nil, fmt.Errorf("%w: %s is not sealed state or was cut short", ErrSealed, name)
	}
	nonce, box := []byte(rest[:aead.NonceSize()]), []byte(rest[aead.NonceSize():])
	plain, err := aead.Open(nil, nonce, box, []byte(sealMagic+name))
	if err != nil {
		return nil, fmt.Errorf("%w: %s was changed or sealed with another key", ErrSealed, name)
	}
	return plain, nil
}

// Format redacts under every verb.
func (StateKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

func (k StateKey) aead() cipher.AEAD {
	block, err := aes.NewCipher(k.b[:])
	if err != nil {
		panic("internal error: 32 bytes are not an AES-256 key: " + err.Error())
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic("internal error: AES without GCM: " + err.Error())
	}
	return aead
}
