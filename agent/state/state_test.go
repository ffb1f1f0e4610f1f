package state_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/agent/session/sessiontest"
	"github.com/signet-overlay/signet/agent/state"
	"github.com/signet-overlay/signet/internal/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type paths struct{ dir, key string }

func newPaths(t *testing.T) paths {
	t.Helper()
	base := t.TempDir()
	return paths{filepath.Join(base, "state"), filepath.Join(base, "etc", "agent.key")}
}

func (p paths) open(t *testing.T) *state.Dir {
	t.Helper()
	d, err := state.Open(p.dir, p.key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func enrolled(t testing.TB) state.Identity {
	t.Helper()
	pki := sessiontest.NewPKI(t)
	id, err := state.NewDraft(pki.TD, "api-1", []string{"coord:7443"})
	if err != nil {
		t.Fatal(err)
	}
	chain := pki.Issue(t, id.ID(), &id.Key.PublicKey, time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
	if id.Chain, err = identity.ParseChain(chain); err != nil {
		t.Fatal(err)
	}
	id.Bundle = pki.Bundle
	id.Overlay4, id.Overlay6 = netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("fd5e::/48")
	return id
}

func TestIdentitySurvives(t *testing.T) {
	p := newPaths(t)
	d := p.open(t)
	if _, err := d.LoadIdentity(); !errors.Is(err, state.ErrNone) {
		t.Fatalf("a fresh directory gave %v", err)
	}
	want := enrolled(t)
	next, err := state.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	want.NextKey = next
	if err := d.SaveIdentity(want); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := p.open(t).LoadIdentity()
	if err != nil {
		t.Fatal(err)
	}
	if !got.Enrolled() || got.ID() != want.ID() || !got.Key.Equal(want.Key) || !got.NextKey.Equal(next) || got.WireGuard.Public() != want.WireGuard.Public() ||
		got.Bundle.Pin() != want.Bundle.Pin() || got.Overlay4 != want.Overlay4 || len(got.Certificate().Certificate) != 2 {
		t.Error("the identity changed on its way through the disk")
	}
	if s := fmt.Sprintf("%v %+v %#v", got, got, got); strings.Contains(s, "PrivateKey") || !strings.HasPrefix(s, "identity of node api-1") {
		t.Errorf("an identity prints as %q", s)
	}
}

func TestDamagedIdentityIsRefusedByName(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, file string, p paths){
		"0 bytes":   func(t *testing.T, f string, _ paths) { write(t, f, nil) },
		"truncated": func(t *testing.T, f string, _ paths) { write(t, f, read(t, f)[:100]) },
		"foreign":   func(t *testing.T, f string, _ paths) { write(t, f, []byte("{\"hello\": \"world\"}")) },
		"bit flipped": func(t *testing.T, f string, _ paths) {
			b := read(t, f)
			b[len(b)/2] ^= 0x10
			write(t, f, b)
		},
		"missing":     func(t *testing.T, f string, _ paths) { must(t, os.Remove(f)) },
		"wrong owner": func(t *testing.T, f string, _ paths) { must(t, os.Chown(f, 12345, -1)) },
		"wrong mode":  func(t *testing.T, f string, _ paths) { must(t, os.Chmod(f, 0o644)) },
		"symlink": func(t *testing.T, f string, _ paths) {
			must(t, os.Rename(f, f+".real"))
			must(t, os.Symlink(f+".real", f))
		},
		"directory": func(t *testing.T, f string, _ paths) { must(t, os.Remove(f)); must(t, os.Mkdir(f, 0o700)) },
		"another file in its place": func(t *testing.T, f string, p paths) {
			write(t, f, read(t, filepath.Join(p.dir, "snapshot")))
		},
		"another key": func(t *testing.T, _ string, p paths) {
			other := newPaths(t)
			must(t, other.open(t).Close())
			write(t, p.key, read(t, other.key))
		},
	} {
		t.Run(name, func(t *testing.T) {
			if os.Geteuid() != 0 && name == "wrong owner" {
				t.Skip("needs root: asks as another user, or gives files away")
			}
			p := newPaths(t)
			d := p.open(t)
			must(t, d.SaveIdentity(enrolled(t)))
			must(t, d.SaveSnapshot([]byte("snapshot")))
			must(t, d.Close())
			damage(t, filepath.Join(p.dir, "identity"), p)
			_, err := p.open(t).LoadIdentity()
			var problem *state.Problem
			if !errors.As(err, &problem) || !errors.Is(err, state.ErrBroken) {
				t.Fatalf("LoadIdentity gave %v", err)
			}
			if !strings.Contains(err.Error(), filepath.Join(p.dir, "identity")) || !strings.Contains(err.Error(), "enrol this host again") || strings.Contains(err.Error(), "\n") {
				t.Errorf("the error does not name file and remedy in one line: %v", err)
			}
		})
	}
}

func TestOpenRefusesWhatOthersPrepared(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(t *testing.T, p paths)
		says    string
	}{
		"symlink":     {func(t *testing.T, p paths) { must(t, os.Symlink(t.TempDir(), p.dir)) }, "symbolic link"},
		"a file":      {func(t *testing.T, p paths) { write(t, p.dir, []byte("x")) }, "not a directory"},
		"open mode":   {func(t *testing.T, p paths) { must(t, os.Mkdir(p.dir, 0o700)); must(t, os.Chmod(p.dir, 0o755)) }, "chmod 700"},
		"other owner": {func(t *testing.T, p paths) { must(t, os.Mkdir(p.dir, 0o700)); must(t, os.Chown(p.dir, 12345, -1)) }, "belongs to uid 12345"},
		"key file for all": {func(t *testing.T, p paths) {
			must(t, p.open(t).Close())
			must(t, os.Chmod(p.key, 0o644))
		}, "key file"},
		"key file gone": {func(t *testing.T, p paths) {
			d := p.open(t)
			must(t, d.SaveIdentity(enrolled(t)))
			must(t, d.Close())
			must(t, os.Remove(p.key))
		}, "is missing"},
		"in use": {func(t *testing.T, p paths) { p.open(t) }, "in use by another signetd"},
	} {
		t.Run(name, func(t *testing.T) {
			if os.Geteuid() != 0 && name == "other owner" {
				t.Skip("needs root: asks as another user, or gives files away")
			}
			p := newPaths(t)
			c.prepare(t, p)
			if _, err := state.Open(p.dir, p.key); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("Open gave %v", err)
			}
			if name == "key file gone" {
				if _, err := os.Stat(p.key); err == nil {
					t.Error("a new key was made in silence")
				}
			}
		})
	}
}

func TestSnapshotHintsAndSwitch(t *testing.T) {
	p := newPaths(t)
	d := p.open(t)
	if _, err := d.LoadSnapshot(); !errors.Is(err, state.ErrNone) {
		t.Errorf("no snapshot gave %v", err)
	}
	must(t, d.SaveSnapshot([]byte("one")))
	must(t, d.SaveSnapshot([]byte("two")))
	if b, err := d.LoadSnapshot(); err != nil || string(b) != "two" {
		t.Errorf("LoadSnapshot gave %q, %v", b, err)
	}
	want := map[string][]netip.AddrPort{"db-1": {netip.MustParseAddrPort("192.0.2.7:51820")}}
	must(t, d.SaveHints(want))
	if got, err := d.LoadHints(); err != nil || len(got) != 1 || got["db-1"][0] != want["db-1"][0] {
		t.Errorf("LoadHints gave %v, %v", got, err)
	}
	for _, s := range []state.Switch{state.Down, state.Released, state.Up} {
		must(t, d.SaveSwitch(s))
		if got, err := d.LoadSwitch(); err != nil || got != s {
			t.Errorf("LoadSwitch gave %v, %v", got, err)
		}
	}
	write(t, filepath.Join(p.dir, "switch"), []byte("up"))
	if got, err := d.LoadSwitch(); err == nil || got != state.Down {
		t.Errorf("a forged switch gave %v, %v", got, err)
	}
}

func TestLeftoversOfACrashAreRemoved(t *testing.T) {
	p := newPaths(t)
	d := p.open(t)
	must(t, d.SaveSnapshot([]byte("whole")))
	must(t, d.Close())
	tmp := filepath.Join(p.dir, "snapshot.tmp")
	write(t, tmp, []byte("half"))
	if b, err := p.open(t).LoadSnapshot(); err != nil || string(b) != "whole" {
		t.Errorf("LoadSnapshot gave %q, %v", b, err)
	}
	if _, err := os.Stat(tmp); err == nil {
		t.Error("the leftover is still there")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	must(t, os.WriteFile(path, b, 0o600))
}
