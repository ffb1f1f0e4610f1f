package store_test

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/coordinator/store/storetest"
)

// childDir makes this test binary the child of TestKillNine: it writes until it is killed.
const childDir = "SIGNET_STORE_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		writeForever(dir)
	}
	goleak.VerifyTestMain(m)
}

func open(t *testing.T, dir string) *store.SQLite {
	t.Helper()
	s, err := store.OpenSQLite(context.Background(), dir)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestSQLite(t *testing.T) {
	storetest.Run(t, func() storetest.Open {
		dirs := map[string]string{} // by test and name
		return func(t *testing.T, name string) store.Store {
			k := t.Name() + "/" + name
			if dirs[k] == "" {
				dirs[k] = t.TempDir()
			}
			return open(t, dirs[k])
		}
	}())
}

func TestModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	s := open(t, dir)
	if _, err := s.Update(context.Background(), func(store.Tx) error { return nil }); err != nil {
		t.Fatal(err)
	}
	want := map[string]os.FileMode{".": 0o700, "signet.db": 0o600, "signet.db-wal": 0o600, "signet.db-shm": 0o600, "signet.db.lock": 0o600}
	for name, mode := range want {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v %v, want %v", name, info, err, mode)
		}
	}
	shared := filepath.Join(t.TempDir(), "shared")
	if err := os.Mkdir(shared, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(shared, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := store.OpenSQLite(context.Background(), shared); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a folder that others may write to: %v", err)
	}
}

func TestSecondProcessIsRefused(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	if _, err := store.OpenSQLite(context.Background(), dir); !errors.Is(err, store.ErrLocked) {
		t.Errorf("got %v, want ErrLocked", err)
	}
}

func TestNewerSchemaIsRefused(t *testing.T) {
	dir := t.TempDir()
	open(t, dir).Close()
	raw(t, dir, "INSERT INTO goose_db_version (version_id, is_applied) VALUES (99999, 1)")
	_, err := store.OpenSQLite(context.Background(), dir)
	if !errors.Is(err, store.ErrNewerSchema) || !strings.Contains(err.Error(), "99999") {
		t.Errorf("got %v, want ErrNewerSchema that names the version", err)
	}
}

func TestDamageIsNamed(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"not a database":   func([]byte) []byte { return []byte(strings.Repeat("this is a text file\n", 300)) },
		"page overwritten": func(b []byte) []byte { return append(b[:4096], append(make([]byte, 3*4096), b[4*4096:]...)...) },
		"cut":              func(b []byte) []byte { return b[:5*4096] },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			open(t, dir).Close()
			path := filepath.Join(dir, store.FileName)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, damage(b), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = store.OpenSQLite(context.Background(), dir)
			if !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, want ErrCorrupt that names %s", err, path)
			}
		})
	}
}

func raw(t *testing.T, dir, statement string) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, store.FileName))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(statement); err != nil {
		t.Fatal(err)
	}
}

func TestTamperedLogsAreFound(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, statement := range []string{
		"UPDATE audit SET who = 'eve' WHERE seq = 2",
		"UPDATE audit SET detail = object || detail, object = '' WHERE seq = 2",
		"UPDATE audit SET time = time + 1 WHERE seq = 3",
		"DELETE FROM audit WHERE seq = 2",
		"DELETE FROM audit WHERE seq = 3",
		"DELETE FROM audit",
		"UPDATE audit SET hash = (SELECT hash FROM audit WHERE seq = 1) WHERE seq = 3",
		"UPDATE issuance SET id = 'spiffe://x.example/app/b' WHERE seq = 1",
		"UPDATE issuance SET not_after = not_after + 1 WHERE seq = 3",
		"DELETE FROM issuance WHERE seq = 3",
	} {
		dir := t.TempDir()
		s := open(t, dir)
		for i := range 3 {
			if _, err := s.Update(context.Background(), func(tx store.Tx) error {
				_, err := tx.AppendAudit(store.Audit{Time: at, Who: "ada", What: "node.approve", Object: "api-1", Outcome: "ok", Detail: "d"})
				_, ierr := tx.AppendIssuance(store.Issuance{Serial: strconv.Itoa(i), ID: "spiffe://x.example/app/a", NotAfter: at, Time: at})
				return errors.Join(err, ierr)
			}); err != nil {
				t.Fatal(err)
			}
		}
		s.Close()
		raw(t, dir, statement)
		s = open(t, dir)
		_, err := store.VerifyAudit(context.Background(), s)
		_, ierr := store.VerifyIssuance(context.Background(), s)
		if tampered := strings.Contains(statement, "audit"); errors.Is(err, store.ErrTampered) != tampered || errors.Is(ierr, store.ErrTampered) == tampered {
			t.Errorf("%s: audit %v, issuance %v", statement, err, ierr)
		}
	}
}

// TestNumbersAreNeverReused drives random names, failures, restarts and jumps against a map.
func TestNumbersAreNeverReused(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			rt.Fatal(err)
		}
		s, err := store.OpenSQLite(context.Background(), dir)
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { s.Close() }()
		known, owner := map[string]uint32{}, map[uint32]string{}
		for range rapid.IntRange(1, 12).Draw(rt, "steps") {
			name := rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f", "g"}).Draw(rt, "name")
			switch action := rapid.IntRange(0, 9).Draw(rt, "action"); {
			case action == 0:
				s.Close()
				if s, err = store.OpenSQLite(context.Background(), dir); err != nil {
					rt.Fatal(err)
				}
			case action == 1:
				_, _ = s.Update(context.Background(), func(tx store.Tx) error {
					_, _ = tx.NumberFor(name)
					return errors.New("changed my mind")
				})
			default:
				var n uint32
				if _, err := s.Update(context.Background(), func(tx store.Tx) (err error) {
					if action == 2 {
						if _, err := tx.Advance(store.CounterNumber, uint64(rapid.IntRange(0, 1000).Draw(rt, "jump"))); err != nil {
							return err
						}
					}
					n, err = tx.NumberFor(name)
					return err
				}); err != nil {
					rt.Fatal(err)
				}
				if had, ok := known[name]; ok && had != n || owner[n] != "" && owner[n] != name || n < 256 {
					rt.Fatalf("%s got %d; had %d; %d belongs to %q", name, n, had, n, owner[n])
				}
				known[name], owner[n] = n, name
			}
		}
	})
}

// writeForever prints the revision and value of each acknowledged write. Several writers make batches.
func writeForever(dir string) {
	s, err := store.OpenSQLite(context.Background(), dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	lines := make(chan string)
	for range 4 {
		go func() {
			for {
				var line store.Audit
				rev, err := s.Update(context.Background(), func(tx store.Tx) (err error) {
					line, err = tx.AppendAudit(store.Audit{Who: "child", What: "write", Object: strings.Repeat("x", rand.IntN(3000))})
					return err
				})
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				lines <- fmt.Sprintf("%d %d %x\n", rev, line.Seq, line.Hash)
			}
		}()
	}
	for l := range lines {
		os.Stdout.WriteString(l)
	}
}

// TestKillNine kills a writing process at random points and looks for every write that it had acknowledged.
func TestKillNine(t *testing.T) {
	rounds := 100
	if testing.Short() {
		rounds = 5
	}
	dir := t.TempDir()
	var total int
	for range rounds {
		total += killOnce(t, dir)
		if t.Failed() {
			return
		}
	}
	t.Logf("%d rounds, %d acknowledged writes, none lost", rounds, total)
}

func killOnce(t *testing.T, dir string) (acknowledged int) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	seen := map[uint64]string{}
	var last uint64
	scan := bufio.NewScanner(out)
	var killer *time.Timer
	for scan.Scan() {
		if killer == nil { // from the first write on, so that a slow start kills nothing before
			killer = time.AfterFunc(time.Duration(rand.IntN(30_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
		}
		var rev, seq uint64
		var hash string
		if n, _ := fmt.Sscanf(scan.Text(), "%d %d %s", &rev, &seq, &hash); n == 3 && len(hash) == 64 {
			seen[seq], last = hash, max(last, rev)
		}
	}
	if killer == nil {
		t.Fatal("the child wrote nothing")
	}
	killer.Stop()
	_ = cmd.Wait() // killed: its exit status says so
	s, err := store.OpenSQLite(context.Background(), dir)
	if err != nil {
		t.Fatalf("open after kill: %v", err)
	}
	defer s.Close()
	if s.Revision() < last {
		t.Errorf("revision %d, acknowledged %d", s.Revision(), last)
	}
	head, err := store.VerifyAudit(context.Background(), s)
	if err != nil || head.Lines != s.Revision() {
		t.Errorf("audit log: %d lines, revision %d, %v", head.Lines, s.Revision(), err)
	}
	if err := s.View(context.Background(), func(tx store.Tx) error {
		lines, err := tx.Audits(0, 1<<30)
		for _, l := range lines {
			if want := seen[l.Seq]; want != "" && want != fmt.Sprintf("%x", l.Hash) {
				t.Errorf("line %d is not what was acknowledged", l.Seq)
			}
			if seen[l.Seq] != "" {
				acknowledged++
			}
			delete(seen, l.Seq)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if len(seen) > 0 {
		t.Errorf("%d acknowledged writes are lost", len(seen))
	}
	return acknowledged
}

func BenchmarkUpdateParallel(b *testing.B) {
	s, err := store.OpenSQLite(context.Background(), b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	b.SetParallelism(64)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := s.Update(context.Background(), func(tx store.Tx) error {
				_, err := tx.AppendAudit(store.Audit{Who: "bench"})
				return err
			}); err != nil {
				b.Error(err)
			}
		}
	})
}
