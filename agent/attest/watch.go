package attest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/dataplane/link"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/task"
)

const (
	// maxWatches bounds the directories that are watched. Beyond it changes are seen by the scan, within scanAlone.
	maxWatches = 1024
	// settle gathers the events of one change, so that a service that starts costs one look.
	settle = 10 * time.Millisecond
	// scanUnder is the safety net under inotify, which sees every change of what it watches: a host that has nothing to
	// do should do nothing.
	scanUnder = 5 * time.Second
	// scanAlone is how often is looked where not every directory can be watched.
	scanAlone = time.Second
	// scanStarting is how often is looked for a while, restless, after something changed and containers are selected: no
	// event tells that a process came into a cgroup, or that a runtime has written its files.
	scanStarting = 250 * time.Millisecond
	restless     = 15 * time.Second
)

// Watcher looks at the host again whenever the tree of cgroups, the network devices or the workloads change.
type Watcher struct {
	*Resolver
	log  *slog.Logger
	wake chan struct{}

	mu        sync.Mutex
	workloads []mesh.Workload
}

// NewWatcher watches a host.
func NewWatcher(h Host, log *slog.Logger) *Watcher {
	return &Watcher{Resolver: NewResolver(h), log: log, wake: make(chan struct{}, 1)}
}

// Look resolves workloads at once and makes them what is watched.
func (w *Watcher) Look(workloads []mesh.Workload) Result {
	w.mu.Lock()
	w.workloads = workloads
	w.mu.Unlock()
	w.poke()
	res, _ := w.resolve(w.current)
	return res
}

func (w *Watcher) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *Watcher) current() []mesh.Workload {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.workloads
}

// Run reports each change until ctx ends. The first look is always reported. Devices are those of the network namespace
// that it is called in.
func (w *Watcher) Run(ctx context.Context, report func(Result)) error {
	in, err := newInotify()
	if err != nil {
		w.log.Warn("changes of cgroups are seen a second late", "error", err)
	}
	g := task.New(ctx)
	g.Go("attest.inotify", func(context.Context) error { in.read(w.poke); return nil })
	defer func() { in.close(); _ = g.Wait() }() // closing ends the reader
	devices := w.watchDevices(ctx)
	var unheard <-chan struct{}
	if devices != nil {
		unheard = devices.Done()
		defer devices.Close()
	}
	timer := time.NewTimer(scanAlone)
	defer timer.Stop()
	var last Result
	var dirs []string
	woken := time.Now()
	for first := true; ; first = false {
		workloads := w.current()
		// Watches before the look: what changes in between is an event that leads to another look.
		whole := in.watch(w.host.Root, workloads, dirs)
		now, searched := w.resolve(w.current)
		if first || !now.Equal(last) {
			last = now
			report(now)
		}
		if !slices.Equal(searched, dirs) { // they are not watched yet
			dirs = searched
			w.poke()
		}
		timer.Reset(interval(workloads, whole && unheard != nil, time.Since(woken)))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		case <-unheard:
			unheard = nil
		case <-w.wake:
			woken = time.Now()
			if err := pause(ctx, settle); err != nil {
				return err
			}
		}
	}
}

// interval is how long a look may count when nothing is heard of. whole: every change is.
func interval(workloads []mesh.Workload, whole bool, sinceChange time.Duration) time.Duration {
	switch {
	case sinceChange < restless && selects(workloads, policy.SelectContainer):
		return scanStarting
	case whole:
		return scanUnder
	}
	return scanAlone
}

func selects(workloads []mesh.Workload, kinds ...policy.SelectorKind) bool {
	return slices.ContainsFunc(workloads, func(w mesh.Workload) bool {
		return slices.ContainsFunc(w.Selectors, func(s policy.Selector) bool { return slices.Contains(kinds, s.Kind) })
	})
}

// watchDevices looks again when devices or default routes come and go, where a selector depends on them. nil when that
// cannot be heard of.
func (w *Watcher) watchDevices(ctx context.Context) *link.Watcher {
	watcher, err := link.Watch(ctx, func(e link.Event) {
		matters := e.Kind == link.LinkChanged || e.Kind == link.Lost || e.Kind == link.RouteChanged && e.Prefix.Bits() <= 0
		if matters && selects(w.current(), policy.SelectContainer, policy.SelectInterface) {
			w.poke()
		}
	})
	if err != nil {
		w.log.Warn("changes of network devices are seen a second late", "error", err)
		return nil
	}
	return watcher
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// inotify watches directories for subdirectories that come and go. A nil one does nothing.
type inotify struct {
	file    *os.File
	watches map[string]int
}

func newInotify() (*inotify, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make inotify: %w", err)
	}
	return &inotify{file: os.NewFile(uintptr(fd), "inotify"), watches: map[string]int{}}, nil
}

func (in *inotify) close() {
	if in != nil {
		_ = in.file.Close()
	}
}

// read calls changed for each batch of events until the file is closed. What changed does not matter: a look is cheap.
func (in *inotify) read(changed func()) {
	if in == nil {
		return
	}
	buf := make([]byte, 16<<10)
	for {
		if _, err := in.file.Read(buf); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return
		}
		changed()
	}
}

// watch makes the watched set the existing directories above each wanted one, so that the wanted one's coming and going
// are seen, and those of its parents; and dirs, in which containers come and go. It reports whether all are watched.
func (in *inotify) watch(root string, workloads []mesh.Workload, dirs []string) (whole bool) {
	if in == nil {
		return false
	}
	want := map[string]bool{root: true}
	for _, wl := range workloads {
		t, err := join(wl.Selectors)
		if err != nil {
			continue
		}
		for dir := path.Dir(t.path); dir != "/" && len(want) < maxWatches; dir = path.Dir(dir) {
			want[filepath.Join(root, dir)] = true
		}
	}
	for _, dir := range dirs {
		if len(want) < maxWatches {
			want[filepath.Join(root, dir)] = true
		}
	}
	raw, err := in.file.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Control(func(fd uintptr) { whole = in.update(int(fd), want) })
	_, top := in.watches[root] // nothing above it would tell that it came
	return whole && top && err == nil && len(want) < maxWatches
}

// update reports whether every directory that is there is watched.
func (in *inotify) update(fd int, want map[string]bool) (whole bool) {
	whole = true
	for dir, wd := range in.watches {
		if !want[dir] {
			// Fails when the kernel has dropped the watch with its directory.
			_, _ = unix.InotifyRmWatch(fd, uint32(wd))
			delete(in.watches, dir)
		}
	}
	const mask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVE | unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_ONLYDIR | unix.IN_DONT_FOLLOW
	// The outer ones first: an inner one that appears in between is an event of the outer one.
	for _, dir := range slices.Sorted(maps.Keys(want)) {
		// Adding again is cheap and renews the watch of a directory that was made anew under its old name.
		wd, err := unix.InotifyAddWatch(fd, strings.TrimSuffix(dir, "/"), mask)
		if err != nil {
			delete(in.watches, dir)
			// One that is not there yet is seen coming by the watch of its parent.
			whole = whole && errors.Is(err, unix.ENOENT)
			continue
		}
		in.watches[dir] = wd
	}
	return whole
}
