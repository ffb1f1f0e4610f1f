package tunnel

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/signet-overlay/signet/internal/key"
)

// Carrier is the network device of a kernel tunnel. Package link makes it: it alone speaks that protocol of the kernel.
// Its methods may be called from any thread.
type Carrier interface {
	// State reports whether the device is up, and how often it went down since it was opened. The kernel then forgot its
	// sessions, but not their times.
	State() (up bool, downs uint64)
	// Refused counts packets from peers that were dropped after decryption: see Kernel.Limits.
	Refused() (uint64, error)
	// Done is closed when the device was removed.
	Done() <-chan struct{}
	// Close ends what watches the device. The device stays.
	Close() error
}

// Kernel is the WireGuard engine of the kernel. It implements Device.
//
// The device goes on carrying traffic with its peers and sessions while no agent runs. A new agent takes the peers over
// as they are; its first Prune removes those that are no more.
type Kernel struct {
	name    string
	public  key.Public
	log     *slog.Logger
	control *control
	carrier Carrier

	// now wakes the endpoint routine at once. It holds one signal: more of them mean the same.
	now      chan struct{}
	done     chan struct{} // closed by routineGone
	cancel   context.CancelFunc
	routines sync.WaitGroup

	mu    sync.Mutex // guards table and what is done to the kernel's peers
	table kernelTable
}

var _ Device = (*Kernel)(nil)

// kernelTable is what we want of the kernel, and what we know about reaching peers.
type kernelTable struct {
	up      bool
	closed  bool
	port    int
	mark    int
	downs   uint64 // of the carrier when it was looked at last
	peers   map[key.Public]*kernelEntry
	holders map[netip.Prefix]key.Public // which peer an allowed address belongs to
}

// kernelEntry is one peer.
type kernelEntry struct {
	desc Peer // in normal form, as it is in force; but the keepalive waits for a session, see kickLocked
	path path
	// signs is what the kernel's counters reveal, which tells no events.
	signs signs
	// before counts what the kernel counted before the peer was made anew.
	before struct{ rx, tx uint64 }
	kicked time.Time // when an initiation was last asked for
}

// OpenKernel makes or adopts the device, by carrier, and gives it its key and port. It runs in the network namespace of
// the calling thread. A device that was adopted may be up and carry traffic of its old peers; a new one does nothing until
// package link sets it up and Up is called.
func OpenKernel(ctx context.Context, cfg Config, carrier func(name string, mtu int) (Carrier, error)) (*Kernel, error) {
	if err := errors.Join(ctx.Err(), cfg.check()); err != nil {
		return nil, fmt.Errorf("open tunnel: %w", err)
	}
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	dev, err := carrier(cfg.Name, cfg.MTU)
	if err != nil {
		return nil, fmt.Errorf("open tunnel: %w", err)
	}
	k := &Kernel{
		name: cfg.Name, public: cfg.PrivateKey.Public(), log: cfg.Logger, carrier: dev,
		now: make(chan struct{}, 1), done: make(chan struct{}),
		table: kernelTable{peers: make(map[key.Public]*kernelEntry), holders: make(map[netip.Prefix]key.Public)},
	}
	if k.control, err = openControl(cfg.Name); err == nil {
		if err = k.configure(cfg); err != nil {
			err = errors.Join(err, k.control.close())
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open tunnel: %w", err), dev.Close())
	}
	run, cancel := context.WithCancel(context.Background()) // its life ends with Close, not with the opening call
	k.cancel = cancel
	k.routines.Go(func() { lookUntil(run, k.now, nil, k.look) })
	k.routines.Go(func() { k.routineGone(run) })
	return k, nil
}

// configure gives the device what it does not have yet. What it has stays untouched, so that sessions outlive an agent;
// a device with the key of another identity starts without peers.
func (k *Kernel) configure(cfg Config) error {
	r, err := k.control.read()
	if err != nil {
		return err
	}
	var change deviceChange
	if r.public != k.public {
		change.private, change.replacePeers = cfg.PrivateKey, true
		clear(r.peers)
	}
	if cfg.ListenPort != 0 && cfg.ListenPort != r.listenPort {
		change.port = &cfg.ListenPort
	}
	if change.replacePeers || change.port != nil {
		if err := k.control.device(change); err != nil {
			return fmt.Errorf("%w; is the UDP port %d in use by another program?", err, cfg.ListenPort)
		}
	}
	_, k.table.downs = k.carrier.State()
	k.table.mark = r.mark
	now := time.Now()
	for public, w := range r.peers {
		desc := Peer{Key: public, AllowedIPs: slices.SortedFunc(slices.Values(w.allowed), comparePrefix), Keepalive: w.keepalive}
		e := k.newEntry(desc)
		e.signs, _ = e.signs.observe(now, w)
		e.path = e.path.observe(now, w.endpoint, w.handshake)
		k.table.peers[public] = e
		for _, a := range desc.AllowedIPs {
			k.table.holders[a] = public
		}
	}
	return nil
}

func (k *Kernel) newEntry(p Peer) *kernelEntry {
	return &kernelEntry{desc: p, path: path{follower: bytes.Compare(k.public.Bytes(), p.Key.Bytes()) > 0}}
}

// routineGone closes done when the device is removed or Close is called, which waits for it.
func (k *Kernel) routineGone(ctx context.Context) {
	defer close(k.done)
	select {
	case <-k.carrier.Done():
	case <-ctx.Done():
	}
}

// Kind is what status calls this engine.
func (k *Kernel) Kind() string { return "kernel" }

// Limits says in plain sentences what this engine does not do and the embedded one does. It may be called at any time.
func (k *Kernel) Limits() []string {
	count := "the count cannot be read"
	n, err := k.carrier.Refused()
	if err == nil {
		count = fmt.Sprintf("%d until now", n)
	}
	return []string{
		"kernel WireGuard counts packets that a peer sent from an address not bound to it for the whole device and not for each peer, together with packets that are not IP (" + count + "): the refused_source of every peer is 0; " +
			"which peer it was, the kernel says only in its log, and only with dynamic debugging switched on for the module wireguard and at a limited rate",
		"kernel WireGuard does not look a second time at the source of what leaves by the tunnel: a process outside cgroup_root with CAP_NET_RAW, or below it where the gap no-setsockopt-hook is accepted, " +
			"can send past the judge from any address; the host that receives it drops what is not bound to this host, and judges the rest",
	}
}

// Up initiates to every peer whose endpoint is known. The sockets on the underlay are the kernel's, which opens them
// when package link sets the device up: call this afterwards, and again whenever the link may have been set up again,
// because the kernel loses its sessions when it is set down. Otherwise another call does nothing.
func (k *Kernel) Up(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.usableLocked(ctx); err != nil {
		return err
	}
	first := !k.table.up
	now := time.Now()
	r, err := k.observeLocked(now)
	if err != nil {
		return err
	}
	k.table.up = true
	k.table.port = r.listenPort
	if first {
		for _, e := range k.table.peers {
			e.path = e.path.restart(now, e.desc.Endpoints)
		}
	}
	signal(k.now)
	return nil
}

// ListenPort is the UDP port on the underlay; 0 before Up.
func (k *Kernel) ListenPort() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.table.port
}

// SetOwnAddresses does nothing: the kernel does not look at the source of what leaves. See Limits.
func (k *Kernel) SetOwnAddresses([]netip.Addr) {}

// RefusedOwn is always 0. See Limits.
func (k *Kernel) RefusedOwn() uint64 { return 0 }

// RoutesChanged makes the kernel forget from which local address it last reached each peer. Call it when addresses or
// routes of the underlay have changed. Sessions go on.
func (k *Kernel) RoutesChanged(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.usableLocked(ctx); err != nil {
		return err
	}
	return k.control.device(deviceChange{mark: &k.table.mark})
}

// Done is closed when the engine has ended: by Close, or because its network device was deleted by somebody else.
func (k *Kernel) Done() <-chan struct{} { return k.done }

// Update implements Device.
func (k *Kernel) Update(ctx context.Context, p Peer) error {
	p, err := normal(p)
	if err != nil {
		return err
	}
	if p.Key == k.public {
		return fmt.Errorf("%w %s: it is this host's own key", ErrPeer, p.Key.Short())
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.usableLocked(ctx); err != nil {
		return err
	}
	if e, ok := k.table.peers[p.Key]; ok {
		return k.changeLocked(e, p)
	}
	return k.createLocked(p)
}

// Delete implements Device.
func (k *Kernel) Delete(ctx context.Context, public key.Public) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.usableLocked(ctx); err != nil {
		return err
	}
	return k.deleteLocked(public)
}

// Prune implements Device.
func (k *Kernel) Prune(ctx context.Context, keep []key.Public) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.usableLocked(ctx); err != nil {
		return err
	}
	wanted := make(map[key.Public]struct{}, len(keep))
	for _, public := range keep {
		wanted[public] = struct{}{}
	}
	var errs []error
	for public := range k.table.peers {
		if _, ok := wanted[public]; !ok {
			errs = append(errs, k.deleteLocked(public))
		}
	}
	return errors.Join(errs...)
}

// Status implements Device.
func (k *Kernel) Status() ([]PeerStatus, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.usableLocked(context.Background()); err != nil {
		return nil, err
	}
	now := time.Now()
	r, err := k.observeLocked(now)
	if err != nil {
		return nil, err
	}
	out := make([]PeerStatus, 0, len(k.table.peers))
	for public, e := range k.table.peers {
		w := r.peers[public]
		s := PeerStatus{
			Key: public, Endpoint: w.endpoint, LastHandshake: e.path.handshake, RxBytes: e.before.rx + w.rx, TxBytes: e.before.tx + w.tx,
			AllowedIPs: w.allowedIPs, Up: k.table.up && e.path.live(now),
		}
		if !s.Up && e.path.works.IsValid() {
			s.Endpoint = e.path.works
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b PeerStatus) int { return bytes.Compare(a.Key.Bytes(), b.Key.Bytes()) })
	return out, nil
}

// Close implements Device. It waits for everything that Kernel started. The kernel goes on carrying traffic.
func (k *Kernel) Close() error {
	k.mu.Lock()
	k.table.closed, k.table.up = true, false
	k.mu.Unlock()
	k.cancel()
	k.routines.Wait()
	if err := errors.Join(k.control.close(), k.carrier.Close()); err != nil {
		return fmt.Errorf("close tunnel %s: %w", k.name, err)
	}
	return nil
}

func (k *Kernel) usableLocked(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-k.carrier.Done():
		return fmt.Errorf("%w: %s", ErrClosed, k.name)
	default:
	}
	if k.table.closed {
		return fmt.Errorf("%w: %s", ErrClosed, k.name)
	}
	return nil
}

func (k *Kernel) createLocked(p Peer) error {
	if len(k.table.peers) >= maxPeers {
		return fmt.Errorf("%w %s: there are %d peers already, the most that one tunnel holds", ErrPeer, p.Key.Short(), maxPeers)
	}
	e := k.newEntry(p)
	if err := k.control.peers(e.creation(p.Endpoints...)); err != nil {
		return fmt.Errorf("create peer %s: %w", p.Key.Short(), errors.Join(err, k.control.peers(peerChange{key: p.Key, remove: true})))
	}
	now := time.Now()
	e.path = e.path.restart(now, p.Endpoints)
	if e.path.follower {
		e.path.due = now.Add(followerLag) // both ends learn of each other at about the same moment
	}
	k.table.peers[p.Key] = e
	k.holdLocked(e, p)
	signal(k.now)
	return nil
}

// creation describes a peer that is not there, with the first of the endpoints. The keepalive comes later: with one, the
// kernel would initiate now.
func (e *kernelEntry) creation(endpoints ...netip.AddrPort) peerChange {
	c := peerChange{key: e.desc.Key, create: true, replace: true, add: e.desc.AllowedIPs}
	if len(endpoints) > 0 {
		c.endpoint = endpoints[0]
	}
	return c
}

func (k *Kernel) changeLocked(e *kernelEntry, p Peer) error {
	if equal(e.desc, p) {
		return nil
	}
	changes, err := moveAddresses(e.desc, p)
	if err != nil {
		return err
	}
	now := time.Now()
	if e.desc.Keepalive != p.Keepalive && (p.Keepalive == 0 || e.path.live(now)) {
		changes = append(changes, peerChange{key: p.Key, keepalive: &p.Keepalive})
	}
	if len(changes) > 0 {
		if err := k.control.peers(changes...); err != nil {
			return fmt.Errorf("change peer %s: %w", p.Key.Short(), err)
		}
	}
	moved := !slices.Equal(e.desc.Endpoints, p.Endpoints)
	k.holdLocked(e, p)
	if moved {
		if e.path = e.path.restart(now, p.Endpoints); e.path.follower && e.path.due.Equal(now) {
			e.path.due = now.Add(followerLag) // both ends are told of each other's endpoints at about the same moment
		}
		signal(k.now)
	}
	return nil
}

// moveAddresses turns the addresses of a peer into others without a moment in which one that stays is missing. Replacing
// them as a whole would be such a moment, and a kernel before 6.16 takes no single one away. But it moves an address
// from one peer to another in one step: so those that go are given to a peer that nobody is, which is then removed.
func moveAddresses(from, to Peer) (changes []peerChange, err error) {
	added := without(to.AllowedIPs, from.AllowedIPs)
	gone := without(from.AllowedIPs, to.AllowedIPs)
	if len(added) > 0 {
		changes = append(changes, peerChange{key: to.Key, add: added})
	}
	if len(gone) == 0 {
		return changes, nil
	}
	raw := make([]byte, 32)
	if _, err := rand.Read(raw); err != nil {
		return nil, fmt.Errorf("change peer %s: %w", to.Key.Short(), err)
	}
	nobody, err := key.PublicFromBytes(raw)
	if err != nil {
		return nil, fmt.Errorf("change peer %s: %w", to.Key.Short(), err)
	}
	return append(changes, peerChange{key: nobody, create: true, add: gone}, peerChange{key: nobody, remove: true}), nil
}

// without returns the elements of a that are not in b. Both are sorted.
func without(a, b []netip.Prefix) (out []netip.Prefix) {
	for _, p := range a {
		if _, found := slices.BinarySearchFunc(b, p, comparePrefix); !found {
			out = append(out, p)
		}
	}
	return out
}

// holdLocked records the description as in force. The kernel has already taken its addresses from the peers that held
// them.
func (k *Kernel) holdLocked(e *kernelEntry, p Peer) {
	for _, a := range e.desc.AllowedIPs {
		if k.table.holders[a] == p.Key {
			delete(k.table.holders, a)
		}
	}
	for _, a := range p.AllowedIPs {
		if other, ok := k.table.peers[k.table.holders[a]]; ok && other != e {
			other.desc.AllowedIPs = slices.DeleteFunc(slices.Clone(other.desc.AllowedIPs), func(b netip.Prefix) bool { return a == b })
		}
		k.table.holders[a] = p.Key
	}
	e.desc = p
}

func (k *Kernel) deleteLocked(public key.Public) error {
	e, ok := k.table.peers[public]
	if !ok {
		return nil
	}
	if err := k.control.peers(peerChange{key: public, remove: true}); err != nil {
		return fmt.Errorf("delete peer %s: %w", public.Short(), err)
	}
	for _, a := range e.desc.AllowedIPs {
		if k.table.holders[a] == public {
			delete(k.table.holders, a)
		}
	}
	delete(k.table.peers, public)
	return nil
}
