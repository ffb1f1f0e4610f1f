// Package dataplane is one host's dataplane: the tunnel, the links and the judge, driven together.
//
// Dataplane is the one type that implements agent/reconcile.Target. It owns the order in which things happen: the judge
// is attached before the device is up, routes that catch overlay traffic stand before the device exists, and closing
// leaves every program, pin, route and the device in place, so that enforcement outlives the agent.
//
// The parts are dataplane/tunnel (WireGuard), dataplane/link (devices, addresses, routes) and dataplane/enforce (eBPF).
package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/dataplane/link"
	"github.com/signet-overlay/signet/dataplane/tunnel"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// Config says how to open a dataplane. All fields from Interface to Overlay6 are required.
type Config struct {
	Interface  string // name of the tunnel device
	ListenPort int    // UDP port of WireGuard
	MTU        int    // of the tunnel device, bytes
	PrivateKey key.Private
	CgroupRoot string // directory of the cgroup v2 root, or of a subtree
	BPFFS      string // directory for pins
	Overlay4   netip.Prefix
	Overlay6   netip.Prefix
	Logger     *slog.Logger

	Handshakes HandshakeGuard
	AcceptGaps []string // names of gaps that the operator accepts (GapNames); without one that this host has, nothing starts
	Clsact     bool     // judge devices by clsact even where the kernel has tcx
	Tunnel     string   // which WireGuard: TunnelKernel, TunnelUserspace, or TunnelAuto, which "" means too

	filters enforce.Filters // set by Open and Release
	without []string        // hooks that are taken for missing, for tests
}

// Values of Config.Tunnel.
const (
	TunnelAuto      = "auto" // the kernel's where it works, the embedded one otherwise
	TunnelKernel    = "kernel"
	TunnelUserspace = "userspace"
)

// DefaultMTU leaves room for WireGuard over IPv6 on an underlay of 1500 bytes.
const DefaultMTU = 1420

// PeerStatus is what the tunnel knows of one peer.
type PeerStatus struct {
	Key           key.Public
	Endpoint      netip.AddrPort
	LastHandshake time.Time
	RxBytes       uint64
	TxBytes       uint64
	Up            bool
	RefusedSource uint64 // packets that cryptokey routing refused
}

// HookStatus is one attachment of the judge.
type HookStatus struct {
	Name     string `json:"name"`
	Attached bool   `json:"attached"`
	Error    string `json:"error,omitempty"`
}

// Counter counts verdicts.
type Counter struct {
	Verdict flow.Verdict `json:"verdict"`
	Reason  flow.Reason  `json:"reason"`
	Packets uint64       `json:"packets"`
}

// Status is the dataplane as it really is.
type Status struct {
	TunnelKind string // userspace or kernel
	Interface  string
	Port       int
	Mode       string // enforce, or down
	Hooks      []HookStatus
	Healthy    bool
	Warnings   []string // what is not guarded, in plain sentences
	Counters   []Counter
	LostEvents uint64
}

// Dataplane is one host's dataplane.
type Dataplane struct {
	cfg    Config
	judge  *enforce.Enforcer
	clsact *link.Clsact
	gaps   []foundGap // what this host has, all of them accepted

	host  hostState
	looks int               // at the hooks; only Repair's goroutine has it
	told  map[string]string // what Repair told last of each thing that it cannot put back; only its goroutine has it
	mu    sync.Mutex        // guards peers, and that they reach the tunnel in order
	// peers holds what was last said of each peer: two methods say it.
	peers map[key.Public]tunnel.Peer

	engine engineSlot

	revoking *revoking
	flood    *enforce.Flood // nil where it is off
	floodErr error          // why it is not there, though it is asked for
}

// engine is what both kinds of tunnel can do.
type engine interface {
	tunnel.Device
	lifecycle
	reacher
	Kind() string
	// Limits says in plain sentences what the other kind does and this one does not.
	Limits() []string
}

// lifecycle is how an engine starts and ends.
type lifecycle interface {
	Up(ctx context.Context) error
	ListenPort() int
	Done() <-chan struct{}
	SetOwnAddresses(addrs []netip.Addr)
	RefusedOwn() uint64
}

// reacher is how an engine gets to peers.
type reacher interface {
	RoutesChanged(ctx context.Context) error
	Handshake(ctx context.Context, k key.Public) (time.Duration, error)
}

// engineSlot holds the tunnel's engine: another one takes its place when somebody removes the device underneath it.
type engineSlot struct {
	mu       sync.Mutex
	tunnel   engine // nil before open
	fallback string // why TunnelAuto took the embedded engine; "" when it did not
}

// tunnel is the engine of now.
func (d *Dataplane) tunnel() engine {
	d.engine.mu.Lock()
	defer d.engine.mu.Unlock()
	return d.engine.tunnel
}

// tunnelWarnings says what is not as it could be with the tunnel.
func (d *Dataplane) tunnelWarnings() []string {
	d.engine.mu.Lock()
	now, fallback := d.engine.tunnel, d.engine.fallback
	d.engine.mu.Unlock()
	if fallback != "" {
		return append([]string{fallback}, now.Limits()...)
	}
	return now.Limits()
}

// hostState is what Repair needs to put back.
type hostState struct {
	mu   sync.Mutex
	spec link.Spec // zero before UpdateHost
	down bool
}

// Open makes or adopts the tunnel device and the judge. Until Enforce is called on a fresh host, nothing passes; on a
// host whose pins outlived an agent, what was enforced stays enforced.
func Open(ctx context.Context, cfg Config) (*Dataplane, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	found, err := checkGaps(cfg)
	if err != nil {
		return nil, err
	}
	for _, f := range found {
		cfg.Logger.Warn("accepted gap", "gap", f.name, "means", f.means, "error", f.why)
	}
	if err := enforce.MountBPFFS(cfg.BPFFS); err != nil {
		return nil, fmt.Errorf("prepare pins: %w", err)
	}
	filters, err := link.NewClsact()
	if err != nil {
		return nil, err
	}
	cfg.filters = filters
	judge, err := enforce.Open(enforceConfig(cfg))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open judge: %w", err), filters.Close())
	}
	d := &Dataplane{cfg: cfg, judge: judge, clsact: filters, gaps: found, peers: map[key.Public]tunnel.Peer{}}
	if err := d.open(ctx); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// checkGaps refuses a host that cannot give what nobody has accepted to miss.
func checkGaps(cfg Config) ([]foundGap, error) {
	p, err := probeHost(cfg)
	if err != nil {
		return nil, fmt.Errorf("find out what this host has: %w", err)
	}
	return judgeGaps(p, cfg.AcceptGaps)
}

// open attaches the judge to every device before the tunnel's can carry anything.
func (d *Dataplane) open(ctx context.Context) error {
	if err := d.guardLinks(); err != nil {
		return err
	}
	if err := d.openTunnel(ctx); err != nil {
		return err
	}
	d.startHandshakeGuard()
	return d.startRevoking() // it judges nothing, so that traffic does not wait for it
}

// openTunnel makes or adopts the tunnel's device and attaches the judge to it. The device is not up afterwards, unless it
// was before.
func (d *Dataplane) openTunnel(ctx context.Context) error {
	next, fallback, err := chooseTunnel(ctx, d.cfg)
	if err != nil {
		return err
	}
	d.engine.mu.Lock()
	d.engine.tunnel, d.engine.fallback = next, fallback
	d.engine.mu.Unlock()
	i, err := net.InterfaceByName(d.cfg.Interface)
	if err != nil {
		return fmt.Errorf("find %s: %w", d.cfg.Interface, err)
	}
	if err := d.judge.AttachTunnel(i.Index); err != nil {
		return fmt.Errorf("judge %s: %w", d.cfg.Interface, err)
	}
	return nil
}

// chooseTunnel opens the engine that is wanted. fallback says why it is not the kernel's, where that was preferred.
func chooseTunnel(ctx context.Context, cfg Config) (next engine, fallback string, err error) {
	tc := tunnel.Config{Name: cfg.Interface, MTU: cfg.MTU, ListenPort: cfg.ListenPort, PrivateKey: cfg.PrivateKey, Logger: cfg.Logger}
	kernel, fallback, err := wantKernel(cfg.Tunnel)
	if err != nil {
		return nil, "", err
	}
	if kernel {
		next, err := openKernel(ctx, tc)
		if err != nil {
			return nil, "", err
		}
		return next, "", nil
	}
	if fallback != "" {
		cfg.Logger.Info(fallback)
	}
	removed, err := link.RemoveWireGuard(cfg.Interface)
	if err != nil {
		return nil, "", fmt.Errorf("make room for the embedded engine: %w", err)
	}
	if removed {
		cfg.Logger.Warn("the tunnel changed its kind: the kernel's WireGuard device that was there is replaced, and its sessions begin anew", "device", cfg.Interface)
	}
	u, err := tunnel.OpenUserspace(ctx, tc)
	if err != nil {
		return nil, "", err
	}
	return u, fallback, nil
}

// wantKernel decides which engine it is to be, by what this host can do. That it cannot is an error only where nothing else
// is wanted.
func wantKernel(kind string) (kernel bool, fallback string, err error) {
	switch kind {
	case TunnelUserspace:
		return false, "", nil
	case TunnelKernel, TunnelAuto, "":
	default:
		return false, "", fmt.Errorf("tunnel kind %q is none of %s, %s, %s", kind, TunnelAuto, TunnelKernel, TunnelUserspace)
	}
	err = link.ProbeWireGuard()
	switch {
	case err == nil:
		return true, "", nil
	case kind == TunnelKernel:
		return false, "", fmt.Errorf("tunnel: %s: %w; use %s or %s", TunnelKernel, err, TunnelAuto, TunnelUserspace)
	}
	return false, err.Error() + "; using the embedded engine", nil
}

// openKernel opens the kernel's engine. A TUN device that the embedded one left is replaced: what catches overlay traffic
// meanwhile are the routes without a device, and the new one is not up before the judge is attached to it.
func openKernel(ctx context.Context, tc tunnel.Config) (*tunnel.Kernel, error) {
	device := func(name string, mtu int) (tunnel.Carrier, error) { return link.OpenWireGuard(name, mtu) }
	k, err := tunnel.OpenKernel(ctx, tc, device)
	if !errors.Is(err, link.ErrTUN) {
		return k, err
	}
	if err := tunnel.RemoveDevice(tc.Name); err != nil {
		return nil, fmt.Errorf("make room for the kernel's WireGuard: %w", err)
	}
	tc.Logger.Warn("the tunnel changed its kind: the embedded engine's TUN device that was there is replaced, and its sessions begin anew", "device", tc.Name)
	return tunnel.OpenKernel(ctx, tc, device)
}

func enforceConfig(cfg Config) enforce.Config {
	return enforce.Config{BPFFS: cfg.BPFFS, CgroupRoot: cfg.CgroupRoot, Overlay4: cfg.Overlay4, Overlay6: cfg.Overlay6, Logger: cfg.Logger,
		Filters: cfg.filters, Clsact: cfg.Clsact, Accept: acceptedHooks(cfg.AcceptGaps), Without: cfg.without}
}

// guardLinks attaches the guard to every device that is neither the tunnel nor loopback, and forgets the guards of
// devices that are gone: on a host of containers they come and go for ever.
func (d *Dataplane) guardLinks() error {
	guards := d.judge.Guards() // first, so that no device is younger than the list of links
	links, err := link.Links()
	if err != nil {
		return err
	}
	var errs []error
	for _, index := range guards {
		if slices.ContainsFunc(links, func(l link.Info) bool { return l.Index == index }) {
			continue
		}
		if err := d.judge.DetachGuard(index); err != nil {
			errs = append(errs, fmt.Errorf("forget the guard of device %d: %w", index, err))
		}
	}
	for _, l := range links {
		if l.Loopback || l.Name == d.cfg.Interface {
			continue
		}
		if err := d.judge.AttachGuard(l.Index, l.Name); err != nil {
			errs = append(errs, fmt.Errorf("guard %s: %w", l.Name, err))
		}
	}
	return errors.Join(errs...)
}

// UpdateHost is part of reconcile.Target.
func (d *Dataplane) UpdateHost(ctx context.Context, self mesh.Self, addrs []netip.Addr) error {
	spec := link.Spec{Interface: d.cfg.Interface, MTU: d.cfg.MTU, Node: self.Addresses, Addresses: addrs,
		Overlay: []netip.Prefix{d.cfg.Overlay4, d.cfg.Overlay6}}
	if self.Overlay4 != d.cfg.Overlay4 || self.Overlay6 != d.cfg.Overlay6 {
		return fmt.Errorf("overlay ranges changed from %v and %v to %v and %v: restart signetd", d.cfg.Overlay4, d.cfg.Overlay6, self.Overlay4, self.Overlay6)
	}
	d.host.mu.Lock()
	defer d.host.mu.Unlock()
	spec.Behind = withoutOwn(d.host.spec.Behind, spec)
	if err := d.applyHost(ctx, spec); err != nil {
		return err
	}
	d.host.spec = spec
	return nil
}

// applyHost puts the device, its addresses and routes right, and removes what is too much last.
func (d *Dataplane) applyHost(ctx context.Context, spec link.Spec) error {
	if err := link.Apply(ctx, spec); err != nil {
		return err
	}
	d.tunnel().SetOwnAddresses(ownAddresses(spec))
	if err := link.Up(ctx, spec); err != nil {
		return err
	}
	if err := d.tunnel().Up(ctx); err != nil {
		return err
	}
	return link.Prune(ctx, spec)
}

// Enforce is part of reconcile.Target.
func (d *Dataplane) Enforce(ctx context.Context, v *policy.View) error {
	before := d.judge.Generation()
	err := d.judge.Apply(ctx, v)
	if d.judge.Generation() != before {
		d.revoking.changed()
	}
	if err != nil {
		return err
	}
	d.setDown(false)
	return nil
}

// DenyAll keeps every hook and lets no overlay packet pass (signet down).
func (d *Dataplane) DenyAll(context.Context) error {
	if err := d.judge.DenyAll(); err != nil {
		return err
	}
	d.revoking.changed()
	d.setDown(true)
	return nil
}

func (d *Dataplane) setDown(down bool) {
	d.host.mu.Lock()
	defer d.host.mu.Unlock()
	d.host.down = down
}

// UpdatePeer is part of reconcile.Target.
func (d *Dataplane) UpdatePeer(ctx context.Context, p mesh.Peer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	next := tunnel.Peer{Key: p.Key, Endpoints: p.Endpoints, Keepalive: d.peers[p.Key].Keepalive}
	for _, a := range p.AllowedIPs {
		next.AllowedIPs = append(next.AllowedIPs, netip.PrefixFrom(a, a.BitLen()))
	}
	return d.updateLocked(ctx, next)
}

// UpdateKeepalive sends empty packets to a peer in this interval, so that a NAT keeps its mapping; 0 stops them.
func (d *Dataplane) UpdateKeepalive(ctx context.Context, k key.Public, every time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	next, ok := d.peers[k]
	if !ok {
		return fmt.Errorf("keep %s alive: %w", k.Short(), tunnel.ErrNoPeer)
	}
	next.Keepalive = every
	return d.updateLocked(ctx, next)
}

func (d *Dataplane) updateLocked(ctx context.Context, p tunnel.Peer) error {
	if err := d.tunnel().Update(ctx, p); err != nil {
		return err
	}
	d.peers[p.Key] = p
	return nil
}

// DeletePeer is part of reconcile.Target.
func (d *Dataplane) DeletePeer(ctx context.Context, k key.Public) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.peers, k)
	return d.tunnel().Delete(ctx, k)
}

// PrunePeers is part of reconcile.Target.
func (d *Dataplane) PrunePeers(ctx context.Context, keep []key.Public) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for k := range d.peers {
		if !slices.Contains(keep, k) {
			delete(d.peers, k)
		}
	}
	return d.tunnel().Prune(ctx, keep)
}

// Handshake makes WireGuard prove the peer anew and returns how long that took.
func (d *Dataplane) Handshake(ctx context.Context, k key.Public) (time.Duration, error) {
	return d.tunnel().Handshake(ctx, k)
}

// Candidates lists this host's own underlay addresses as WireGuard endpoints.
func (d *Dataplane) Candidates() ([]netip.AddrPort, error) {
	return link.Candidates(d.cfg.ListenPort, link.Exclude{Interfaces: []string{d.cfg.Interface}, Prefixes: []netip.Prefix{d.cfg.Overlay4, d.cfg.Overlay6}})
}

// Close stops the tunnel's engine and leaves everything else in place; with the kernel's, traffic goes on.
func (d *Dataplane) Close() error {
	var errs []error
	if t := d.tunnel(); t != nil {
		errs = append(errs, t.Close())
	}
	if d.flood != nil {
		errs = append(errs, d.flood.Close())
	}
	errs = append(errs, d.revoking.close(), d.judge.Close())
	if d.clsact != nil {
		errs = append(errs, d.clsact.Close())
	}
	return errors.Join(errs...)
}

// Release removes the device, its addresses and routes, and every pin (signet down --release). It needs no open
// Dataplane.
func Release(cfg Config) error {
	spec := link.Spec{Interface: cfg.Interface, MTU: cfg.MTU, Overlay: []netip.Prefix{cfg.Overlay4, cfg.Overlay6}}
	// The device goes before the judge: until then nothing can pass unjudged, and afterwards nothing can pass.
	if removed, err := link.RemoveWireGuard(cfg.Interface); err != nil {
		return err
	} else if !removed {
		if err := tunnel.RemoveDevice(cfg.Interface); err != nil {
			return err
		}
	}
	filters, err := link.NewClsact()
	if err != nil {
		return err
	}
	cfg.filters = filters
	return errors.Join(enforce.Release(enforceConfig(cfg)), filters.Close(), link.Release(context.Background(), spec))
}

// Preflight refuses hosts on which the dataplane cannot work: no WireGuard of the wanted kind, no BPF permission, a gap that nobody has
// accepted, an overlay range that the host already routes elsewhere. The error names the culprit.
func Preflight(cfg Config) error {
	if kernel, _, err := wantKernel(cfg.Tunnel); err != nil {
		return err
	} else if !kernel {
		if _, err := tunnel.Probe(); err != nil {
			return err
		}
	}
	if err := enforce.MountBPFFS(cfg.BPFFS); err != nil {
		return err
	}
	if _, err := checkGaps(cfg); err != nil {
		return err
	}
	if !cfg.Overlay4.IsValid() { // before enrolment nobody knows the ranges
		return nil
	}
	conflicts, err := link.Overlaps([]netip.Prefix{cfg.Overlay4, cfg.Overlay6}, cfg.Interface)
	if err != nil {
		return err
	}
	if len(conflicts) > 0 {
		return fmt.Errorf("%s", conflicts[0])
	}
	return nil
}
