package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

const (
	firstRetry = 200 * time.Millisecond
	maxRetry   = 30 * time.Second
	// lookAgain bounds one sleep, so that a clock that was set is noticed even if nobody calls Kick.
	lookAgain = 30 * time.Second
)

// Input is everything that decides what should be real. Its parts are immutable: a change replaces one.
type Input struct {
	// Snapshot is the last verified one; nil where there is none, and then everything in the overlay is denied.
	Snapshot *mesh.Snapshot
	// Locals and Interfaces are what attest found: the sockets and the network devices of workloads.
	Locals     map[policy.LocalKey]identity.Number
	Interfaces map[uint32]identity.Number
	Hints      map[string][]netip.AddrPort // by node
	// Down is the operator's word: peers go, and nothing passes.
	Down bool
	// BehindNAT: only packets that this host sends keep it reachable.
	BehindNAT bool
	// Overlay ranges to deny where there is no snapshot.
	Overlay4, Overlay6 netip.Prefix
}

// Kinds of Object.
const (
	KindHost   = "host"
	KindRoutes = "routes"
	KindPolicy = "policy"
	KindPeer   = "peer"
	KindPrune  = "prune"
)

// Object is one thing that should be real, with what became of it.
type Object struct {
	Kind, Name string
	Err        error // nil when it is real
	Since      time.Time
	Tries      int // since it last succeeded
}

// Status is how far reality is from what was wished.
type Status struct {
	Epoch          uint64 // of the snapshot that was last made real as a whole
	PolicyRevision uint64 // that the judge has
	AppliedAt      time.Time
	Failed         []Object // sorted by kind and name
	Peers          []mesh.Peer
	Enforced       bool // the judge has what it should
}

// Reconciler makes a Target what the Input says. One goroutine, Run, does all of it.
type Reconciler struct {
	target Target
	mode   OnLeaseEnd
	log    *slog.Logger
	now    func() time.Time
	wake   chan struct{}

	in     shared
	real   applied
	failed map[string]*Object
	turns  turns
}

// shared is what others set and read.
type shared struct {
	mu      sync.Mutex
	input   Input
	version uint64 // of input
	anew    bool   // see Anew
	done    uint64 // version of the last pass
	passed  chan struct{}
	status  Status
}

// applied is what the target was last told with success.
type applied struct {
	self   *mesh.Self
	addrs  []netip.Addr
	behind map[netip.Addr]uint32 // nil: not known
	view   *policy.View
	down   bool // view was made real by DenyAll
	// shut: everything is denied because the View could not be enforced.
	shut bool
	// until is when something that view says begins or ends; see stale.
	until time.Time
	peers map[key.Public]mesh.Peer
	// keepalive holds the intervals that were set; absent means none.
	keepalive map[key.Public]time.Duration
	// pruned is the set of the last PrunePeers; nil before the first: an adopted device may have peers of another life.
	pruned []key.Public
	swept  bool
}

// New makes a Reconciler; nothing happens before Run.
func New(target Target, mode OnLeaseEnd, log *slog.Logger) *Reconciler {
	return &Reconciler{target: target, mode: mode, log: log, now: func() time.Time { return time.Now().Round(0) },
		wake: make(chan struct{}, 1), failed: map[string]*Object{}, real: applied{peers: map[key.Public]mesh.Peer{}, keepalive: map[key.Public]time.Duration{}},
		in: shared{passed: make(chan struct{})}}
}

// Set changes the input and returns its version, for Wait.
func (r *Reconciler) Set(change func(*Input)) uint64 {
	r.in.mu.Lock()
	change(&r.in.input)
	r.in.version++
	v := r.in.version
	r.in.mu.Unlock()
	r.Kick()
	return v
}

// Kick makes Run look at the clock again.
func (r *Reconciler) Kick() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Anew makes the next pass give the judge its View again although it is the same one: the kernel judges by stamps of its
// own clock, which are made from the wall clock when a View is enforced, and the wall clock was set.
func (r *Reconciler) Anew() {
	r.in.mu.Lock()
	r.in.anew = true
	r.in.mu.Unlock()
	r.Kick()
}

// Wait returns when a version of the input was tried: nil when all of it is real, or what is not.
func (r *Reconciler) Wait(ctx context.Context, version uint64) error {
	for {
		r.in.mu.Lock()
		done, passed, status := r.in.done, r.in.passed, r.in.status
		r.in.mu.Unlock()
		if done >= version {
			return status.err()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the host to be reconciled: %w", ctx.Err())
		case <-passed:
		}
	}
}

// Status returns the outcome of the last pass.
func (r *Reconciler) Status() Status {
	r.in.mu.Lock()
	defer r.in.mu.Unlock()
	return r.in.status
}

func (s Status) err() error {
	var errs []error
	for _, o := range s.Failed {
		errs = append(errs, fmt.Errorf("%s %s: %w", o.Kind, o.Name, o.Err))
	}
	return errors.Join(errs...)
}

// Run reconciles until ctx ends: when the input changes, when a Binding or the lease begins or ends, and to retry.
func (r *Reconciler) Run(ctx context.Context) error {
	for {
		r.in.mu.Lock()
		input, version := r.in.input, r.in.version
		anew := r.in.anew
		r.in.anew = false
		r.in.mu.Unlock()
		wait := lookAgain
		if version > 0 {
			if anew {
				r.real.view = nil
			}
			wait = r.pass(ctx, input, version)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-r.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// desired is the description of one pass.
type desired struct {
	host   *mesh.Self
	addrs  []netip.Addr
	behind map[netip.Addr]uint32 // addresses that another device leads to
	view   *policy.View
	peers  []mesh.Peer
	down   bool
	nat    bool
	again  time.Time
}

func (r *Reconciler) describe(in Input, now time.Time) desired {
	if in.Snapshot == nil || in.Down {
		d := desired{view: Empty(in.Overlay4, in.Overlay6), down: in.Down}
		if in.Snapshot != nil {
			d.view = Empty(in.Snapshot.Self.Overlay4, in.Snapshot.Self.Overlay6)
		}
		return d
	}
	addrs, behind := hostAddrs(in)
	return desired{host: &in.Snapshot.Self, addrs: addrs, behind: behind,
		view:  BuildView(in.Snapshot, in.Locals, in.Interfaces, r.mode, now),
		peers: desiredPeers(in.Snapshot, in.Hints, r.mode, now),
		nat:   in.BehindNAT,
		again: r.turns.nextChange(in.Snapshot, r.mode, now)}
}

// pass makes one description real and returns how long it holds. The order:
//
//  1. the device has its addresses, so that the judge's hooks can choose them, and those behind others have routes;
//  2. the judge learns the whole View: what was taken back is denied from here on, whatever fails below; a View that it
//     cannot learn is replaced by one that denies everything;
//  3. peers are added and changed, unless the judge does not have the View: nobody is let in ahead of it;
//  4. every other peer goes.
//
// A failure is noted and does not hold up what comes after it, but for 3.
func (r *Reconciler) pass(ctx context.Context, in Input, version uint64) time.Duration {
	now := r.now()
	d := r.describe(in, now)
	r.host(ctx, d)
	r.routes(ctx, d)
	r.enforce(ctx, d, now)
	r.peers(ctx, d)
	r.prune(ctx, d)
	if ctx.Err() != nil {
		return 0
	}
	r.publish(in, version, d, now)
	wait := lookAgain
	if !d.again.IsZero() {
		wait = min(wait, max(d.again.Sub(now), time.Millisecond))
	}
	if retry := r.retryIn(); retry > 0 {
		wait = min(wait, retry)
	}
	return wait
}

func (r *Reconciler) host(ctx context.Context, d desired) {
	if d.host == nil || r.real.self != nil && sameHost(*r.real.self, *d.host) && slices.Equal(r.real.addrs, d.addrs) {
		r.forget(KindHost, d.host == nil)
		return
	}
	err := r.target.UpdateHost(ctx, *d.host, d.addrs)
	r.note(KindHost, d.host.Node, err)
	if err == nil {
		r.real.self, r.real.addrs = d.host, d.addrs
	}
}

// routes tells a target that can of the addresses behind other devices, once it has the host's own.
func (r *Reconciler) routes(ctx context.Context, d desired) {
	target, ok := r.target.(Router)
	if !ok || d.host == nil || r.real.self == nil || r.real.behind != nil && maps.Equal(r.real.behind, d.behind) {
		r.forget(KindRoutes, d.host == nil)
		return
	}
	err := target.UpdateRoutes(ctx, d.behind)
	r.note(KindRoutes, "workloads", err)
	r.real.behind = nil
	if err == nil {
		r.real.behind = maps.Clone(d.behind)
		if r.real.behind == nil {
			r.real.behind = map[netip.Addr]uint32{}
		}
	}
}

func (r *Reconciler) enforce(ctx context.Context, d desired, now time.Time) {
	if r.real.view != nil && r.real.down == d.down && !r.stale(now) && sameView(r.real.view, d.view) {
		return
	}
	err := r.tell(ctx, d)
	if err == nil {
		r.note(KindPolicy, "view", nil)
		r.note(KindPolicy, denyName, nil)
		r.real.view, r.real.down, r.real.shut, r.real.until = d.view, d.down, false, d.again
		return
	}
	// What the judge has now is not known for sure: say it again, whatever is wished next.
	r.real.view = nil
	if ctx.Err() != nil {
		return // the agent ends, which leaves in force what is
	}
	if r.shut(ctx, d) {
		err = fmt.Errorf("everything in the overlay is denied until the policy can be enforced: %w", err)
	}
	r.note(KindPolicy, "view", err)
}

// stale reports whether something that the View says has begun or ended since it was enforced. The kernel counts on a
// clock that the wall clock may drift from, so it is told once more.
func (r *Reconciler) stale(now time.Time) bool {
	return !r.real.until.IsZero() && !now.Before(r.real.until)
}

// tell gives the judge what it should have.
func (r *Reconciler) tell(ctx context.Context, d desired) error {
	err := d.view.Validate()
	denier, ok := r.target.(Denier)
	switch {
	case d.down && ok:
		err = denier.DenyAll(ctx)
	case err == nil:
		err = r.target.Enforce(ctx, d.view)
	}
	if err != nil {
		return fmt.Errorf("enforce: %w", err)
	}
	return nil
}

const denyName = "deny-all"

// shut denies everything after a View was refused: the one before it is still in force, with what the new one takes
// back. It reports whether everything is denied now.
func (r *Reconciler) shut(ctx context.Context, d desired) bool {
	if r.real.shut {
		return true
	}
	err := errors.ErrUnsupported
	if denier, ok := r.target.(Denier); ok {
		err = denier.DenyAll(ctx)
	}
	if err != nil {
		// Small, so that it fits where the whole one did not.
		err = r.target.Enforce(ctx, Empty(d.view.Overlay4, d.view.Overlay6))
	}
	r.note(KindPolicy, denyName, err)
	r.real.shut = err == nil
	return r.real.shut
}

func (r *Reconciler) peers(ctx context.Context, d desired) {
	wanted := map[string]bool{}
	for _, p := range d.peers {
		wanted[KindPeer+"/"+p.Node] = true
		if have, ok := r.real.peers[p.Key]; ok && samePeer(have, p) || r.real.view == nil {
			continue
		}
		err := r.target.UpdatePeer(ctx, p)
		r.note(KindPeer, p.Node, err)
		if err == nil {
			r.real.peers[p.Key] = p
		} else {
			delete(r.real.peers, p.Key)
		}
	}
	r.keepalives(ctx, d)
	for k, o := range r.failed {
		if o.Kind == KindPeer && !wanted[k] {
			delete(r.failed, k)
		}
	}
}

// keepalives sets the interval of each real peer, on targets that can.
func (r *Reconciler) keepalives(ctx context.Context, d desired) {
	target, ok := r.target.(Keepaliver)
	if !ok {
		return
	}
	for _, p := range d.peers {
		want := keepalive(d.nat)
		if _, there := r.real.peers[p.Key]; !there || r.real.keepalive[p.Key] == want {
			continue
		}
		err := target.UpdateKeepalive(ctx, p.Key, want)
		r.note(KindPeer, p.Node, err)
		if err == nil {
			r.real.keepalive[p.Key] = want
		}
	}
}

func (r *Reconciler) prune(ctx context.Context, d desired) {
	keep := keys(d.peers)
	if r.real.swept && slices.Equal(r.real.pruned, keep) {
		return
	}
	err := r.target.PrunePeers(ctx, keep)
	r.note(KindPrune, "peers", err)
	if err != nil {
		r.real.swept = false
		return
	}
	r.real.pruned, r.real.swept = keep, true
	kept := make(map[key.Public]bool, len(keep))
	for _, k := range keep {
		kept[k] = true
	}
	maps.DeleteFunc(r.real.peers, func(k key.Public, _ mesh.Peer) bool { return !kept[k] })
	maps.DeleteFunc(r.real.keepalive, func(k key.Public, _ time.Duration) bool { return !kept[k] })
}

// note keeps the outcome for one object.
func (r *Reconciler) note(kind, name string, err error) {
	id := kind + "/" + name
	if err == nil {
		if r.failed[id] != nil {
			r.log.Info("reconciled at last", "kind", kind, "name", name)
		}
		delete(r.failed, id)
		return
	}
	if errors.Is(err, context.Canceled) {
		return
	}
	o := r.failed[id]
	if o == nil {
		o = &Object{Kind: kind, Name: name, Since: r.now()}
		r.failed[id] = o
	}
	if o.Err == nil || o.Err.Error() != err.Error() {
		r.log.Error("cannot reconcile", "kind", kind, "name", name, "error", err)
	}
	o.Err, o.Tries = err, o.Tries+1
}

func (r *Reconciler) forget(kind string, all bool) {
	maps.DeleteFunc(r.failed, func(_ string, o *Object) bool { return all && o.Kind == kind })
}

// retryIn is the wait before the object that failed least often is tried again; 0 when nothing failed.
func (r *Reconciler) retryIn() time.Duration {
	wait := time.Duration(0)
	for _, o := range r.failed {
		d := min(firstRetry<<min(o.Tries-1, 10), maxRetry)
		if wait == 0 || d < wait {
			wait = d
		}
	}
	// Spread, so that a fleet that lost the same thing does not come back in step.
	return wait/2 + time.Duration(rand.Int64N(int64(wait/2)+1))
}

func (r *Reconciler) publish(in Input, version uint64, d desired, now time.Time) {
	s := Status{AppliedAt: now, Peers: d.peers, Enforced: r.real.view != nil}
	for _, o := range r.failed {
		s.Failed = append(s.Failed, *o)
	}
	slices.SortFunc(s.Failed, func(a, b Object) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name))
	})
	r.in.mu.Lock()
	defer r.in.mu.Unlock()
	s.Epoch, s.PolicyRevision = r.in.status.Epoch, r.in.status.PolicyRevision
	if in.Snapshot != nil && s.Enforced {
		s.PolicyRevision = in.Snapshot.Manifest.PolicyRevision
		if len(s.Failed) == 0 {
			s.Epoch = in.Snapshot.Manifest.Epoch
		}
	}
	r.in.status, r.in.done = s, version
	close(r.in.passed)
	r.in.passed = make(chan struct{})
}

// Forget makes the next Run say everything anew: the target was closed and opened again. It must not be called while
// Run runs.
func (r *Reconciler) Forget() {
	r.real = applied{peers: map[key.Public]mesh.Peer{}, keepalive: map[key.Public]time.Duration{}}
	clear(r.failed)
	r.in.mu.Lock()
	defer r.in.mu.Unlock()
	r.in.status.Enforced, r.in.status.Failed, r.in.status.Peers = false, nil, nil
}
