package netlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// termGrace is how long Close waits for processes after SIGTERM; what is left then gets SIGKILL.
	termGrace = 2 * time.Second
	// killWait bounds the wait for killed processes and for cgroups to become empty; past it Close reports a leak.
	killWait = 10 * time.Second
	// releaseWait bounds the wait for sockets and threads of this process to leave the lab's namespaces.
	releaseWait = time.Second
)

// ErrClosed is returned for work on a Lab that was closed.
var ErrClosed = errors.New("lab is closed")

// A prefix holds no hyphen: the first hyphen of a namespace's name ends it, so that no lab's prefix covers another's names.
var (
	prefixForm = regexp.MustCompile(`^[a-z][a-z0-9]{0,11}$`)
	nameForm   = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)
)

// Options says what a Lab is called and where it may write.
type Options struct {
	// Prefix is in the name of everything the lab makes: 1 to 12 lower-case letters and digits, a letter first. It is
	// unique on the machine; New fails while another lab holds it.
	Prefix string
	// Dir is an existing directory for the bpffs mount and the hosts' state. Empty means a temporary directory that Close
	// removes; what hosts leave in a Dir that was given stays there.
	Dir string
	// TermGrace is how long Close waits after SIGTERM before SIGKILL; zero means two seconds, negative means no wait.
	TermGrace time.Duration
}

// Lab is a set of hosts and bridges that live and die together. Its methods may be called from several goroutines.
type Lab struct {
	prefix string
	dir    string
	ownDir bool
	grace  time.Duration
	cgroup string // the subtree of this lab
	bpffs  string // the mount of this lab
	claim  io.Closer

	closing  sync.Once
	closeErr error

	// mu guards what follows.
	mu       sync.Mutex
	closed   bool
	spaces   map[string]*space
	hosts    map[string]*Host
	bridges  map[string]*Bridge
	cmds     map[*Cmd]struct{}
	captures map[*Capture]struct{}
}

// Missing names what this process lacks to make a Lab, one plain phrase for each; nothing means that New can work.
func Missing() []string {
	var out []string
	if os.Geteuid() != 0 {
		out = append(out, "root")
	}
	if _, err := cgroup2Mount(); err != nil {
		out = append(out, "a cgroup v2 mount")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		out = append(out, "the nft program (Debian package nftables)")
	}
	return out
}

// New makes an empty lab after it has removed what an earlier run with the same prefix left behind.
func New(ctx context.Context, o Options) (*Lab, error) {
	if !prefixForm.MatchString(o.Prefix) {
		return nil, fmt.Errorf("lab prefix %q: want 1 to 12 lower-case letters and digits, a letter first", o.Prefix)
	}
	if missing := Missing(); len(missing) > 0 {
		return nil, fmt.Errorf("lab %s: needs %v", o.Prefix, missing)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("lab %s: %w", o.Prefix, err)
	}
	claim, err := claimPrefix(o.Prefix)
	if err != nil {
		return nil, err
	}
	l := &Lab{
		prefix: o.Prefix, dir: o.Dir, grace: o.TermGrace, claim: claim,
		spaces: map[string]*space{}, hosts: map[string]*Host{}, bridges: map[string]*Bridge{},
		cmds: map[*Cmd]struct{}{}, captures: map[*Capture]struct{}{},
	}
	if l.grace == 0 {
		l.grace = termGrace
	}
	if err := l.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("make lab %s: %w", o.Prefix, err), l.Close())
	}
	return l, nil
}

// claimPrefix takes the prefix for this process with a socket name that has no file: it goes away with the process.
func claimPrefix(prefix string) (io.Closer, error) {
	c, err := net.ListenUnix("unix", &net.UnixAddr{Name: "@signet-netlab-" + prefix, Net: "unix"})
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("lab prefix %s: a running lab has it; choose another: %w", prefix, err)
	}
	if err != nil {
		return nil, fmt.Errorf("claim lab prefix %s: %w", prefix, err)
	}
	return c, nil
}

func (l *Lab) build() error {
	if err := removeStale(l.prefix); err != nil {
		return fmt.Errorf("remove an earlier run's leftovers: %w", err)
	}
	if l.dir == "" {
		dir, err := os.MkdirTemp("", "netlab-"+l.prefix+"-")
		if err != nil {
			return err
		}
		l.dir, l.ownDir = dir, true
	}
	dir, err := filepath.Abs(l.dir)
	if err != nil {
		return err
	}
	l.dir = dir
	root, err := cgroup2Mount()
	if err != nil {
		return err
	}
	cgroup := filepath.Join(root, l.prefix)
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		return err
	}
	l.cgroup = cgroup
	bpffs := filepath.Join(l.dir, "bpf")
	if err := mountBPFFS(l.prefix, bpffs); err != nil {
		return err
	}
	l.bpffs = bpffs
	return nil
}

// Prefix is the name that everything of this lab carries.
func (l *Lab) Prefix() string { return l.prefix }

// Dir is the lab's work directory.
func (l *Lab) Dir() string { return l.dir }

// Host adds a host: a namespace with loopback up, a cgroup root, a bpffs directory and a state directory.
func (l *Lab) Host(ctx context.Context, name string) (*Host, error) {
	s, err := l.addSpace(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("add host %s: %w", name, err)
	}
	h := &Host{
		lab: l, name: name, space: s,
		cgroup: filepath.Join(l.cgroup, name),
		bpffs:  filepath.Join(l.bpffs, name),
		state:  filepath.Join(l.dir, "hosts", name),
	}
	if err := h.build(); err != nil {
		return nil, fmt.Errorf("add host %s: %w", name, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hosts[name] = h
	return h, nil
}

// addSpace makes a namespace under a name that neither a host nor a bridge of this lab has.
func (l *Lab) addSpace(ctx context.Context, name string) (*space, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !nameForm.MatchString(name) {
		return nil, fmt.Errorf("name %q: want lower-case letters, digits and hyphens, at most 32", name)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	if _, taken := l.spaces[name]; taken {
		return nil, fmt.Errorf("name %q is taken in lab %s", name, l.prefix)
	}
	s, err := newSpace(l.prefix + "-" + name)
	if err != nil {
		return nil, err
	}
	l.spaces[name] = s
	return s, nil
}

// Close stops every process of the lab and removes everything the lab made. It may be called again and then gives the same
// answer. The error names what could not be removed.
func (l *Lab) Close() error {
	l.closing.Do(func() { l.closeErr = l.teardown() })
	return l.closeErr
}

func (l *Lab) teardown() error {
	l.mu.Lock()
	l.closed = true
	cmds, captures, spaces := keys(l.cmds), keys(l.captures), l.spaces
	l.mu.Unlock()

	var errs []error
	for _, c := range captures {
		c.stop()
	}
	l.terminate(cmds)
	if l.cgroup != "" {
		errs = append(errs, killCgroup(l.cgroup))
	}
	for _, c := range cmds {
		if !waitFor(c.done, killWait) {
			errs = append(errs, fmt.Errorf("process %d (%s) is still there after SIGKILL", c.PID(), c.name))
		}
	}
	if l.bpffs != "" {
		errs = append(errs, unmountBPFFS(l.bpffs))
	}
	if l.cgroup != "" {
		errs = append(errs, removeCgroup(l.cgroup))
	}
	errs = append(errs, stillInside(spaces))
	l.mu.Lock()
	for _, s := range spaces {
		errs = append(errs, s.remove())
	}
	l.mu.Unlock()
	if l.ownDir {
		errs = append(errs, os.RemoveAll(l.dir))
	}
	left, err := Leaks(l.prefix)
	errs = append(errs, err)
	for _, what := range left {
		errs = append(errs, fmt.Errorf("left behind: %s", what))
	}
	errs = append(errs, l.claim.Close())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close lab %s: %w", l.prefix, err)
	}
	return nil
}

// terminate asks every process of the lab to stop and waits at most the grace for all of them together.
func (l *Lab) terminate(cmds []*Cmd) {
	if l.grace < 0 {
		return
	}
	for _, c := range cmds {
		// An error means that it has exited already.
		_ = c.Kill(unix.SIGTERM)
	}
	ctx, cancel := context.WithTimeout(context.Background(), l.grace)
	defer cancel()
	for _, c := range cmds {
		select {
		case <-c.done:
		case <-ctx.Done():
			return
		}
	}
}

// removeStale gives back what a lab of this prefix left when its process died. The caller holds the claim on the prefix, so
// that whatever is found has no owner.
func removeStale(prefix string) error {
	root, err := cgroup2Mount()
	if err != nil {
		return err
	}
	cgroup := filepath.Join(root, prefix)
	if _, err := os.Stat(cgroup); err == nil {
		if err := killCgroup(cgroup); err != nil {
			return err
		}
		if err := removeCgroup(cgroup); err != nil {
			return err
		}
	}
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.fstype == "bpf" && m.source == bpffsSource(prefix) {
			if err := unmountBPFFS(m.point); err != nil {
				return err
			}
		}
	}
	names, err := filepath.Glob(filepath.Join(netnsDir, prefix+"-*"))
	if err != nil {
		return err
	}
	for _, path := range names {
		if err := (&space{path: path, fd: -1}).remove(); err != nil {
			return err
		}
	}
	return nil
}

func keys[K comparable, V any](m map[K]V) []K {
	out := make([]K, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	return out
}

func waitFor(done <-chan struct{}, limit time.Duration) bool {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
		return false
	}
}
