package registry

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policydoc"
)

const (
	// Quarantine is how long an address rests after its instance was removed, so that no late packet or stale cache
	// reaches another workload under it.
	Quarantine = 24 * time.Hour
	// DefaultLease is the life of Bindings and snapshots.
	DefaultLease = 24 * time.Hour
	defaultPool4 = "198.18.0.0/15"
)

// Store is what the registry needs of coordinator/store.
type Store interface {
	Update(ctx context.Context, fn func(store.Tx) error) (uint64, error)
	View(ctx context.Context, fn func(store.Tx) error) error
}

// Options are fixed for the life of a Registry. What is zero is taken from the store, or from the defaults on first
// use.
type Options struct {
	TrustDomain identity.TrustDomain
	Overlay4    netip.Prefix
	Overlay6    netip.Prefix
	Lease       time.Duration
	Now         func() time.Time
	// Parse reads stored policy sources. It must accept what ApplyPolicy was given.
	Parse func([]store.SourceFile) (*policydoc.Document, error)
	// Pin is the hash of the root's key, for new join tokens: authority.Bundle().Pin().
	Pin func() [32]byte
}

// Registry is safe for concurrent use.
type Registry struct {
	store Store
	opts  Options
	state atomic.Pointer[State]
	wake  <-chan struct{}

	loading struct {
		sync.Mutex
		revision uint64    // up to which the store was read
		policy   cachedDoc // of the State that was loaded last
	}
	subscribers struct {
		sync.Mutex
		next int
		slot map[int]chan struct{}
	}
}

// cachedDoc is a committed policy revision, parsed. Committed revisions never change.
type cachedDoc struct {
	revision uint64
	doc      *policydoc.Document
}

// Open reads the state, and writes the store's description when the store is new.
func Open(ctx context.Context, s Store, opts Options) (*Registry, error) {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	r := &Registry{store: s, opts: opts}
	r.subscribers.slot = map[int]chan struct{}{}
	r.wake, _ = r.Subscribe()
	if err := r.settle(ctx); err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	r.loading.policy = cachedDoc{0, &policydoc.Document{}}
	r.state.Store(&State{Policy: r.loading.policy.doc})
	if err := r.refresh(ctx, 0, true); err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	return r, nil
}

// settle brings options and stored description together. Nothing that nodes rely on changes by an edited file.
func (r *Registry) settle(ctx context.Context) error {
	var have store.Meta
	err := r.store.View(ctx, func(tx store.Tx) (err error) {
		have, err = tx.Meta()
		return err
	})
	fresh := errors.Is(err, store.ErrNotFound)
	if err != nil && !fresh {
		return err
	}
	var want store.Meta
	if fresh {
		want, err = r.firstMeta()
	} else {
		want, err = r.mergeMeta(ctx, have)
	}
	if err != nil {
		return err
	}
	if want == have {
		return nil
	}
	_, err = r.store.Update(ctx, func(tx store.Tx) error {
		if err := tx.SetMeta(want); err != nil {
			return err
		}
		return r.audit(ctx, tx, "coordinator.settings", want.TrustDomain, fmt.Sprintf("overlay %s %s, lease %v", want.Overlay4, want.Overlay6, want.Lease))
	})
	return err
}

func (r *Registry) firstMeta() (store.Meta, error) {
	o := r.opts
	if o.TrustDomain.IsZero() {
		return store.Meta{}, fmt.Errorf("%w: the store is new and no trust domain was given", ErrSettings)
	}
	if !o.Overlay4.IsValid() {
		o.Overlay4 = netip.MustParsePrefix(defaultPool4)
	}
	if !o.Overlay6.IsValid() {
		o.Overlay6 = Overlay6For(o.TrustDomain)
	}
	if o.Lease == 0 {
		o.Lease = DefaultLease
	}
	if err := checkOverlays(o.Overlay4, o.Overlay6); err != nil {
		return store.Meta{}, err
	}
	return store.Meta{TrustDomain: o.TrustDomain.String(), Incarnation: 1, Overlay4: o.Overlay4.String(), Overlay6: o.Overlay6.String(),
		Lease: o.Lease, Created: o.Now().UTC()}, nil
}

func (r *Registry) mergeMeta(ctx context.Context, have store.Meta) (store.Meta, error) {
	o, want := r.opts, have
	if !o.TrustDomain.IsZero() && o.TrustDomain.String() != have.TrustDomain {
		return want, fmt.Errorf("%w: the store belongs to trust domain %s, the settings say %s", ErrSettings, have.TrustDomain, o.TrustDomain)
	}
	if o.Overlay4.IsValid() {
		want.Overlay4 = o.Overlay4.String()
	}
	if o.Overlay6.IsValid() {
		want.Overlay6 = o.Overlay6.String()
	}
	if o.Lease != 0 {
		want.Lease = o.Lease
	}
	if want.Overlay4 == have.Overlay4 && want.Overlay6 == have.Overlay6 {
		return want, nil
	}
	if err := checkOverlays(netip.MustParsePrefix(want.Overlay4), netip.MustParsePrefix(want.Overlay6)); err != nil {
		return want, err
	}
	err := r.store.View(ctx, func(tx store.Tx) error {
		nodes, err := tx.Nodes(0)
		if err == nil && len(nodes) > 0 {
			err = fmt.Errorf("%w: overlay ranges cannot change from %s %s to %s %s while %d nodes have addresses in them", ErrSettings, have.Overlay4, have.Overlay6, want.Overlay4, want.Overlay6, len(nodes))
		}
		return err
	})
	return want, err
}

func checkOverlays(p4, p6 netip.Prefix) error {
	if !p4.Addr().Is4() || p4.Masked() != p4 || p4.Bits() < 8 || p4.Bits() > 24 {
		return fmt.Errorf("%w: overlay IPv4 range %s, expected a network of /8 to /24 such as %s", ErrSettings, p4, defaultPool4)
	}
	if !p6.Addr().Is6() || p6.Addr().Is4In6() || p6.Masked() != p6 || p6.Bits() > 64 {
		return fmt.Errorf("%w: overlay IPv6 range %s, expected a network of /64 or wider", ErrSettings, p6)
	}
	return nil
}

// State is the newest. It never changes; hold on to it for one consistent view.
func (r *Registry) State() *State { return r.state.Load() }

// Changed wakes one reader when State changed in a way that other nodes see. For several readers use Subscribe.
func (r *Registry) Changed() <-chan struct{} { return r.wake }

// Subscribe returns a wake-up of its own. The channel has one slot: many changes while the reader is busy wake it once.
func (r *Registry) Subscribe() (ch <-chan struct{}, cancel func()) {
	c := make(chan struct{}, 1)
	r.subscribers.Lock()
	defer r.subscribers.Unlock()
	n := r.subscribers.next
	r.subscribers.next++
	r.subscribers.slot[n] = c
	return c, func() {
		r.subscribers.Lock()
		defer r.subscribers.Unlock()
		delete(r.subscribers.slot, n)
	}
}

func (r *Registry) signal() {
	r.subscribers.Lock()
	defer r.subscribers.Unlock()
	for _, c := range r.subscribers.slot {
		select {
		case c <- struct{}{}:
		default: // it has not yet seen the last one
		}
	}
}

// Bump makes a revision without a change, for lease rolls and restarts, and wakes the readers.
func (r *Registry) Bump(ctx context.Context) (uint64, error) {
	rev, err := r.store.Update(ctx, func(store.Tx) error { return nil })
	if err != nil {
		return 0, fmt.Errorf("bump revision: %w", err)
	}
	return rev, r.refresh(ctx, rev, true)
}

// update runs one transaction and then brings State to it.
func (r *Registry) update(ctx context.Context, fn func(store.Tx) error) (uint64, error) {
	rev, err := r.store.Update(ctx, fn)
	if err != nil {
		return 0, err
	}
	return rev, r.refresh(ctx, rev, false)
}

type actorKey struct{}

// WithActor names who does what follows, for the audit log: "token:ci", "oidc:ada@example.org".
func WithActor(ctx context.Context, who string) context.Context {
	return context.WithValue(ctx, actorKey{}, who)
}

func actor(ctx context.Context) string {
	if who, ok := ctx.Value(actorKey{}).(string); ok && who != "" {
		return who
	}
	return "coordinator"
}

func (r *Registry) audit(ctx context.Context, tx store.Tx, what, object, detail string) error {
	_, err := tx.AppendAudit(store.Audit{Time: r.opts.Now(), Who: actor(ctx), What: what, Object: object, Outcome: "ok", Detail: detail})
	return err
}
