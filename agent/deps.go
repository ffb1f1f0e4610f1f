package agent

import (
	"context"
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/agent/reconcile"
	"github.com/signet-overlay/signet/dataplane"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/key"
)

// Meter says how the dataplane is.
type Meter interface {
	Status() dataplane.Status
	Peers() ([]dataplane.PeerStatus, error)
	Candidates() ([]netip.AddrPort, error)
}

// Watcher reports what happens in the dataplane, until ctx ends.
type Watcher interface {
	Observe(ctx context.Context, report func(flow.Observation)) error
	Repair(ctx context.Context, report func(string)) error
}

// Operator is what a person can ask of the dataplane.
type Operator interface {
	DenyAll(ctx context.Context) error
	Handshake(ctx context.Context, k key.Public) (time.Duration, error)
	Close() error
}

// Dataplane is what the agent drives; *dataplane.Dataplane implements it.
type Dataplane interface {
	reconcile.Target
	Meter
	Watcher
	Operator
}

// Deps are the ways to the kernel; tests put fakes in their place.
type Deps struct {
	Preflight func(dataplane.Config) error
	Open      func(context.Context, dataplane.Config) (Dataplane, error)
	Release   func(dataplane.Config) error
}

// RealDeps drive this host.
func RealDeps() Deps {
	return Deps{Preflight: dataplane.Preflight, Release: dataplane.Release,
		Open: func(ctx context.Context, cfg dataplane.Config) (Dataplane, error) { return dataplane.Open(ctx, cfg) }}
}

// plane is the Target of the reconciler: whatever dataplane is open. It is only driven while one is.
type plane struct{ Dataplane }

// UpdateKeepalive passes on to a dataplane that can, and is content with one that cannot: netcheck tells.
func (p *plane) UpdateKeepalive(ctx context.Context, k key.Public, every time.Duration) error {
	if t, ok := p.Dataplane.(reconcile.Keepaliver); ok {
		return t.UpdateKeepalive(ctx, k, every)
	}
	return nil
}

// UpdateRoutes passes on to a dataplane that can, and is content with one that cannot.
func (p *plane) UpdateRoutes(ctx context.Context, behind map[netip.Addr]uint32) error {
	if t, ok := p.Dataplane.(reconcile.Router); ok {
		return t.UpdateRoutes(ctx, behind)
	}
	return nil
}
