package agent

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/signet-overlay/signet/dataplane"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// kernel is what outlives an agent: what is enforced stays so after Close.
type kernel struct {
	mu        sync.Mutex
	cfg       dataplane.Config
	open      int // dataplanes that are open
	opened    int // in all
	released  int
	view      *policy.View
	enforced  int // Views
	down      bool
	peers     map[key.Public]mesh.Peer
	report    func(flow.Observation)
	preflight error
}

func (k *kernel) deps() Deps {
	k.peers = map[key.Public]mesh.Peer{}
	return Deps{
		Preflight: func(dataplane.Config) error { k.mu.Lock(); defer k.mu.Unlock(); return k.preflight },
		Open: func(_ context.Context, cfg dataplane.Config) (Dataplane, error) {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.cfg, k.open, k.opened = cfg, k.open+1, k.opened+1
			return &fakePlane{k}, nil
		},
		Release: func(dataplane.Config) error {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.released++
			k.view, k.down = nil, false
			clear(k.peers)
			return nil
		},
	}
}

// facts copies what tests look at.
func (k *kernel) look() (view *policy.View, down bool, peers, open int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.view, k.down, len(k.peers), k.open
}

func (k *kernel) do(f func()) error { k.mu.Lock(); defer k.mu.Unlock(); f(); return nil }

type fakePlane struct{ k *kernel }

func (p *fakePlane) UpdateHost(context.Context, mesh.Self, []netip.Addr) error { return nil }
func (p *fakePlane) Enforce(_ context.Context, v *policy.View) error {
	return p.k.do(func() { p.k.view, p.k.down, p.k.enforced = v, false, p.k.enforced+1 })
}
func (p *fakePlane) DenyAll(context.Context) error { return p.k.do(func() { p.k.down = true }) }
func (p *fakePlane) UpdatePeer(_ context.Context, peer mesh.Peer) error {
	return p.k.do(func() { p.k.peers[peer.Key] = peer })
}
func (p *fakePlane) DeletePeer(_ context.Context, k key.Public) error {
	return p.k.do(func() { delete(p.k.peers, k) })
}
func (p *fakePlane) PrunePeers(_ context.Context, keep []key.Public) error {
	return p.k.do(func() {
		kept := map[key.Public]mesh.Peer{}
		for _, k := range keep {
			if peer, ok := p.k.peers[k]; ok {
				kept[k] = peer
			}
		}
		p.k.peers = kept
	})
}
func (p *fakePlane) Status() dataplane.Status {
	return dataplane.Status{TunnelKind: "userspace", Interface: "signet0", Port: 51820, Mode: "enforce", Healthy: true,
		Hooks: []dataplane.HookStatus{{Name: "egress", Attached: true}}, Warnings: []string{"loopback is not guarded"}}
}
func (p *fakePlane) Peers() ([]dataplane.PeerStatus, error) {
	p.k.mu.Lock()
	defer p.k.mu.Unlock()
	var out []dataplane.PeerStatus
	for k := range p.k.peers {
		out = append(out, dataplane.PeerStatus{Key: k, Up: true, LastHandshake: time.Now(), Endpoint: netip.MustParseAddrPort("192.0.2.7:51820")})
	}
	return out, nil
}
func (p *fakePlane) Candidates() ([]netip.AddrPort, error) {
	return []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:51820")}, nil
}
func (p *fakePlane) Handshake(context.Context, key.Public) (time.Duration, error) {
	return 5 * time.Millisecond, nil
}
func (p *fakePlane) Observe(ctx context.Context, report func(flow.Observation)) error {
	_ = p.k.do(func() { p.k.report = report })
	<-ctx.Done()
	return ctx.Err()
}
func (p *fakePlane) Repair(ctx context.Context, _ func(string)) error { <-ctx.Done(); return ctx.Err() }
func (p *fakePlane) Close() error                                     { return p.k.do(func() { p.k.open-- }) }
