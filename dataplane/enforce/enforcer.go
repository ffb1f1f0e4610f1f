package enforce

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/policy"
)

// Enforcer is one host's judge in the kernel. Its methods may be called from several goroutines.
type Enforcer struct {
	cfg    Config
	cgroup uint64 // id of Config.CgroupRoot
	coll   *ebpf.Collection
	log    *slog.Logger

	// mu covers everything that changes the kernel.
	mu     sync.Mutex
	writer *writer
	links  map[string]link.Link
	wants  map[string]hook  // what should stand, by name
	failed map[string]error // hooks that could not be attached or pinned
	tunnel int
	closed bool

	stop  context.CancelFunc
	swept chan struct{} // closed when routineSweep has ended
}

// Open loads the programs and attaches those that need no tunnel. Where an earlier process left its pins, they are
// taken over: each link changes to the new program in one step, and the view in force stays in force.
//
// Before the first Apply nothing within the overlay prefixes passes.
func Open(cfg Config) (*Enforcer, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	major, minor, err := kernelVersion()
	if err != nil {
		return nil, err
	}
	if err := checkKernel(major, minor); err != nil {
		return nil, err
	}
	cgroup, err := checkCgroup(cfg.CgroupRoot)
	if err != nil {
		return nil, err
	}
	if cfg.Clsact, err = chooseClsact(cfg); err != nil {
		return nil, err
	}
	coll, moved, err := load(cfg)
	if err != nil {
		return nil, explain(err)
	}
	e := &Enforcer{
		cfg: cfg, cgroup: cgroup, coll: coll, log: cfg.Logger,
		links: map[string]link.Link{}, wants: map[string]hook{}, failed: map[string]error{}, swept: make(chan struct{}),
	}
	if err = e.start(); err == nil {
		err = moved.commit()
	}
	if err == nil && !cfg.Clsact {
		err = noteBuild(cfg, coll)
	}
	if err != nil {
		moved.close()
		coll.Close()
		e.closeLinks()
		return nil, explain(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	e.stop = stop
	go e.routineSweep(ctx)
	return e, nil
}

// load creates or opens the maps, and loads the programs.
func load(cfg Config) (*ebpf.Collection, *migration, error) {
	if ok, err := onBPFFS(cfg.BPFFS); err != nil {
		return nil, nil, err
	} else if !ok {
		return nil, nil, fmt.Errorf("%s: %w", cfg.BPFFS, ErrNoBPFFS)
	}
	for _, dir := range []string{cfg.maps(), cfg.links()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, nil, fmt.Errorf("make pin directory: %w", err)
		}
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, nil, fmt.Errorf("lift the limit on locked memory: %w", err)
	}
	spec, err := bpf.LoadJudge()
	if err != nil {
		return nil, nil, fmt.Errorf("read the judge's object: %w", err)
	}
	if err := setOverlay(spec, cfg.Overlay4, cfg.Overlay6); err != nil {
		return nil, nil, err
	}
	if err := setNetns(spec); err != nil {
		return nil, nil, err
	}
	if err := leaveOut(spec, cfg); err != nil {
		return nil, nil, err
	}
	if cfg.Clsact {
		forClsact(spec)
	}
	moved, err := migrateMaps(spec, cfg)
	if err != nil {
		return nil, nil, err
	}
	opts := ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: cfg.maps()}, MapReplacements: moved.replacements()}
	coll, err := loadPrograms(spec, opts, func(config *ebpf.Map) (map[string]*ebpf.Program, error) {
		if len(moved.moved) > 0 || cfg.Clsact {
			return nil, nil // what is attached uses other maps, or has no links to be known by
		}
		return adopt(spec, cfg, config)
	})
	if err != nil {
		moved.close()
		return nil, nil, fmt.Errorf("load the judge: %w", err)
	}
	return coll, moved, nil
}

// setOverlay fixes the overlay's ranges in the programs.
func setOverlay(spec *ebpf.CollectionSpec, v4, v6 netip.Prefix) error {
	var r bpf.JudgePrefixes
	r.V4.W, r.V4Mask.W = words(v4.Addr()), mask(v4.Bits()+96)
	r.V6.W, r.V6Mask.W = words(v6.Addr()), mask(v6.Bits())
	if err := spec.Variables["overlay"].Set(r); err != nil {
		return fmt.Errorf("set the overlay prefixes: %w", err)
	}
	return nil
}

// mask is a netmask of 128 bits in the kernel's words.
func mask(bits int) [4]uint32 {
	var b [16]byte
	for i := range bits {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return words(netip.AddrFrom16(b))
}

// wakeBytes of queued events wake the reader before it looks by itself.
const wakeBytes = 64 << 10

// start takes the maps over and attaches.
func (e *Enforcer) start() error {
	w, err := newWriter(e.coll.Maps, readClock)
	if err != nil {
		return err
	}
	e.writer = w
	e.tunnel = e.cfg.Tunnel
	err = w.settings(func(s *bpf.JudgeSettings) {
		s.Wake = wakeBytes
		s.Quota = uint32(max(e.cfg.Sizes.Quota, 0))
		s.Netns = netnsCookie()
		if e.tunnel == 0 {
			e.tunnel = e.judgedTunnel(int(s.Tunnel))
			s.Tunnel = uint32(e.tunnel)
		}
	})
	if err != nil {
		return err
	}
	if err := e.attachCgroup(); err != nil {
		return err
	}
	if e.tunnel != 0 {
		if err := e.attachTunnel(e.tunnel); err != nil {
			return err
		}
	}
	if err := e.attachDevices(); err != nil {
		return err
	}
	if err := startTimer(e.coll); err != nil {
		return err
	}
	return errors.Join(e.refuseGaps(), e.leaveOther(), e.clearUnfinishedPins())
}

// judgedTunnel is index when the device that an earlier process called the tunnel still stands, and 0 otherwise. The
// index alone proves nothing: another device may have it by now, and judged as the tunnel it would pass nothing at all.
func (e *Enforcer) judgedTunnel(index int) int {
	if e.cfg.Clsact {
		if _, err := e.cfg.Filters.Program(index, true, handleTunnel); err == nil {
			return index
		}
	}
	l, err := link.LoadPinnedLink(filepath.Join(e.cfg.links(), hookTunnelEgress), nil)
	if err != nil {
		return 0
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil || info.TCX() == nil || int(info.TCX().Ifindex) != index {
		return 0
	}
	return index
}

// Apply makes a View real as a whole, or not at all. A View that means the same as the one in force changes nothing, so
// that connections are not judged again for nothing; call it again after the wall clock was set or the host slept, and
// the kernel's stamps are made again.
//
// Where the View does not fit beside the one in force, everything is denied for the moment that it takes to make room; and
// where it does not fit at all, everything stays denied, so that nothing that was taken back goes on.
//
// The View must not be changed afterwards. It is enforced when Apply returns without an error.
func (e *Enforcer) Apply(ctx context.Context, v *policy.View) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.applyLocked(v)
}

// ErrClosed is returned by every method of a closed Enforcer that would change the kernel.
var ErrClosed = errors.New("enforcer is closed")

func (e *Enforcer) applyLocked(v *policy.View) error {
	if e.closed {
		return ErrClosed
	}
	if v.Overlay4.Masked() != e.cfg.Overlay4 || v.Overlay6.Masked() != e.cfg.Overlay6 {
		return fmt.Errorf("%w: it is for overlay %v and %v, and the programs are loaded for %v and %v", policy.ErrView,
			v.Overlay4, v.Overlay6, e.cfg.Overlay4, e.cfg.Overlay6)
	}
	changed, err := e.writer.apply(v)
	if errors.Is(err, ErrTooBig) {
		e.log.Warn("view does not fit beside the one in force, which is taken back first", "revision", v.Revision, "error", err)
		if _, denyErr := e.writer.apply(e.nothing()); denyErr != nil {
			return explain(fmt.Errorf("make room for revision %d: %w", v.Revision, errors.Join(err, denyErr)))
		}
		changed, err = e.writer.apply(v)
	}
	if changed {
		e.log.Debug("view is in force", "generation", e.writer.generation, "revision", v.Revision, "addresses", len(v.Addresses))
	}
	if err != nil {
		return explain(fmt.Errorf("apply revision %d: %w", v.Revision, err))
	}
	return nil
}

// RefreshLease moves the end of the lease. A later end in the same mode is written in place, and no connection is judged
// again before the end that it knows of; everything else is a new generation.
func (e *Enforcer) RefreshLease(l policy.Lease) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return ErrClosed
	}
	w := e.writer
	if w.view == nil {
		return fmt.Errorf("%w: no view is in force whose lease could be moved", policy.ErrView)
	}
	if sameLease(w.view.Lease, l) {
		return nil
	}
	next := *w.view
	next.Lease = l
	if l.Mode != w.view.Lease.Mode || l.Ends.Before(w.view.Lease.Ends) || w.clock().drifted(w.base) {
		return e.applyLocked(&next)
	}
	return w.extendLease(&next)
}

// DenyAll takes everything back and keeps the hooks: no address is known and no workload has an identity.
func (e *Enforcer) DenyAll() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.applyLocked(e.nothing())
}

// nothing is a view that knows nobody. The lease is kept out of the reasons: what is denied is denied for want of an
// identity.
func (e *Enforcer) nothing() *policy.View {
	const forever = 100 * 365 * 24 * time.Hour
	return &policy.View{Overlay4: e.cfg.Overlay4, Overlay6: e.cfg.Overlay6, Lease: policy.Lease{Ends: time.Now().Add(forever)}}
}

// View is what is in force, with its generation; nil before the first Apply of this process.
func (e *Enforcer) View() *policy.View {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.writer.view
}

// Generation is the word in force; a taken-over host has one before the first Apply.
func (e *Enforcer) Generation() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.writer.generation
}

// Close ends this process's part. Every pin stays, and with it enforcement.
func (e *Enforcer) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	e.mu.Unlock()
	e.stop()
	<-e.swept
	err := e.closeLinks()
	e.coll.Close()
	return err
}

func (e *Enforcer) closeLinks() error {
	var errs []error
	for name, l := range e.links {
		if err := l.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close link %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}
