package revoke

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Kind is the way in which sockets are ended.
type Kind string

// The kinds, in the order in which Open tries them.
const (
	KindIterator Kind = "bpf_sock_destroy"
	KindDiag     Kind = "SOCK_DESTROY"
	KindNone     Kind = "none"
)

// Refusals that callers tell apart.
var (
	// ErrConfig is wrapped by every refusal of a Config.
	ErrConfig = errors.New("invalid revocation configuration")
	// ErrNamespace: Sweep was called from another network namespace than Open.
	ErrNamespace = errors.New("sockets are swept in the network namespace where the revoker was opened")
	// ErrClosed is returned by a closed Revoker.
	ErrClosed = errors.New("revoker is closed")
)

// Config says what to sweep, and by what.
type Config struct {
	// Maps is the directory in which the judge's maps are pinned; they must exist already (dataplane/enforce makes
	// them). Nothing is pinned here.
	Maps               string
	Overlay4, Overlay6 netip.Prefix
	// Judge decides for KindDiag; nil leaves that kind out. KindIterator does not ask it.
	Judge Judge
	// Only limits Open to one kind; empty tries them all.
	Only Kind
}

func (c Config) validate() error {
	if !c.Overlay4.IsValid() || !c.Overlay4.Addr().Is4() || !c.Overlay6.IsValid() || c.Overlay6.Addr().Is4() {
		return fmt.Errorf("%w: overlay prefixes %v and %v are not one IPv4 and one IPv6 prefix", ErrConfig, c.Overlay4, c.Overlay6)
	}
	if c.Overlay4.Bits() == 0 || c.Overlay6.Bits() == 0 {
		return fmt.Errorf("%w: an overlay of every address would take in every socket of the host", ErrConfig)
	}
	if c.Maps == "" {
		return fmt.Errorf("%w: the directory of the judge's maps must be given", ErrConfig)
	}
	switch c.Only {
	case "", KindIterator, KindDiag, KindNone:
		return nil
	}
	return fmt.Errorf("%w: unknown kind %q", ErrConfig, c.Only)
}

// inOverlay reports whether an unmapped address is the overlay's.
func (c Config) inOverlay(a netip.Addr) bool { return c.Overlay4.Contains(a) || c.Overlay6.Contains(a) }

// sweeper is one way of ending sockets.
type sweeper interface {
	sweep(ctx context.Context) (destroyed int, err error)
	close() error
}

// Revoker ends the sockets of flows that are allowed no longer. Its methods may be called from several goroutines.
type Revoker struct {
	kind Kind
	why  string
	home namespace

	mu struct {
		sync.Mutex // held for the whole of a sweep: there is one at a time
		way        sweeper
		closed     bool
	}
}

// Open finds out how this host ends sockets. A host that has no way gets a Revoker of KindNone, whose Why says what each
// one lacked; only a Config that makes no sense is an error.
func Open(cfg Config) (*Revoker, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	home, err := currentNamespace()
	if err != nil {
		return nil, err
	}
	r := &Revoker{kind: KindNone, home: home}
	if cfg.Only == KindNone {
		r.why = "switched off"
		return r, nil
	}
	var missing []error
	for _, k := range []struct {
		kind Kind
		open func(Config) (sweeper, error)
	}{{KindIterator, openIterators}, {KindDiag, openDiag}} {
		if cfg.Only != "" && cfg.Only != k.kind {
			continue
		}
		way, err := k.open(cfg)
		if err == nil {
			r.kind, r.mu.way = k.kind, way
			break
		}
		missing = append(missing, fmt.Errorf("%s: %w", k.kind, err))
	}
	if err := errors.Join(missing...); err != nil {
		r.why = err.Error()
	}
	return r, nil
}

// Kind is the way that Open found.
func (r *Revoker) Kind() Kind { return r.kind }

// Why says what the kinds lack that are tried before Kind; empty when the first one works.
func (r *Revoker) Why() string { return r.why }

// Sweep visits every socket of the namespace once, and returns how many it ended. Flows that are opened while it runs are
// judged by the view in force and need no sweep.
//
// A Revoker of KindNone ends nothing, which is no error. With an error, sockets may be left that should have gone; calling
// again is harmless.
func (r *Revoker) Sweep(ctx context.Context) (destroyed int, err error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.closed {
		return 0, ErrClosed
	}
	if r.mu.way == nil {
		return 0, nil
	}
	// A namespace belongs to a thread, and the sweep to the one that is checked here.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := currentNamespace()
	if err != nil {
		return 0, err
	}
	if here != r.home {
		return 0, ErrNamespace
	}
	return r.mu.way.sweep(ctx)
}

// Close waits for a running sweep, and gives everything back. It may be called again.
func (r *Revoker) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.closed {
		return nil
	}
	r.mu.closed = true
	if r.mu.way == nil {
		return nil
	}
	return r.mu.way.close()
}

// namespace names a network namespace as the kernel does.
type namespace struct{ dev, inode uint64 }

func currentNamespace() (namespace, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return namespace{}, fmt.Errorf("look at the network namespace: %w", err)
	}
	return namespace{dev: st.Dev, inode: st.Ino}, nil
}
