package key_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-overlay/signet/internal/key"
)

func newPrivate(t *testing.T) key.Private {
	t.Helper()
	p, err := key.NewPrivate()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func newState(t *testing.T) key.StateKey {
	t.Helper()
	k, err := key.NewStateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestPublicForms(t *testing.T) {
	p := newPrivate(t).Public()
	fromText, err := key.ParsePublic(p.String())
	if err != nil || fromText != p {
		t.Errorf("text: %v", err)
	}
	fromBytes, err := key.PublicFromBytes(p.Bytes())
	if err != nil || fromBytes != p || len(p.Hex()) != 64 || len(p.Short()) != 16 {
		t.Errorf("bytes: %v", err)
	}
	js, err := json.Marshal(p)
	var back key.Public
	if err != nil || json.Unmarshal(js, &back) != nil || back != p {
		t.Errorf("JSON: %s %v", js, err)
	}
	zero := "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	for _, s := range []string{"", "x", zero, p.String()[:43], p.String() + "=", " " + p.String(), p.Hex()} {
		if _, err := key.ParsePublic(s); !errors.Is(err, key.ErrKey) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// TestKnownAnswer is the first pair of RFC 7748, section 6.1.
func TestKnownAnswer(t *testing.T) {
	raw := []byte("\x77\x07\x6d\x0a\x73\x18\xa5\x7d\x3c\x16\xc1\x72\x51\xb2\x66\x45\xdf\x4c\x2f\x87\xeb\xc0\x99\x2a\xb1\x77\xfb\xa5\x1d\xb9\x2c\x2a")
	p, err := key.PrivateFromBytes(raw)
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Public().Hex(); got != "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a" {
		t.Errorf("public key %s", got)
	}
	if again, err := key.PrivateFromBytes(p.Reveal()); err != nil || again.Public() != p.Public() {
		t.Errorf("clamping twice changes the key: %v", err)
	}
	if _, err := key.PrivateFromBytes(raw[:31]); !errors.Is(err, key.ErrKey) {
		t.Errorf("31 bytes: %v", err)
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	p, k := newPrivate(t), newState(t)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q", "%d"} {
		s := fmt.Sprintf(verb, p) + fmt.Sprintf(verb, k) + fmt.Sprintf(verb, struct{ P key.Private }{p})
		if strings.Count(s, "[private key]") != 3 || strings.Contains(s, fmt.Sprintf("%x", p.Reveal()[:4])) {
			t.Errorf("%s prints %s", verb, s)
		}
	}
	if _, err := json.Marshal(p); err == nil {
		t.Error("a private key encodes")
	}
	if p.IsZero() || !(key.Private{}).IsZero() {
		t.Error("IsZero")
	}
}

func TestSeal(t *testing.T) {
	k := newState(t)
	plain := []byte("the snapshot")
	sealed, err := k.Seal("snapshot", plain)
	if err != nil || bytes.Contains(sealed, plain) {
		t.Fatalf("%v", err)
	}
	got, err := k.Open("snapshot", sealed)
	if err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("%q %v", got, err)
	}
	if twice, err := k.Seal("snapshot", plain); err != nil || bytes.Equal(twice, sealed) {
		t.Error("the same bytes twice: the nonce does not change")
	}
	if _, err := newState(t).Open("snapshot", sealed); !errors.Is(err, key.ErrSealed) {
		t.Errorf("another key: %v", err)
	}
	if _, err := k.Open("svid", sealed); !errors.Is(err, key.ErrSealed) {
		t.Errorf("another name: %v", err)
	}
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 0x40
		if _, err := k.Open("snapshot", changed); !errors.Is(err, key.ErrSealed) {
			t.Errorf("byte %d changed: %v", i, err)
		}
		if _, err := k.Open("snapshot", sealed[:i]); !errors.Is(err, key.ErrSealed) {
			t.Errorf("cut to %d: %v", i, err)
		}
	}
}

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "etc", "agent.key")
	if _, err := key.LoadStateKey(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	k, err := key.LoadOrCreateStateKey(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	sealed, err := k.Seal("x", []byte("y"))
	if err != nil {
		t.Fatal(err)
	}
	again, err := key.LoadOrCreateStateKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := again.Open("x", sealed); err != nil || string(got) != "y" {
		t.Errorf("%q %v", got, err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := key.LoadOrCreateStateKey(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("readable by others: %v", err)
	}
	for _, text := range []string{"", "hello\n", "AAAA\n", strings.Repeat("A", 500)} {
		bad := filepath.Join(t.TempDir(), "bad.key")
		if err := os.WriteFile(bad, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := key.LoadOrCreateStateKey(bad); err == nil {
			t.Errorf("%.20q was taken for a key", text)
		}
		if after, _ := os.ReadFile(bad); string(after) != text {
			t.Error("a key file that does not parse was overwritten")
		}
	}
}
