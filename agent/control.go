package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/signet-overlay/signet/agent/flowlog"
	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/agent/reconcile"
	"github.com/signet-overlay/signet/agent/state"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
)

// Down stops traffic and keeps denying; with release nothing is guarded any more.
func (a *Agent) Down(ctx context.Context, release bool) error {
	position := state.Down
	if release {
		position = state.Released
	}
	return a.setSwitch(ctx, position)
}

// setSwitch remembers the operator's word before it acts on it: after a crash in between, the word counts.
func (a *Agent) setSwitch(ctx context.Context, to state.Switch) error {
	if err := a.dir.SaveSwitch(to); err != nil {
		return &localapi.Error{Code: localapi.CodeInternal, Message: err.Error(), Hint: "nothing was changed"}
	}
	a.mu.Lock()
	a.position = to
	delete(a.warnings, "switch")
	a.mu.Unlock()
	version := a.rec.Set(func(in *reconcile.Input) { in.Down = to != state.Up })
	a.wake()
	if to == state.Released {
		return a.releaseHost(ctx)
	}
	if a.opened() == nil {
		return nil // what opens it will look at the switch
	}
	if err := a.rec.Wait(ctx, version); err != nil {
		return &localapi.Error{Code: localapi.CodeInternal, Message: err.Error(), Hint: "the agent keeps trying; see: signet status"}
	}
	return nil
}

func (a *Agent) releaseHost(ctx context.Context) error {
	if a.id.Load() == nil {
		return nil // nothing was ever opened
	}
	done := make(chan error, 1)
	select {
	case a.release <- done:
	case <-ctx.Done():
		return &localapi.Error{Code: localapi.CodeInternal, Message: "the agent is busy opening or closing the dataplane", Hint: "try again"}
	}
	if err := <-done; err != nil {
		return &localapi.Error{Code: localapi.CodeInternal, Message: "not everything was released: " + err.Error(), Hint: "run it again; what is left still denies"}
	}
	return nil
}

func (a *Agent) switched() state.Switch {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.position
}

// snapshot is the last verified one, or nil.
func (a *Agent) snapshot() *mesh.Snapshot {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.held == nil {
		return nil
	}
	return &a.held.Snapshot
}

var errNoSnapshot = &localapi.Error{Code: localapi.CodeNotReady, Message: "this host has no snapshot from the coordinator yet", Hint: "see: signet status"}

// Ping makes WireGuard prove the peer behind target anew.
func (a *Agent) Ping(ctx context.Context, target string) (localapi.PingReply, error) {
	s, dp := a.snapshot(), a.opened()
	if s == nil || dp == nil {
		return localapi.PingReply{}, errNoSnapshot
	}
	b, err := find(s, target)
	if err != nil {
		return localapi.PingReply{}, err
	}
	took, err := dp.Handshake(ctx, b.Key)
	if err != nil {
		return localapi.PingReply{}, &localapi.Error{Code: localapi.CodeNoAnswer, Message: fmt.Sprintf("node %s did not answer: %v", b.Node, err), Hint: "see: signet netcheck"}
	}
	reply := localapi.PingReply{Target: target, Node: b.Node, RTTMs: float64(took) / float64(time.Millisecond)}
	if peers, err := dp.Peers(); err == nil {
		for _, p := range peers {
			if p.Key == b.Key {
				reply.Endpoint = p.Endpoint
			}
		}
	}
	return reply, nil
}

// find returns a Binding of target: a node's name, a workload (zone/name or SPIFFE ID), or an overlay address.
func find(s *mesh.Snapshot, target string) (mesh.Binding, error) {
	addr, addrErr := netip.ParseAddr(target)
	id, idErr := parseID(s, target)
	for _, b := range s.Bindings {
		if addrErr == nil && slices.Contains(b.Addresses, addr) || idErr == nil && b.ID == id || b.Node == target {
			return b, nil
		}
	}
	e := &localapi.Error{Code: localapi.CodeNotFound, Message: fmt.Sprintf("%.200q is no node, workload or address that this host may talk with", target),
		Hint: "a host knows only those that some rule lets its workloads talk with; see: signet peers"}
	if s.Self.Node == target || addrErr == nil && slices.Contains(s.Self.Addresses, addr) {
		e.Message, e.Hint = fmt.Sprintf("%s is this host itself", target), ""
	}
	return mesh.Binding{}, e
}

// parseID reads zone/name or a SPIFFE ID.
func parseID(s *mesh.Snapshot, text string) (identity.ID, error) {
	if strings.HasPrefix(text, "spiffe://") {
		return identity.ParseID(text) //nolint:wrapcheck // the caller says what it was for
	}
	return s.Self.ID.TrustDomain().ParseShort(text) //nolint:wrapcheck // as above
}

// Flows sends the recent records and, with follow, new ones.
func (a *Agent) Flows(ctx context.Context, follow bool, send func(flow.Record) error) error {
	recent := a.flows.Recent()
	var sub *flowlog.Subscription
	if follow {
		if recent, sub = a.flows.Subscribe(); sub == nil {
			return &localapi.Error{Code: localapi.CodeNotReady, Message: fmt.Sprintf("%d others follow the flows already", flowlog.MaxSubscribers), Hint: "end one of them"}
		}
		defer sub.Close()
	}
	for _, r := range recent {
		if err := send(r); err != nil {
			return err
		}
	}
	for follow {
		r, err := sub.Next(ctx)
		if err != nil {
			return nil // the reader or the agent ended
		}
		if err := send(r); err != nil {
			return err
		}
	}
	return nil
}
