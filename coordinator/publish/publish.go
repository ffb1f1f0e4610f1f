package publish

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-overlay/signet/coordinator/compile"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/proto/codec"
	"github.com/signet-overlay/signet/proto/signetv1"
)

const (
	// coalesce is how long changes gather after one was published. The first of a burst goes out at once.
	coalesce = 50 * time.Millisecond
	// maxSleep bounds how long the writer trusts its timer: after a suspend or a clock step, a lease boundary is found
	// at most this late.
	maxSleep = time.Minute
	// retryDelay follows a failed write or compilation. Half a lease is left when the first fails.
	retryDelay = 5 * time.Second
	// counterBits leaves room for 2^40 store revisions in each incarnation.
	counterBits = 40
)

// Source is the registry, as far as publishing needs it.
type Source interface {
	State() *registry.State
	// Subscribe wakes its channel, of one slot, after each change of the State.
	Subscribe() (changes <-chan struct{}, cancel func())
	// Bump makes a store revision without any other change, so that an epoch can be used that no restart repeats.
	Bump(ctx context.Context) (revision uint64, err error)
}

// Signer holds the distribution key. Sign may be called from several goroutines.
type Signer interface {
	Sign(message []byte) []byte
	DistributionChain() []byte // DER certificate of the key
}

// Config is what a Publisher stands on; all but Now is required.
type Config struct {
	Source Source
	Signer Signer
	Log    *slog.Logger
	Now    func() time.Time // nil means time.Now
}

// Published is what everyone should hold, as of one store revision. It is immutable.
type Published struct {
	Epoch          uint64
	PolicyRevision uint64
	State          *registry.State
	Compiled       *compile.Compiled
	Nodes          map[string]*Node
}

// Node is one node's part. It is immutable, and stays the same from one Published to the next as long as the node need
// not hear anything.
type Node struct {
	Name           string
	Status         registry.NodeStatus
	Epoch          uint64 // of its manifest: that of the Published in which it last changed
	PolicyRevision uint64
	IssuedAt       time.Time
	LeaseEnds      time.Time
	Peers          []string // nodes that it may reach, sorted
	Certificate    []byte   // of the key that signed; DER

	sections []*codec.Section
	manifest func() *signetv1.Signed
}

// Manifest is signed when it is first asked for: a node that is not connected costs no signature, and sessions share
// the work of a change that concerns everyone.
func (n *Node) Manifest() *signetv1.Signed { return n.manifest() }

// Refs lists what the node should hold, sorted by name.
func (n *Node) Refs() []mesh.SectionRef {
	out := make([]mesh.SectionRef, len(n.sections))
	for i, s := range n.sections {
		out[i] = s.Ref
	}
	return out
}

// Section finds a section by name, or nil. Its bytes are shared with every other node that holds it.
func (n *Node) Section(name string) *codec.Section {
	i, ok := slices.BinarySearchFunc(n.sections, name, func(s *codec.Section, name string) int {
		return cmp.Compare(s.Ref.Name, name)
	})
	if !ok {
		return nil
	}
	return n.sections[i]
}

// Counts are totals since the start.
type Counts struct {
	Publications uint64 // including those without any difference
	Encoded      uint64 // sections encoded; what several nodes hold counts once
	Manifests    uint64 // new manifests
	Failures     uint64 // compilations and writes that failed
}

// Publisher is the single writer. Make one with New, then Run it.
type Publisher struct {
	cfg     Config
	current atomic.Pointer[Published]
	subs    subscribers
	counts  atomic.Pointer[Counts]

	// Owned by New, then by Run.
	enc  *encoder
	next time.Time // the next lease boundary
}

// New opens an epoch above everything that was published before, and publishes for the first time.
func New(ctx context.Context, cfg Config) (*Publisher, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	p := &Publisher{cfg: cfg, enc: &encoder{}}
	p.counts.Store(&Counts{})
	p.subs.byNode = map[string]map[chan struct{}]struct{}{}
	if _, err := cfg.Source.Bump(ctx); err != nil {
		return nil, fmt.Errorf("open a new epoch: %w", err)
	}
	if err := p.publish(); err != nil {
		return nil, err
	}
	return p, nil
}

// Current is what everyone should hold; never nil.
func (p *Publisher) Current() *Published { return p.current.Load() }

// Counts may be called at any time.
func (p *Publisher) Counts() Counts { return *p.counts.Load() }

// Subscribe wakes its channel, of one slot, after a publication that changed the node's part; with "" after each.
func (p *Publisher) Subscribe(node string) (changes <-chan struct{}, cancel func()) {
	return p.subs.add(node)
}

// Run publishes until ctx ends. A failure is logged and tried again: what was published before stays in force.
func (p *Publisher) Run(ctx context.Context) error {
	changes, cancel := p.cfg.Source.Subscribe()
	defer cancel()
	timer := time.NewTimer(0) // a change between New and Subscribe must not be missed
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changes:
		case <-timer.C:
		}
		wait := p.step(ctx)
		timer.Reset(wait)
		if !sleep(ctx, coalesce) {
			return nil
		}
	}
}

// step publishes what changed, and says when to look again without a change.
func (p *Publisher) step(ctx context.Context) time.Duration {
	if now := p.cfg.Now(); !p.next.IsZero() && !now.Before(p.next) {
		if _, err := p.cfg.Source.Bump(ctx); err != nil {
			return p.failed(ctx, fmt.Errorf("renew leases: %w", err))
		}
	}
	if p.cfg.Source.State().Revision != p.Current().State.Revision {
		if err := p.publish(); err != nil {
			return p.failed(ctx, err)
		}
	}
	if p.next.IsZero() {
		return maxSleep
	}
	return min(maxSleep, max(0, p.next.Sub(p.cfg.Now())))
}

func (p *Publisher) failed(ctx context.Context, err error) time.Duration {
	if ctx.Err() == nil {
		p.count(func(c *Counts) { c.Failures++ })
		p.cfg.Log.Error("cannot publish; hosts keep what they have", "err", err)
	}
	return retryDelay
}

func (p *Publisher) publish() error {
	s := p.cfg.Source.State()
	c, err := compile.Compile(s)
	if err != nil {
		return fmt.Errorf("compile policy revision %d: %w", s.PolicyRevision, err)
	}
	now := p.cfg.Now()
	d := build(s, c.For, now)
	p.enc = p.enc.next(d, p.cfg.Signer.Sign, p.cfg.Signer.DistributionChain())
	p.next = d.next
	out := &Published{Epoch: epoch(s), PolicyRevision: s.PolicyRevision, State: s, Compiled: c, Nodes: make(map[string]*Node, len(d.nodes))}
	var before map[string]*Node
	if prev := p.Current(); prev != nil {
		before = prev.Nodes
	}
	var changed []string
	for name, dn := range d.nodes {
		n := p.node(before[name], name, dn, out, now)
		if n != before[name] {
			changed = append(changed, name)
		}
		out.Nodes[name] = n
	}
	for name := range before {
		if out.Nodes[name] == nil {
			changed = append(changed, name)
		}
	}
	p.current.Store(out)
	p.count(func(c *Counts) {
		c.Publications++
		c.Manifests += uint64(len(changed))
		c.Encoded = p.enc.encoded
	})
	p.subs.wake(changed)
	return nil
}

// node returns old where the node need not hear anything.
func (p *Publisher) node(old *Node, name string, d desiredNode, out *Published, now time.Time) *Node {
	sections := p.enc.sections(name, d)
	status := registry.NodeStatus(d.self.Status)
	if old != nil && old.PolicyRevision == out.PolicyRevision && old.Status == status && bytes.Equal(old.Certificate, p.enc.cert) &&
		(status == registry.NodeRevoked || !old.IssuedAt.Before(d.window.start)) && slices.Equal(old.sections, sections) {
		return old
	}
	s := out.State
	n := &Node{Name: name, Status: status, Epoch: out.Epoch, PolicyRevision: out.PolicyRevision, IssuedAt: now, LeaseEnds: now.Add(s.Lease),
		Peers: d.peers, Certificate: p.enc.cert, sections: sections}
	n.manifest = sync.OnceValue(func() *signetv1.Signed { return signManifest(n, s.TrustDomain, p.cfg.Signer.Sign) })
	return n
}

func signManifest(n *Node, td identity.TrustDomain, sign codec.Sign) *signetv1.Signed {
	return codec.EncodeManifest(mesh.Manifest{Node: n.Name, Epoch: n.Epoch, PolicyRevision: n.PolicyRevision,
		IssuedAt: n.IssuedAt, LeaseEnds: n.LeaseEnds, Sections: n.Refs()}, td, sign)
}

// epoch grows with every store revision, and a restored store opens a new incarnation above all of them.
func epoch(s *registry.State) uint64 { return uint64(s.Incarnation)<<counterBits | s.Revision }

func (p *Publisher) count(change func(*Counts)) {
	c := *p.counts.Load()
	change(&c)
	p.counts.Store(&c)
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
