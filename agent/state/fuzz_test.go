package state

import (
	"testing"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
)

// FuzzParse feeds what a sealed file could hold if another version, or an attacker with the key, had written it.
func FuzzParse(f *testing.F) {
	td, err := identity.ParseTrustDomain("settler.example")
	if err != nil {
		f.Fatal(err)
	}
	draft, err := NewDraft(td, "api-1", []string{"coord:7443"})
	if err != nil {
		f.Fatal(err)
	}
	b, err := draft.marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"db-1":["192.0.2.7:51820"]}`))
	f.Add([]byte("down"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if id, err := parseIdentity(b); err == nil {
			again, err := id.marshal()
			if err != nil {
				t.Fatalf("what was read cannot be written: %v", err)
			}
			if _, err := parseIdentity(again); err != nil {
				t.Errorf("what was written cannot be read: %v", err)
			}
		}
		_, _ = parseHints(b)
	})
}

// FuzzOpen feeds whole files: no bytes but those that were sealed may open.
func FuzzOpen(f *testing.F) {
	k, err := key.NewStateKey()
	if err != nil {
		f.Fatal(err)
	}
	sealed, err := k.Seal(fileIdentity, []byte("secret"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed)
	f.Add([]byte("signet-sealed-1\n"))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if plain, err := k.Open(fileIdentity, b); err == nil && (string(b) != string(sealed) || string(plain) != "secret") {
			t.Errorf("%d foreign bytes opened", len(b))
		}
	})
}
