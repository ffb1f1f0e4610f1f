package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func testToken(t testing.TB) JoinToken {
	t.Helper()
	td, err := ParseTrustDomain("settler.example")
	if err != nil {
		t.Fatal(err)
	}
	tok, err := NewJoinToken([16]byte{1, 2}, [32]byte{3, 4}, [32]byte{5, 6}, td)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func isTokenError(err error) bool {
	return errors.Is(err, ErrTokenForeign) || errors.Is(err, ErrTokenTruncated) || errors.Is(err, ErrTokenDamaged) || errors.Is(err, ErrTokenVersion)
}

func TestJoinTokenText(t *testing.T) {
	tok := testToken(t)
	text := tok.Reveal()
	got, err := ParseJoinToken(" " + text + "\n")
	if err != nil || got.ID != tok.ID || got.Pin != tok.Pin || got.TrustDomain != tok.TrustDomain || got.SecretHash() != tok.SecretHash() {
		t.Fatalf("%v", err)
	}
	for n := len(JoinTokenPrefix); n < len(text); n++ {
		if _, err := ParseJoinToken(text[:n]); err != ErrTokenTruncated {
			t.Errorf("cut to %d of %d: %v", n, len(text), err)
		}
	}
	for i := len(JoinTokenPrefix); i < len(text); i++ {
		for _, c := range "aB3-_!=" {
			typo := text[:i] + string(c) + text[i+1:]
			if typo == text {
				continue
			}
			_, err := ParseJoinToken(typo)
			if !isTokenError(err) {
				t.Fatalf("typo at %d: %v", i, err)
			}
			if strings.Contains(err.Error(), typo[5:20]) {
				t.Fatal("the error repeats the token")
			}
		}
	}
	for text, want := range map[string]error{
		"": ErrTokenForeign, "hello": ErrTokenForeign, "SGT1_" + text[5:]: ErrTokenForeign, "tskey-auth-abc": ErrTokenForeign,
		text + "AAAA": ErrTokenDamaged, text[:50] + "\n" + text[50:]: ErrTokenDamaged, text + text: ErrTokenDamaged,
		"sgt1_" + strings.Repeat("A", 1<<20): ErrTokenDamaged, "sgt1_Ag": ErrTokenVersion,
	} {
		if _, err := ParseJoinToken(text); err != want {
			t.Errorf("%.30q: got %v, want %v", text, err, want)
		}
	}
}

func TestJoinTokenDoesNotPrint(t *testing.T) {
	tok := testToken(t)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q", "%d"} {
		if s := fmt.Sprintf(verb, tok) + fmt.Sprintf(verb, struct{ T JoinToken }{tok}); strings.Contains(s, "3") || !strings.Contains(s, "[join token]") {
			t.Errorf("%s prints %s", verb, s)
		}
	}
	if _, err := json.Marshal(tok); err == nil {
		t.Error("it encodes")
	}
}

func FuzzParseJoinToken(f *testing.F) {
	f.Add(testToken(f).Reveal())
	f.Add("sgt1_")
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := ParseJoinToken(text)
		if err != nil {
			if !isTokenError(err) {
				t.Errorf("not a plain error: %v", err)
			}
			return
		}
		if tok.Reveal() != strings.TrimSpace(text) {
			t.Error("two texts for one token")
		}
	})
}
