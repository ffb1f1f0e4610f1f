package identity

import (
	"errors"
	"strings"
	"testing"
)

func TestParseID(t *testing.T) {
	long := "spiffe://x.example/" + strings.Repeat("a", MaxIDLength-len("spiffe://x.example/"))
	for _, s := range []string{
		"spiffe://settler.example/app/api-server", "spiffe://1.2.3.4/a", "spiffe://xn--a/b", "spiffe://a_b-c.d/A/b.c/-_", "spiffe://x/...", long,
		"spiffe://" + strings.Repeat("a", MaxTrustDomainLength) + "/b",
	} {
		id, err := ParseID(s)
		if err != nil || id.String() != s || id.URL().String() != s {
			t.Errorf("%.60q: %v %v", s, id, err)
		}
		var back ID
		text, err := id.MarshalText()
		if err != nil || back.UnmarshalText(text) != nil || back != id {
			t.Errorf("%.60q does not survive its text form", s)
		}
	}
	for _, s := range []string{
		"", "spiffe:", "spiffe:/x/a", "spiffe://", "spiffe:///a", "spiffe://x", "spiffe://x/", "spiffe://x/a/", "spiffe://x//a", "spiffe://x/./a", "spiffe://x/a/..",
		"SPIFFE://x/a", "Spiffe://x/a", "spiffe://X/a", "spiffe://x/%2e", "spiffe://x%2f/a", "spiffe://u@x/a", "spiffe://x:1/a", "spiffe://x/a?b", "spiffe://x/a#b", "spiffe://x/a?", "spiffe://x/a#",
		"spiffe://x/é", "spiffe://é/a", "spiffe://x/a\x00", "spiffe://x/a\r\n", "spiffe://x/a b", " spiffe://x/a", "http://x/a", long + "a", "spiffe://" + strings.Repeat("a", MaxTrustDomainLength+1) + "/b",
	} {
		if id, err := ParseID(s); !errors.Is(err, ErrID) || !id.IsZero() {
			t.Errorf("%.60q: %v %v", s, id, err)
		}
	}
}

// TestEveryByte tries all bytes in each place against the standard's alphabets.
func TestEveryByte(t *testing.T) {
	const lower, upper = "abcdefghijklmnopqrstuvwxyz0123456789.-_", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	for c := range 256 {
		b := string([]byte{byte(c)})
		if _, err := ParseID("spiffe://a" + b + "a/b"); (err == nil) != (strings.Contains(lower, b) || c == '/') {
			t.Errorf("byte %#x in a trust domain: %v", c, err)
		}
		if _, err := ParseID("spiffe://a/b" + b + "b"); (err == nil) != strings.Contains(lower+upper+"/", b) {
			t.Errorf("byte %#x in a path: %v", c, err)
		}
		if err := ParseName("a" + b + "a"); (err == nil) != strings.Contains(lower+upper, b) {
			t.Errorf("byte %#x in a name: %v", c, err)
		}
		if _, err := ParseZone("a" + b + "a"); (err == nil) != strings.Contains(lower+"-", b) != strings.Contains("._", b) {
			t.Errorf("byte %#x in a zone: %v", c, err)
		}
	}
}

func TestParts(t *testing.T) {
	td, err := ParseTrustDomain("settler.example")
	if err != nil {
		t.Fatal(err)
	}
	id, err := td.ParseShort("app/api-server")
	if err != nil || id.String() != "spiffe://settler.example/app/api-server" || id.Zone().String() != "app" || id.Short() != "app/api-server" || id.NodeName() != "" || id.TrustDomain() != td {
		t.Errorf("%v %v", id, err)
	}
	node, err := td.Node("db-1")
	if err != nil || node.NodeName() != "db-1" || node.Zone() != ReservedZone {
		t.Errorf("%v %v", node, err)
	}
	if td.Coordinator().NodeName() != "" || td.Distribution() == td.Coordinator() {
		t.Error("the coordinator is no node")
	}
	for _, s := range []string{"", "app", "signet/node", "app/", "/a", "app/a/b", "App/a", "a.b/c", "app/-a", "app/" + strings.Repeat("a", 64)} {
		if id, err := td.ParseShort(s); !errors.Is(err, ErrID) {
			t.Errorf("%q: %v %v", s, id, err)
		}
	}
	if _, err := td.Node("a/b"); !errors.Is(err, ErrID) {
		t.Errorf("%v", err)
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"spiffe://x/a", "spiffe://settler.example/signet/node/a", "spiffe://x/%2e", "SPIFFE://x/a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err != nil {
			if !errors.Is(err, ErrID) || !id.IsZero() {
				t.Errorf("%q: %v %v", s, id, err)
			}
			return
		}
		u := id.URL()
		if id.String() != s || u.String() != s || u.Host != id.TrustDomain().String() || u.Path != id.Path() || u.RawQuery+u.Fragment != "" || u.User != nil || len(s) > MaxIDLength {
			t.Errorf("%q reads as %v and as %v", s, id, u)
		}
	})
}
