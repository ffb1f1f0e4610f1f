package policy

import (
	"errors"
	"strings"
	"testing"
)

func TestParseSelector(t *testing.T) {
	for _, text := range []string{
		"unit:api.service", "unit:a@b.service", "unit:run-1.scope", "cgroup:/a", "cgroup:/system.slice/a.service", "cgroup:/a:b", "uid:0", "uid:4294967294",
		"container:app=web", "container:com.docker.compose.service=api", "container:a=b=c", "container:a=b c", "container:name=größe",
		"interface:veth0", "interface:a", "interface:abcdefghijklmno", "interface:br-1.100", "interface:veth@x",
	} {
		s, err := ParseSelector(text)
		if err != nil || s.String() != text {
			t.Errorf("%q: got %q, %v", text, s, err)
		}
		var back Selector
		if b, err := s.MarshalText(); err != nil || back.UnmarshalText(b) != nil || back != s {
			t.Errorf("%q reads back as %q, %v", text, back, err)
		}
	}
}

func TestParseSelectorRefuses(t *testing.T) {
	for _, text := range []string{
		"", "unit", "unit:", ":x", "Unit:a.service", "pod:a",
		"unit:api", "unit:../a.service", "unit:a/b.service", "unit:.service", "unit:a.service\n", "unit:a\x00.service", "unit:" + strings.Repeat("a", 300) + ".service",
		"cgroup:a", "cgroup:/", "cgroup:/a/", "cgroup:/a/../b", "cgroup:/..", "cgroup:/./a", "cgroup://a", "cgroup:/a\n", "cgroup:/a\x00",
		"uid:-1", "uid:+1", "uid:01", "uid:4294967295", "uid:4294967296", "uid:root", "uid:0x1", "uid: 1",
		"container:", "container:a", "container:=b", "container:a=", "container:a=b\n", "container:a=\x00", "container:a=\xff", "container:a=" + strings.Repeat("b", 600),
		"interface:", "interface:lo", "interface:.", "interface:..", "interface:a/b", "interface:a b", "interface:a:1", "interface:a%d", "interface:abcdefghijklmnop", "interface:vé",
	} {
		s, err := ParseSelector(text)
		if !errors.Is(err, ErrSelector) || errors.Is(err, ErrNotBuilt) || s != (Selector{}) {
			t.Errorf("%q: got %q, %v", text, s, err)
		}
	}
	for _, text := range []string{"user:a", "gid:1", "path:/a", "sha256:00"} {
		if s, err := ParseSelector(text); !errors.Is(err, ErrSelector) || !errors.Is(err, ErrNotBuilt) || s != (Selector{}) {
			t.Errorf("%q: got %q, %v", text, s, err)
		}
	}
}

func TestCheckSelectors(t *testing.T) {
	for list, want := range map[string]bool{
		"": false, "unit:a.service": true, "unit:a.service uid:1": true, "container:a=b uid:1": true, "container:a=b container:c=d": true,
		"interface:veth0": true, "interface:veth0 uid:1": false, "container:a=b interface:veth0": false, "interface:veth0 interface:veth1": false,
	} {
		var sels []Selector
		for _, text := range strings.Fields(list) {
			s, err := ParseSelector(text)
			if err != nil {
				t.Fatal(err)
			}
			sels = append(sels, s)
		}
		if err := CheckSelectors(sels); (err == nil) != want || err != nil && !errors.Is(err, ErrSelector) {
			t.Errorf("%q: %v", list, err)
		}
	}
}

func FuzzParseSelector(f *testing.F) {
	f.Add("unit:a.service")
	f.Add("cgroup:/a/b")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseSelector(text)
		if err == nil && s.String() != text {
			t.Fatalf("%q has a second spelling %q", text, s)
		}
	})
}
