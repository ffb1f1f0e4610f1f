package attest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func workload(t testing.TB, n identity.Number, selectors ...string) mesh.Workload {
	t.Helper()
	id, err := identity.ParseID(fmt.Sprintf("spiffe://settler.example/app/w%d", n))
	if err != nil {
		t.Fatal(err)
	}
	w := mesh.Workload{ID: id, Number: n}
	for _, s := range selectors {
		sel, err := policy.ParseSelector(s)
		if err != nil {
			t.Fatal(err)
		}
		w.Selectors = append(w.Selectors, sel)
	}
	return w
}

func resolve(root string, workloads []mesh.Workload) Result {
	return NewResolver(Host{Root: root}).Resolve(workloads)
}

func mkdir(t testing.TB, root, path string) uint64 {
	t.Helper()
	full := filepath.Join(root, path)
	if err := os.MkdirAll(full, 0o755); err != nil {
		t.Fatal(err)
	}
	return inode(t, full)
}

func inode(t testing.TB, path string) uint64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

func TestResolve(t *testing.T) {
	root := t.TempDir()
	api := mkdir(t, root, "/system.slice/api.service")
	sub := mkdir(t, root, "/system.slice/api.service/worker")
	mkdir(t, root, "/user.slice/evil.service")
	batch := mkdir(t, root, "/batch")
	must(t, os.Symlink(filepath.Join(root, "batch"), filepath.Join(root, "link")))
	top := inode(t, root)
	for _, c := range []struct {
		name      string
		selectors []string
		want      policy.LocalKey
		why       string
	}{
		{"unit", []string{"unit:api.service"}, policy.LocalKey{Cgroup: api, UID: policy.AnyUID}, ""},
		{"unit and user", []string{"unit:api.service", "uid:1000"}, policy.LocalKey{Cgroup: api, UID: 1000}, ""},
		{"cgroup", []string{"cgroup:/batch"}, policy.LocalKey{Cgroup: batch, UID: policy.AnyUID}, ""},
		{"user alone", []string{"uid:7"}, policy.LocalKey{Cgroup: top, UID: 7}, ""},
		{"the inner of two", []string{"cgroup:/system.slice/api.service/worker", "unit:api.service"}, policy.LocalKey{Cgroup: sub, UID: policy.AnyUID}, ""},
		{"look-alike in a user's slice", []string{"unit:evil.service"}, policy.LocalKey{}, "no cgroup /system.slice/evil.service"},
		{"two places", []string{"cgroup:/batch", "unit:api.service"}, policy.LocalKey{}, "have to be in"},
		{"two users", []string{"uid:1", "uid:2"}, policy.LocalKey{}, "two users"},
		{"not running", []string{"unit:other.service"}, policy.LocalKey{}, "not running"},
		{"through a link", []string{"cgroup:/link"}, policy.LocalKey{}, "cannot be looked at"},
	} {
		res := resolve(root, []mesh.Workload{workload(t, 300, c.selectors...)})
		m := res.Matches[300]
		if c.why == "" && (res.Locals[c.want] != 300 || len(res.Locals) != 1) || c.why != "" && (len(res.Locals) != 0 || !strings.Contains(m.Why, c.why)) {
			t.Errorf("%s: %v, %+v", c.name, res.Locals, m)
		}
	}
}

func TestUnitOfAnotherOwnerNeverMatches(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give directories to another owner")
	}
	root := t.TempDir()
	mkdir(t, root, "/system.slice/api.service/worker")
	must(t, os.Chown(filepath.Join(root, "system.slice/api.service"), 1000, 1000))
	for _, selectors := range [][]string{{"unit:api.service"}, {"unit:api.service", "cgroup:/system.slice/api.service/worker"},
		{"cgroup:/system.slice/api.service/worker", "unit:api.service"}} {
		res := resolve(root, []mesh.Workload{workload(t, 300, selectors...)})
		if len(res.Locals) != 0 || !strings.Contains(res.Matches[300].Why, "belongs to uid 1000") {
			t.Errorf("%v matched: %+v", selectors, res.Matches[300])
		}
	}
}

func TestTwoWorkloadsWithOneKeyGetNothing(t *testing.T) {
	root := t.TempDir()
	mkdir(t, root, "/system.slice/api.service")
	mkdir(t, root, "/batch")
	res := resolve(root, []mesh.Workload{workload(t, 300, "unit:api.service"), workload(t, 301, "cgroup:/system.slice/api.service"), workload(t, 302, "cgroup:/batch")})
	if len(res.Locals) != 1 || len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], "app/w300 and app/w301") {
		t.Errorf("%v, %q", res.Locals, res.Warnings)
	}
	if res.Matches[300].Matched() || res.Matches[301].Matched() || !res.Matches[302].Matched() {
		t.Errorf("%+v", res.Matches)
	}
	res = resolve(root, []mesh.Workload{workload(t, 300, "cgroup:/batch"), workload(t, 301, "uid:5")})
	if len(res.Locals) != 2 || len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], "those that match both get no identity") {
		t.Errorf("overlap: %v, %q", res.Locals, res.Warnings)
	}
}

func TestFindRoot(t *testing.T) {
	all := func(string) bool { return true }
	for want, text := range map[string]string{
		"/sys/fs/cgroup": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
		"/sys/fs/cgroup/unified": "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n" +
			"41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:5 - cgroup2 cgroup2 rw\n",
		"/c g": "41 31 0:38 /sub /a rw - cgroup2 none rw\n42 31 0:38 / /c\\040g rw - cgroup2 none rw\n43 31 0:38 / /longer/path rw - cgroup2 none rw\n",
	} {
		if got, whole, err := findRoot(strings.NewReader(text), all); err != nil || got != want || !whole {
			t.Errorf("found %q (whole %v), %v; expected %q", got, whole, err, want)
		}
	}
	if _, _, err := findRoot(strings.NewReader("30 23 0:26 / / rw - ext4 /dev/sda rw\n"), all); err == nil {
		t.Error("found a root on a host without cgroup v2")
	}
	hidden := "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 none rw\n42 31 0:38 /part /sys/fs/cgroup rw - cgroup2 none rw\n"
	got, whole, err := findRoot(strings.NewReader(hidden), func(path string) bool { return path == "/sys/fs/cgroup" })
	if err != nil || got != "/sys/fs/cgroup" || whole {
		t.Errorf("behind a bind mount: %q (whole %v), %v", got, whole, err)
	}
}

func TestUnitOf(t *testing.T) {
	for path, want := range map[string]string{"/system.slice/api.service/worker": "api.service", "/user.slice/session-1.scope": "session-1.scope", "/batch": "", "": ""} {
		if got := unitOf(path); got != want {
			t.Errorf("%s is %q, expected %q", path, got, want)
		}
	}
}

// TestWatcher uses a plain directory; TestWatcherOnCgroups the real file system.
func TestWatcher(t *testing.T) { watcherSuite(t, t.TempDir()) }

func TestWatcherOnCgroups(t *testing.T) {
	root, _, err := FindRoot()
	if err != nil {
		t.Skipf("needs cgroup v2: %v", err)
	}
	sub := filepath.Join(root, fmt.Sprintf("signet-attest-test-%d", os.Getpid()))
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Skipf("needs a writable cgroup tree: %v", err)
	}
	t.Cleanup(func() {
		for _, d := range []string{"system.slice/api.service", "system.slice", ""} {
			_ = os.Remove(filepath.Join(sub, d))
		}
	})
	watcherSuite(t, sub)
	id := inode(t, sub)
	if got := NewPaths(root).Path(id); got != "/"+filepath.Base(sub) {
		t.Errorf("cgroup %d is at %q", id, got)
	}
}

// TestScanIsRareOnlyWhereAllIsWatched: an idle host looks at its cgroups every few seconds, one that cannot watch them
// each second.
func TestScanIsRareOnlyWhereAllIsWatched(t *testing.T) {
	root := t.TempDir()
	mkdir(t, root, "/system.slice")
	in, err := newInotify()
	must(t, err)
	defer in.close()
	one := []mesh.Workload{workload(t, 300, "unit:api.service"), workload(t, 301, "cgroup:/not/there/yet")}
	if !in.watch(root, one, nil) || scanUnder < 5*time.Second {
		t.Errorf("a watched tree is scanned every %v", scanUnder)
	}
	if in.watch(filepath.Join(root, "gone"), one, nil) {
		t.Error("a root that is not there counts as watched")
	}
	var many []mesh.Workload
	for i := range identity.Number(maxWatches + 1) {
		many = append(many, workload(t, 300+i, fmt.Sprintf("cgroup:/d%d/s", i)))
	}
	if in.watch(root, many, nil) || (*inotify)(nil).watch(root, one, nil) {
		t.Error("what is not watched counts as watched")
	}
}

func watcherSuite(t *testing.T, root string) {
	t.Helper()
	w := NewWatcher(Host{Root: root}, slog.New(slog.DiscardHandler))
	reports := make(chan Result, 64)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = w.Run(ctx, func(r Result) { reports <- r }) }()
	defer func() { cancel(); <-done }()
	if r := w.Look([]mesh.Workload{workload(t, 300, "unit:api.service")}); len(r.Locals) != 0 {
		t.Fatalf("matched before anything is there: %v", r.Locals)
	}
	until := func(matched bool) time.Duration {
		t.Helper()
		began := time.Now()
		deadline := time.After(5 * time.Second)
		for {
			select {
			case r := <-reports:
				if (len(r.Locals) == 1) == matched && len(r.Matches) == 1 {
					return time.Since(began)
				}
			case <-deadline:
				t.Fatalf("no report with matched=%v", matched)
			}
		}
	}
	until(false)
	dir := filepath.Join(root, "system.slice", "api.service")
	var took []time.Duration
	for range 4 {
		must(t, os.MkdirAll(dir, 0o755))
		took = append(took, until(true))
		must(t, os.Remove(dir))
		took = append(took, until(false))
	}
	slices.Sort(took)
	// The scan alone, once a second, would need half a second in the middle. A busy machine may delay single ones.
	if middle := took[len(took)/2]; middle > 250*time.Millisecond {
		t.Errorf("changes were seen after %v", took)
	}
	t.Logf("changes were seen after %v", took)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
