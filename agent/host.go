package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/signet-overlay/signet/agent/attest"
	"github.com/signet-overlay/signet/agent/flowlog"
	"github.com/signet-overlay/signet/agent/reconcile"
	"github.com/signet-overlay/signet/agent/session"
	"github.com/signet-overlay/signet/agent/state"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/proto/codec"
)

const (
	// endpointsEvery is how often own addresses are looked at and working endpoints of peers are kept.
	endpointsEvery = 10 * time.Second
	maxSeen        = 16
)

// host is what the session serves; its methods are the session's view of the agent.
type host struct{ *Agent }

// Presence says what the host holds and where it is.
func (h host) Presence() session.Presence {
	id := h.identity()
	h.mu.Lock()
	held := h.held
	h.mu.Unlock()
	return session.Presence{Held: held, WireGuard: id.WireGuard.Public(), ListenPort: h.cfg.ListenPort, Candidates: h.candidates()}
}

// Keep saves a snapshot. The overlay's ranges go into the identity before it: a host whose snapshot is damaged later
// must know what to deny.
func (h host) Keep(held *codec.Held) error {
	self := held.Snapshot.Self
	err := h.changeIdentity(func(id *state.Identity) bool {
		changed := id.Overlay4 != self.Overlay4 || id.Overlay6 != self.Overlay6
		id.Overlay4, id.Overlay6 = self.Overlay4, self.Overlay6
		return changed
	})
	if err != nil {
		return err
	}
	if err := h.dir.SaveSnapshot(held.Marshal()); err != nil {
		return err //nolint:wrapcheck // names the file
	}
	h.mu.Lock()
	h.held, h.pending = held, self.Status == "pending"
	h.mu.Unlock()
	return nil
}

// Apply hands a snapshot to the reconciler, with the cgroups of its workloads, and waits until it was tried.
func (h host) Apply(ctx context.Context, held *codec.Held) error {
	defer h.took()
	h.flows.SetNames(flowlog.NamesOf(&held.Snapshot))
	h.newest(h.watcher.Look(workloadsOf(&held.Snapshot)))
	version := h.rec.Set(func(in *reconcile.Input) {
		match := h.newest(attest.Result{})
		in.Snapshot, in.Locals, in.Interfaces = &held.Snapshot, match.Locals, match.Interfaces
		in.Overlay4, in.Overlay6 = held.Snapshot.Self.Overlay4, held.Snapshot.Self.Overlay6
	})
	h.wake()
	if h.switched() == state.Released {
		return errors.New("the operator has released this host (signet down --release)")
	}
	return h.rec.Wait(ctx, version) //nolint:wrapcheck // objects name themselves
}

// Hints merges what the coordinator says of other nodes. What it says of this one is how it saw this host.
func (h host) Hints(news map[string][]netip.AddrPort) {
	h.mu.Lock()
	merged := maps.Clone(h.hints)
	if merged == nil {
		merged = map[string][]netip.AddrPort{}
	}
	for node, list := range news {
		if node != h.identity().Node {
			merged[node] = list
			continue
		}
		h.reached, h.seenAt = list[:min(len(list), maxSeen)], time.Now()
	}
	h.hints = merged
	h.mu.Unlock()
	h.rec.Set(func(in *reconcile.Input) { in.Hints = merged })
	h.compareSeen()
	// At once, so that a host that is killed in the next second comes back without a coordinator; which of them work is
	// noted later (watchEndpoints).
	if err := h.dir.SaveHints(merged); err != nil {
		h.log.Warn("endpoints are not kept", "error", err)
	}
}

// compareSeen finds out whether this host is behind NAT: the coordinator saw it at an address that it does not have. It
// cannot be told before the dataplane is open.
func (a *Agent) compareSeen() {
	if a.opened() != nil {
		a.compareSeenWith(a.candidates())
	}
}

func (a *Agent) compareSeenWith(own []netip.AddrPort) {
	a.mu.Lock()
	seen := slices.DeleteFunc(slices.Clone(a.reached), func(e netip.AddrPort) bool { return slices.Contains(own, e) })
	changed := !slices.Equal(seen, a.seen)
	a.seen = seen
	a.mu.Unlock()
	if changed {
		a.rec.Set(func(in *reconcile.Input) { in.BehindNAT = len(seen) > 0 })
	}
}

// Connection notes what status shows.
func (h host) Connection(e session.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case e.Update:
		h.refused = e.Err
	case e.Err != nil || e.Coordinator == "":
		h.online, h.lost = "", e.Err
		// A coordinator that refuses is there: the certificate may have ended while it was not.
		if refusal := (*session.Error)(nil); errors.As(e.Err, &refusal) && refusal.Kind == session.Refused {
			h.kickRotator()
		}
	default:
		h.online, h.lost = e.Coordinator, nil
		h.kickRotator()
	}
}

func (a *Agent) kickRotator() {
	if r := a.rotator.Load(); r != nil {
		r.Kick()
	}
}

// issuer renews the node's certificate.
type issuer struct{ *Agent }

// Validity is that of the leaf.
func (i issuer) Validity() (notBefore, notAfter time.Time) {
	leaf := i.identity().Chain[0]
	return leaf.NotBefore, leaf.NotAfter
}

// Renew asks for a certificate for a new key. The key is on disk before it is sent, and stays the same until an answer
// arrives: the coordinator accepts the key in use and the one that was asked for last.
func (i issuer) Renew(ctx context.Context) error {
	client := i.client.Load()
	if client == nil {
		return errors.New("not started yet")
	}
	if i.identity().NextKey == nil {
		next, err := state.NewKey()
		if err != nil {
			return err //nolint:wrapcheck // names what was made
		}
		if err := i.changeIdentity(func(id *state.Identity) bool { id.NextKey = next; return true }); err != nil {
			return err
		}
	}
	next := i.identity().NextKey
	chain, bundle, err := client.Renew(ctx, next)
	if err != nil {
		return err //nolint:wrapcheck // names the coordinator
	}
	if err := i.changeIdentity(func(id *state.Identity) bool {
		id.Key, id.NextKey, id.Chain, id.Bundle = next, nil, chain, bundle
		return true
	}); err != nil {
		return err
	}
	client.Kick() // a session that was refused for the old certificate need not wait
	return nil
}

// changeIdentity saves a changed identity before it is used.
func (a *Agent) changeIdentity(change func(*state.Identity) bool) error {
	a.saving.Lock()
	defer a.saving.Unlock()
	next := a.identity()
	if !change(&next) {
		return nil
	}
	if err := a.dir.SaveIdentity(next); err != nil {
		return fmt.Errorf("save identity: %w", err)
	}
	a.id.Store(&next)
	return nil
}

func (a *Agent) identityCertificate() *tls.Certificate { return a.identity().Certificate() }

// wake makes keepOpen look whether the dataplane should be open.
func (a *Agent) wake() {
	select {
	case a.ready <- struct{}{}:
	default:
	}
}

// look resolves the selectors of what is held, at once.
func (a *Agent) look() {
	a.mu.Lock()
	held := a.held
	a.mu.Unlock()
	if held == nil {
		return
	}
	a.matched(a.watcher.Look(workloadsOf(&held.Snapshot)))
}

// matched takes in what attest found.
func (a *Agent) matched(r attest.Result) {
	a.newest(r)
	a.rec.Set(func(in *reconcile.Input) {
		now := a.newest(attest.Result{})
		in.Locals, in.Interfaces = now.Locals, now.Interfaces
	})
}

// newest keeps what attest found, unless a later look is known already, and returns the latest: two goroutines look, and
// the one that looked first may be the last to tell.
func (a *Agent) newest(r attest.Result) attest.Result {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.Look > a.match.Look {
		a.match = r
	}
	return a.match
}

func workloadsOf(s *mesh.Snapshot) []mesh.Workload {
	if reconcile.Shut(s.Self) {
		return nil
	}
	return s.Workloads
}

// candidates are the endpoints that this host advertises: configured ones first.
func (a *Agent) candidates() []netip.AddrPort {
	out, _ := a.configured()
	dp := a.opened()
	if dp == nil {
		return out
	}
	found, err := dp.Candidates()
	if err != nil {
		a.log.Warn("own addresses are not known", "error", err)
	}
	for _, e := range found {
		if !slices.Contains(out, e) {
			out = append(out, e)
		}
	}
	return out
}

// watchEndpoints announces changed addresses and keeps working endpoints of peers on disk.
func (a *Agent) watchEndpoints(ctx context.Context) error {
	t := time.NewTicker(endpointsEvery)
	defer t.Stop()
	var last []netip.AddrPort
	var saved map[string][]netip.AddrPort
	for {
		own := a.candidates()
		if !slices.Equal(own, last) {
			last = own
			if c := a.client.Load(); c != nil {
				c.Announce()
			}
		}
		a.compareSeenWith(own)
		if now := a.worthKeeping(); len(now) > 0 && !maps.EqualFunc(now, saved, slices.Equal[[]netip.AddrPort]) {
			if err := a.dir.SaveHints(now); err != nil {
				a.log.Warn("endpoints are not kept", "error", err)
			}
			saved = now
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

// worthKeeping puts the endpoint that works before those that are only hints, for the nodes that are peers.
func (a *Agent) worthKeeping() map[string][]netip.AddrPort {
	dp := a.opened()
	if dp == nil {
		return nil
	}
	status, err := dp.Peers()
	if err != nil {
		return nil
	}
	a.mu.Lock()
	hints := a.hints
	a.mu.Unlock()
	out := map[string][]netip.AddrPort{}
	for _, p := range a.rec.Status().Peers {
		list := slices.Clone(hints[p.Node])
		for _, s := range status {
			if s.Key == p.Key && s.Up && s.Endpoint.IsValid() {
				list = append([]netip.AddrPort{s.Endpoint}, slices.DeleteFunc(list, func(e netip.AddrPort) bool { return e == s.Endpoint })...)
			}
		}
		if len(list) > 0 {
			out[p.Node] = list[:min(len(list), maxSeen)]
		}
	}
	return out
}
