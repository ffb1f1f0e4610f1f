package tunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tailscale/wireguard-go/device"
	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/internal/key"
)

// Config describes the tunnel of this host.
type Config struct {
	Name       string // of the network device; one that an earlier agent left is adopted
	MTU        int    // 0 means DefaultMTU
	ListenPort int    // UDP; 0 lets the kernel choose
	PrivateKey key.Private
	Logger     *slog.Logger // nil means the default one
}

// Userspace is the WireGuard engine inside this process, on a TUN device. It implements Device.
type Userspace struct {
	name   string
	public key.Public
	log    *slog.Logger

	engine *device.Device
	bind   *roamingBind
	guard  *guard
	events *events

	// now wakes the endpoint routine at once, soon within a second. Both hold one signal: more of them mean the same.
	now, soon chan struct{}
	cancel    context.CancelFunc
	routines  sync.WaitGroup

	mu    sync.Mutex // guards table and what is done to the engine's peers
	table peerTable
}

// peerTable is what we want of the engine, and what we know about reaching it.
type peerTable struct {
	up      bool
	closed  bool
	port    int
	peers   map[key.Public]*entry
	holders map[netip.Prefix]key.Public // which peer an allowed address belongs to
}

// entry is one peer.
type entry struct {
	desc Peer // in normal form, as it is in force
	peer *device.Peer
	path path
}

// OpenUserspace makes or adopts the network device and starts the engine on it, without peers and without a socket
// on the underlay: Up opens that, after the caller has attached what judges packets. It runs in the network namespace
// of the calling thread. Nothing leaves by the device until SetOwnAddresses is called.
func OpenUserspace(ctx context.Context, cfg Config) (*Userspace, error) {
	if err := errors.Join(ctx.Err(), cfg.check()); err != nil {
		return nil, fmt.Errorf("open tunnel: %w", err)
	}
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	dev, err := openTUN(cfg.Name, cfg.MTU)
	if err != nil {
		return nil, fmt.Errorf("open tunnel: %w", err)
	}
	u := &Userspace{
		name: cfg.Name, public: cfg.PrivateKey.Public(), log: cfg.Logger, bind: newRoamingBind(), guard: newGuard(dev),
		now: make(chan struct{}, 1), soon: make(chan struct{}, 1),
		table: peerTable{peers: make(map[key.Public]*entry), holders: make(map[netip.Prefix]key.Public)},
	}
	u.events = newEvents(cfg.Logger, func() { signal(u.soon) })
	u.engine = device.NewDevice(u.guard, u.bind, u.events.logger())
	if err := u.configure(cfg); err != nil {
		u.engine.Close()
		return nil, fmt.Errorf("open tunnel: %w", err)
	}
	run, cancel := context.WithCancel(context.Background()) // its life ends with Close, not with the opening call
	u.cancel = cancel
	u.routines.Go(func() { u.routineEndpoints(run) })
	return u, nil
}

func (c Config) check() error {
	if c.PrivateKey.IsZero() {
		return errors.New("it has no private key")
	}
	if c.MTU != 0 && (c.MTU < minMTU || c.MTU > maxMTU) {
		return fmt.Errorf("MTU %d is not between %d and %d", c.MTU, minMTU, maxMTU)
	}
	if c.ListenPort < 0 || c.ListenPort > 65535 {
		return fmt.Errorf("listen port %d is not between 0 and 65535", c.ListenPort)
	}
	return checkName(c.Name)
}

// configure hands the engine its key, without a text form of it, and its port.
func (u *Userspace) configure(cfg Config) error {
	var private device.NoisePrivateKey
	raw := cfg.PrivateKey.Reveal()
	copy(private[:], raw)
	clear(raw)
	err := u.engine.SetPrivateKey(private)
	clear(private[:])
	if err != nil {
		return fmt.Errorf("set private key: %w", err)
	}
	if err := u.engine.IpcSet(fmt.Sprintf("listen_port=%d\n", cfg.ListenPort)); err != nil {
		return fmt.Errorf("set listen port %d: %w", cfg.ListenPort, err)
	}
	return nil
}

// Up opens the underlay sockets, in the network namespace of the calling thread, and initiates to every peer whose
// endpoint is known. Call it after programs are attached to the device. When the tunnel is up, it does nothing.
func (u *Userspace) Up(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.usableLocked(ctx); err != nil {
		return err
	}
	if u.table.up {
		return nil
	}
	if err := u.engine.Up(); err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			err = fmt.Errorf("the UDP port is in use by another program; choose another listen_port: %w", err)
		}
		return fmt.Errorf("start tunnel %s: %w", u.name, err)
	}
	u.table.up = true
	now := time.Now()
	for _, e := range u.table.peers {
		e.path = e.path.restart(now, e.desc.Endpoints)
	}
	r, err := u.reportLocked()
	u.table.port = r.listenPort
	signal(u.now)
	return err
}

// ListenPort is the UDP port on the underlay; 0 before Up.
func (u *Userspace) ListenPort() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.table.port
}

// SetOwnAddresses says which source addresses may leave this host by the tunnel: those of its workload instances and
// its own. It replaces the set of the call before, atomically for each batch of packets.
func (u *Userspace) SetOwnAddresses(addrs []netip.Addr) { u.guard.own.Store(newAddrSet(addrs)) }

// RoutesChanged makes the engine forget from which local address it last reached each peer, so that the kernel chooses
// anew. Call it when addresses or routes of the underlay have changed. Sessions go on. (The engine's own listener for
// that wants its standard bind.)
func (u *Userspace) RoutesChanged(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.usableLocked(ctx); err != nil {
		return err
	}
	u.bind.forgetSources()
	return nil
}

// RefusedOwn counts packets that were about to leave with a source address that is not this host's own.
func (u *Userspace) RefusedOwn() uint64 { return u.guard.foreign.Load() }

// Kind is what status calls this engine.
func (u *Userspace) Kind() string { return "userspace" }

// Limits says what this engine does not do and another one does: nothing.
func (u *Userspace) Limits() []string { return nil }

// Done is closed when the engine has ended: by Close, or because its network device was deleted by somebody else.
func (u *Userspace) Done() <-chan struct{} { return u.engine.Wait() }

// Update implements Device.
func (u *Userspace) Update(ctx context.Context, p Peer) error {
	p, err := normal(p)
	if err != nil {
		return err
	}
	if p.Key == u.public {
		return fmt.Errorf("%w %s: it is this host's own key", ErrPeer, p.Key.Short())
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.usableLocked(ctx); err != nil {
		return err
	}
	if e, ok := u.table.peers[p.Key]; ok {
		return u.changeLocked(e, p)
	}
	return u.createLocked(p)
}

// Delete implements Device.
func (u *Userspace) Delete(ctx context.Context, k key.Public) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.usableLocked(ctx); err != nil {
		return err
	}
	return u.deleteLocked(k)
}

// Prune implements Device.
func (u *Userspace) Prune(ctx context.Context, keep []key.Public) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err := u.usableLocked(ctx); err != nil {
		return err
	}
	wanted := make(map[key.Public]struct{}, len(keep))
	for _, k := range keep {
		wanted[k] = struct{}{}
	}
	var errs []error
	held := make(map[*device.Peer]struct{}, len(u.table.peers))
	for k, e := range u.table.peers {
		if _, ok := wanted[k]; !ok {
			errs = append(errs, u.deleteLocked(k))
			continue
		}
		held[e.peer] = struct{}{}
	}
	u.events.sweep(held)
	return errors.Join(errs...)
}

// Status implements Device.
func (u *Userspace) Status() ([]PeerStatus, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := time.Now()
	r, err := u.observeLocked(now)
	if err != nil {
		return nil, err
	}
	out := make([]PeerStatus, 0, len(u.table.peers))
	for k, e := range u.table.peers {
		w := r.peers[k]
		s := PeerStatus{
			Key: k, Endpoint: w.endpoint, LastHandshake: w.handshake, RxBytes: w.rx, TxBytes: w.tx,
			AllowedIPs: w.allowedIPs, Up: u.table.up && e.path.live(now), RefusedSource: u.events.at(e.peer).refused.Load(),
		}
		if !s.Up && e.path.works.IsValid() {
			s.Endpoint = e.path.works
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b PeerStatus) int { return bytes.Compare(a.Key.Bytes(), b.Key.Bytes()) })
	return out, nil
}

// Close implements Device. It waits for everything that Userspace started.
func (u *Userspace) Close() error {
	u.mu.Lock()
	u.table.closed, u.table.up = true, false
	u.mu.Unlock()
	u.cancel()
	u.routines.Wait()
	u.engine.Close()
	<-u.engine.Wait()
	if err := u.guard.Close(); err != nil {
		return fmt.Errorf("close tunnel %s: %w", u.name, err)
	}
	return nil
}

func (u *Userspace) usableLocked(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-u.engine.Wait():
		return fmt.Errorf("%w: %s", ErrClosed, u.name)
	default:
	}
	if u.table.closed {
		return fmt.Errorf("%w: %s", ErrClosed, u.name)
	}
	return nil
}

func (u *Userspace) createLocked(p Peer) error {
	if len(u.table.peers) >= maxPeers {
		return fmt.Errorf("%w %s: there are %d peers already, the most that one tunnel holds", ErrPeer, p.Key.Short(), maxPeers)
	}
	if len(p.Endpoints) > 0 {
		u.bind.move(p.Key, p.Endpoints[0])
	}
	if err := u.engine.IpcSet(configCreate(p)); err != nil {
		err = errors.Join(err, u.engine.IpcSet(configRemove(p.Key)))
		u.bind.forget(p.Key)
		return fmt.Errorf("create peer %s: %w", p.Key.Short(), err)
	}
	peer := u.engine.LookupPeer(device.NoisePublicKey(p.Key.Bytes()))
	if peer == nil {
		return fmt.Errorf("create peer %s: %w", p.Key.Short(), ErrClosed)
	}
	e := &entry{desc: p, peer: peer, path: path{follower: bytes.Compare(u.public.Bytes(), p.Key.Bytes()) > 0}}
	now := time.Now()
	e.path = e.path.restart(now, p.Endpoints)
	if e.path.follower {
		e.path.due = now.Add(followerLag) // both ends learn of each other at about the same moment
	}
	u.table.peers[p.Key] = e
	u.holdLocked(e, p)
	signal(u.now)
	return nil
}

func (u *Userspace) changeLocked(e *entry, p Peer) error {
	if equal(e.desc, p) {
		return nil
	}
	if e.desc.Keepalive != p.Keepalive {
		if err := u.engine.IpcSet(configKeepalive(p)); err != nil {
			return fmt.Errorf("change peer %s: %w", p.Key.Short(), err)
		}
	}
	moved := !slices.Equal(e.desc.Endpoints, p.Endpoints)
	u.holdLocked(e, p)
	if moved {
		now := time.Now()
		if e.path = e.path.restart(now, p.Endpoints); e.path.follower && e.path.due.Equal(now) {
			e.path.due = now.Add(followerLag) // both ends are told of each other's endpoints at about the same moment
		}
		signal(u.now)
	}
	return nil
}

// holdLocked makes the peer's addresses those of p, and records p as in force. The engine asks a peer's own list for
// what it receives, and does not take an address from one peer when another gets it: so it is taken from the other
// first, and never belongs to two.
func (u *Userspace) holdLocked(e *entry, p Peer) {
	lost := make(map[*entry]struct{})
	for _, a := range e.desc.AllowedIPs {
		if u.table.holders[a] == p.Key {
			delete(u.table.holders, a)
		}
	}
	for _, a := range p.AllowedIPs {
		if other, ok := u.table.peers[u.table.holders[a]]; ok && other != e {
			other.desc.AllowedIPs = slices.DeleteFunc(slices.Clone(other.desc.AllowedIPs), func(b netip.Prefix) bool { return a == b })
			lost[other] = struct{}{}
		}
		u.table.holders[a] = p.Key
	}
	for other := range lost {
		other.peer.SetAllowedIPs(other.desc.AllowedIPs)
	}
	e.peer.SetAllowedIPs(p.AllowedIPs)
	e.desc = p
}

func (u *Userspace) deleteLocked(k key.Public) error {
	e, ok := u.table.peers[k]
	if !ok {
		return nil
	}
	if err := u.engine.IpcSet(configRemove(k)); err != nil {
		return fmt.Errorf("delete peer %s: %w", k.Short(), err)
	}
	for _, a := range e.desc.AllowedIPs {
		if u.table.holders[a] == k {
			delete(u.table.holders, a)
		}
	}
	delete(u.table.peers, k)
	u.bind.forget(k)
	u.events.forget(e.peer)
	return nil
}

// reportLocked asks the engine for its state.
func (u *Userspace) reportLocked() (report, error) {
	var r reportReader
	if err := u.engine.IpcGetOperation(&r); err != nil {
		return report{}, fmt.Errorf("read state of tunnel %s: %w", u.name, err)
	}
	return r.report, nil
}

// signal puts a wake-up into a one-slot channel; one that is already there serves as well.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
