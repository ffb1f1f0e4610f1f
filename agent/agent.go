package agent

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-overlay/signet/agent/attest"
	"github.com/signet-overlay/signet/agent/flowlog"
	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/agent/reconcile"
	"github.com/signet-overlay/signet/agent/session"
	"github.com/signet-overlay/signet/agent/state"
	"github.com/signet-overlay/signet/agent/svid"
	"github.com/signet-overlay/signet/dataplane"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/task"
	"github.com/signet-overlay/signet/proto/codec"
)

// readyTimeout bounds how long a start waits for the first pass before it says that it is ready all the same.
const readyTimeout = 5 * time.Second

// Agent is one host's agent.
type Agent struct {
	cfg  Config
	deps Deps
	log  *slog.Logger
	parts
	facts
}

// parts are made once, before anything runs.
type parts struct {
	dir     *state.Dir
	root    string // of cgroups
	paths   *attest.Paths
	watcher *attest.Watcher
	plane   *plane // for the reconciler alone; others use opened
	rec     *reconcile.Reconciler
	flows   *flowlog.Log
	file    *flowlog.File // nil without flow_log.file
	client  atomic.Pointer[session.Client]
	rotator atomic.Pointer[svid.Rotator]
	id      atomic.Pointer[state.Identity] // nil before enrolment
}

// facts change while the agent runs.
type facts struct {
	joining sync.Mutex // held while one enrolment is under way
	saving  sync.Mutex // held while the identity is changed on disk

	enrolled chan struct{} // closed when there is an identity
	ready    chan struct{} // one slot: the overlay ranges are known, or the switch moved
	grown    chan struct{} // one slot: a snapshot was taken in

	mu       sync.Mutex
	held     *codec.Held
	refused  error // why the last snapshot was not accepted
	lost     error // why the coordinator is not connected
	online   string
	pending  bool
	position state.Switch
	open     *Dataplane // nil while none is
	release  chan chan error
	match    attest.Result
	hints    map[string][]netip.AddrPort
	seen     []netip.AddrPort
	reached  []netip.AddrPort // where the coordinator says that this host is reached: its own addresses and what it saw
	seenAt   time.Time
	warnings map[string]string // by topic
}

// New makes an agent; nothing happens before Run.
func New(cfg Config, deps Deps, log *slog.Logger) (*Agent, error) {
	a := &Agent{cfg: cfg, deps: deps, log: log}
	a.root = cfg.CgroupRoot
	real, whole, err := attest.FindRoot()
	if a.root == auto {
		if err != nil {
			return nil, fmt.Errorf("cgroup_root: %w", err)
		}
		a.root = real
	}
	a.plane = &plane{}
	a.paths, a.watcher = attest.NewPaths(a.root), attest.NewWatcher(cfg.attestHost(a.root), log)
	a.rec = reconcile.New(a.plane, reconcile.OnLeaseEnd(cfg.OnLeaseEnd), log)
	a.flows = flowlog.New(cfg.Node, a.paths.Unit)
	if cfg.FlowLog.File != "" {
		a.file = flowlog.NewFile(cfg.FlowLog.File, log)
	}
	a.enrolled, a.ready, a.release = make(chan struct{}), make(chan struct{}, 1), make(chan chan error)
	a.grown = make(chan struct{}, 1)
	a.warnings = map[string]string{}
	switch {
	case err == nil && real != a.root:
		a.warnings["cgroup_root"] = "cgroup_root is " + a.root + ", below " + real + ": processes outside it are not judged by their identity"
	case !whole:
		a.warnings["cgroup_root"] = "cgroup_root " + a.root + " is not the whole tree of this machine: processes outside it are not judged by their identity"
	}
	return a, nil
}

// Run is the agent's life. It returns nil when ctx ends, and leaves enforcement in place in every case.
func (a *Agent) Run(ctx context.Context) (err error) {
	if a.dir, err = state.Open(a.cfg.StateDir, a.cfg.KeyFile); err != nil {
		return err //nolint:wrapcheck // one plain sentence already
	}
	defer func() { err = errors.Join(err, a.dir.Close()) }()
	id, err := a.dir.LoadIdentity()
	if err != nil && !errors.Is(err, state.ErrNone) {
		return err //nolint:wrapcheck // as above
	}
	if a.position, err = a.dir.LoadSwitch(); err != nil {
		a.warn("switch", err.Error())
	}
	server, err := localapi.Listen(a.cfg.Socket, a, a, a.log)
	if err != nil {
		return err //nolint:wrapcheck // as above
	}
	g := task.New(ctx)
	g.Go("localapi", server.Run)
	if a.file != nil {
		g.Go("flowlog.file", func(ctx context.Context) error { return a.file.Run(ctx, a.flows) })
	}
	g.Go("clock", func(ctx context.Context) error { return watchClock(ctx, a.clockJumped) })
	g.Go("memory", func(ctx context.Context) error { return a.trimMemory(ctx, freeMemory) })
	if id.Enrolled() {
		a.admit(id)
	}
	a.took() // a start counts as one
	g.Go("agent", a.live)
	return g.Wait() //nolint:wrapcheck // tasks name themselves
}

// live goes through the stages that need each other: identity, snapshot, dataplane.
func (a *Agent) live(ctx context.Context) error {
	if err := a.join(ctx); err != nil {
		return err
	}
	id := a.identity()
	a.loadState()
	g := task.New(ctx)
	rotator := svid.NewRotator(issuer{a}, a.log)
	a.rotator.Store(rotator)
	client := session.NewClient(session.Client{Coordinators: a.coordinators(), Trust: a.trust(), Log: a.log,
		Certificate: a.identityCertificate, Bundle: func() identity.Bundle { return a.identity().Bundle }})
	a.client.Store(client)
	// From the disk first, when there is something: a host comes back before its coordinator does.
	g.Go("dataplane", a.keepOpen)
	g.Go("svid.rotate", rotator.Run)
	g.Go("session", func(ctx context.Context) error { return client.Run(ctx, host{a}) })
	a.log.Info("agent runs", "node", id.ID().String())
	return g.Wait() //nolint:wrapcheck // tasks name themselves
}

// keepOpen opens the dataplane whenever it should be open: as soon as the overlay's ranges are known, and until a
// release. A host where it cannot work ends the agent with one sentence.
func (a *Agent) keepOpen(ctx context.Context) error {
	a.sayReady()
	for {
		cfg, ok := a.planeConfig()
		if !ok {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-a.ready:
				continue
			case done := <-a.release:
				done <- a.deps.Release(cfg)
				continue
			}
		}
		done, err := a.drive(ctx, cfg)
		if done == nil {
			return err
		}
		if err == nil {
			err = a.deps.Release(cfg)
		}
		done <- err
	}
}

// drive opens the dataplane and drives it until ctx ends or until a release is asked for, which is returned.
func (a *Agent) drive(ctx context.Context, cfg dataplane.Config) (release chan error, err error) {
	if err := a.deps.Preflight(cfg); err != nil {
		return nil, fmt.Errorf("this host cannot carry the overlay: %w", err)
	}
	dp, err := a.deps.Open(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open dataplane: %w", err)
	}
	a.plane.Dataplane = dp
	a.setOpen(&dp)
	g := task.New(ctx)
	a.look()
	version := a.rec.Set(func(*reconcile.Input) {})
	g.Go("reconcile", a.rec.Run)
	g.Go("attest", func(ctx context.Context) error { return a.watcher.Run(ctx, a.matched) })
	g.Go("dataplane.observe", func(ctx context.Context) error { return dp.Observe(ctx, a.flows.Observe) })
	g.Go("dataplane.repair", func(ctx context.Context) error {
		return dp.Repair(ctx, func(what string) { a.log.Warn("repaired", "what", what) })
	})
	g.Go("endpoints", a.watchEndpoints)
	g.Go("ready", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, readyTimeout)
		defer cancel()
		if err := a.rec.Wait(ctx, version); err != nil {
			a.log.Error("the host is not all that it should be", "error", err)
		}
		a.sayReady()
		return nil
	})
	select {
	case <-g.Context().Done():
	case release = <-a.release:
		g.Stop(nil)
	}
	err = g.Wait()
	a.setOpen(nil)
	a.rec.Forget()
	return release, errors.Join(err, dp.Close())
}

// sayReady tells systemd: at the latest when the local API answers and the host waits for something that only people
// or the coordinator can give.
func (a *Agent) sayReady() {
	if _, ok := a.planeConfig(); ok && a.opened() == nil {
		return
	}
	if err := notify("READY=1"); err != nil {
		a.log.Warn("systemd was not told", "error", err)
	}
}

// planeConfig is how to open the dataplane; ok is false while it should not be open.
func (a *Agent) planeConfig() (dataplane.Config, bool) {
	cfg := dataplane.Config{Interface: a.cfg.Interface, ListenPort: a.cfg.ListenPort, MTU: dataplane.DefaultMTU,
		CgroupRoot: a.root, BPFFS: a.cfg.BPFFS, Logger: a.log, AcceptGaps: a.cfg.AcceptGaps, Tunnel: a.cfg.Tunnel,
		Handshakes: dataplane.HandshakeGuard(a.cfg.Handshakes)}
	id := a.id.Load()
	if id == nil || !id.Overlay4.IsValid() {
		return cfg, false
	}
	cfg.PrivateKey, cfg.Overlay4, cfg.Overlay6 = id.WireGuard, id.Overlay4, id.Overlay6
	a.mu.Lock()
	defer a.mu.Unlock()
	return cfg, a.position != state.Released
}

// loadState takes in what the last life left: the snapshot, verified like anything from outside, and endpoints.
func (a *Agent) loadState() {
	id := a.identity()
	b, err := a.dir.LoadSnapshot()
	var held *codec.Held
	if err == nil {
		if held, err = codec.Load(b, a.trust()); err != nil {
			err = fmt.Errorf("snapshot on disk: %w", err)
		}
	}
	hints, hintsErr := a.dir.LoadHints()
	if hintsErr != nil {
		a.warn("endpoints", hintsErr.Error())
	}
	a.mu.Lock()
	a.hints = hints
	switch {
	case err == nil:
		a.held, a.pending = held, held.Snapshot.Self.Status == "pending"
	case !errors.Is(err, state.ErrNone):
		a.refused = err
		a.log.Error("the saved snapshot is refused: everything in the overlay is denied until the coordinator has sent a new one", "error", err)
	}
	position := a.position
	a.mu.Unlock()
	a.rec.Set(func(in *reconcile.Input) {
		in.Overlay4, in.Overlay6, in.Hints, in.Down = id.Overlay4, id.Overlay6, hints, position != state.Up
		if held != nil {
			in.Snapshot = &held.Snapshot
		}
	})
	if held != nil {
		a.flows.SetNames(flowlog.NamesOf(&held.Snapshot))
		a.wake()
	}
}

// trust is what snapshots are checked against.
func (a *Agent) trust() codec.Trust {
	id := a.identity()
	return codec.Trust{TrustDomain: id.TrustDomain, Node: id.Node, Distribution: func(der []byte) (ed25519.PublicKey, error) {
		return identity.VerifyDistribution(a.identity().Bundle, der, time.Now())
	}}
}

// identity is the host's; only called after enrolment.
func (a *Agent) identity() state.Identity { return *a.id.Load() }

// coordinators of the configuration, or those that the host was enrolled with.
func (a *Agent) coordinators() []string {
	if len(a.cfg.Coordinator) > 0 {
		return a.cfg.Coordinator
	}
	return a.identity().Coordinators
}

func (a *Agent) clockJumped(by time.Duration) {
	a.log.Warn("the clock was set, or this host slept", "by", by)
	a.rec.Anew()
	if r := a.rotator.Load(); r != nil {
		r.Kick()
	}
	if c := a.client.Load(); c != nil {
		c.Kick()
	}
}

// Reload takes in a changed configuration (SIGHUP): endpoints change at once, the flow log is opened anew, and keys
// that need a restart are named.
func (a *Agent) Reload(next Config) error {
	if err := a.reload(next); err != nil {
		return err
	}
	if a.file != nil {
		a.file.Reopen()
	}
	if c := a.client.Load(); c != nil {
		c.Announce()
	}
	return nil
}

func (a *Agent) warn(topic, text string) {
	a.log.Warn(text)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.warnings[topic] = text
}

func (a *Agent) setOpen(dp *Dataplane) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.open = dp
}

// opened returns the dataplane, or nil while none is open.
func (a *Agent) opened() Dataplane {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.open == nil {
		return nil
	}
	return *a.open
}
