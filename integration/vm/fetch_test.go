package vm

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestKernelNames(t *testing.T) {
	const names = `linux-image-6.1.0-47-cloud-amd64
linux-image-6.1.0-47-cloud-amd64-unsigned
linux-image-6.1.0-47-cloud-amd64-dbg
linux-image-6.1.0-47-rt-amd64
linux-image-6.1-cloud-amd64
linux-image-6.12.117+deb12-cloud-amd64
linux-image-6.1.0-50-cloud-amd64
`
	if got := strings.Join(kernelNames(names, "6.1"), " "); got != "linux-image-6.1.0-47-cloud-amd64 linux-image-6.1.0-50-cloud-amd64" {
		t.Errorf("6.1: %s", got)
	}
	if got := strings.Join(kernelNames(names, "6.12"), " "); got != "linux-image-6.12.117+deb12-cloud-amd64" {
		t.Errorf("6.12: %s", got)
	}
}

func TestParseStanzas(t *testing.T) {
	sum := strings.Repeat("ab", 32)
	text := "Package: a\nVersion: 1:2-3\nDepends: x\nDescription: words\n Package: not this\nSHA256: " + sum + "\n\n" +
		"Package: unchecked\nVersion: 1\n\nPackage: c\nSHA256: " + sum + "\nVersion: 4\n"
	want := []archived{{"a", "1:2-3", sum}, {"c", "4", sum}}
	if got := parseStanzas([]byte(text)); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := parseStanzas(nil); got != nil {
		t.Errorf("of nothing: %v", got)
	}
}

func TestVersionAfter(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{{"6.1.192-2", "6.1.99-1", true}, {"6.1.99-1", "6.1.192-2", false}, {"1", "1", false}, {"6.12.9~rc1-1", "6.12.9-1", false}} {
		if got, err := versionAfter(t.Context(), c.a, c.b); err != nil || got != c.want {
			t.Errorf("%s after %s: %v, %v", c.a, c.b, got, err)
		}
	}
}

func TestFetchRefuses(t *testing.T) {
	for _, series := range []string{"", "6", "6.1.0", "../6.1", "6.1 ", "*"} {
		if _, err := Fetch(t.Context(), t.TempDir(), series); err == nil || !strings.Contains(err.Error(), "two numbers") {
			t.Errorf("series %q: %v", series, err)
		}
	}
	if _, err := newest(t.Context(), "0.1"); !errors.Is(err, ErrNoKernel) {
		t.Errorf("a series that nobody has: %v", err)
	}
}

// TestDownloadTrustsNoCache: what is in the cache is compared with the archive's sum before it is used.
func TestDownloadTrustsNoCache(t *testing.T) {
	cache := t.TempDir()
	deb := filepath.Join(cache, "no-such-package_1%3a2_amd64.deb")
	write(t, deb, "abc")
	p := archived{"no-such-package", "1:2", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
	if got, err := download(t.Context(), cache, p); got != deb || err != nil {
		t.Errorf("a good package: %q, %v", got, err)
	}
	write(t, deb, "abcd")
	if err := checkSum(deb, p.sha256); !errors.Is(err, errSum) {
		t.Errorf("a changed package: %v", err)
	}
	if got, err := download(t.Context(), cache, p); err == nil {
		t.Errorf("a changed package was taken: %s", got)
	}
	if _, err := os.Stat(deb); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a changed package is still there: %v", err)
	}
}

func TestPrune(t *testing.T) {
	cache := t.TempDir()
	for _, name := range []string{
		"linux-image-6.1.0-1-cloud-amd64_1_amd64.deb", "linux-image-6.1.0-1-cloud-amd64_1_amd64/boot/x",
		"linux-image-6.1.0-2-cloud-amd64_2_amd64.deb", "linux-image-6.1.0-2-cloud-amd64_2_amd64/boot/x",
		"linux-image-6.12.1-cloud-amd64_1_amd64.deb", "lock",
	} {
		write(t, filepath.Join(cache, name), "")
	}
	if err := prune(cache, "6.1", "linux-image-6.1.0-2-cloud-amd64_2_amd64.deb"); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(cache)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range left {
		names = append(names, e.Name())
	}
	want := []string{"linux-image-6.1.0-2-cloud-amd64_2_amd64", "linux-image-6.1.0-2-cloud-amd64_2_amd64.deb", "linux-image-6.12.1-cloud-amd64_1_amd64.deb", "lock"}
	if !slices.Equal(names, want) {
		t.Errorf("left: %v, want %v", names, want)
	}
}

func TestKernelIn(t *testing.T) {
	p := archived{name: "linux-image-6.1.0-1-cloud-amd64", version: "6.1.5-1"}
	for _, lib := range []string{"lib", "usr/lib"} {
		dir := t.TempDir()
		if k, err := kernelIn(dir, p); err == nil {
			t.Errorf("an empty package: %v", k)
		}
		write(t, filepath.Join(dir, "boot/vmlinuz-6.1.0-1-cloud-amd64"), "")
		if k, err := kernelIn(dir, p); err == nil {
			t.Errorf("a package without modules: %v", k)
		}
		write(t, filepath.Join(dir, lib, "modules/6.1.0-1-cloud-amd64/modules.builtin"), "")
		k, err := kernelIn(dir, p)
		want := Kernel{
			Release: "6.1.0-1-cloud-amd64", Version: "6.1.5-1",
			Image:   filepath.Join(dir, "boot/vmlinuz-6.1.0-1-cloud-amd64"),
			Modules: filepath.Join(dir, lib, "modules/6.1.0-1-cloud-amd64"),
		}
		if err != nil || k != want {
			t.Errorf("%s: %v, %v, want %v", lib, k, err, want)
		}
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
