package reconcile_test

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/agent/reconcile"
	"github.com/signet-overlay/signet/agent/session/sessiontest"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// routingTarget is one that can reach workloads behind devices.
type routingTarget struct {
	*fakeTarget
	addrs  []netip.Addr
	behind map[netip.Addr]uint32
}

func (f *routingTarget) UpdateHost(_ context.Context, _ mesh.Self, addrs []netip.Addr) error {
	return f.do("host", func() { f.addrs = addrs })
}

func (f *routingTarget) UpdateRoutes(_ context.Context, behind map[netip.Addr]uint32) error {
	return f.do("routes", func() { f.behind = maps.Clone(behind) })
}

func (f *routingTarget) look() (addrs []netip.Addr, behind map[netip.Addr]uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.addrs, f.behind
}

// TestAddressesBehindDevices: the tunnel device has the addresses of workloads on this host's own stack, and each of
// those in a namespace of its own has a route.
func TestAddressesBehindDevices(t *testing.T) {
	now := time.Now()
	target := &routingTarget{fakeTarget: newTarget()}
	r := startOn(t, target, reconcile.DenyAll)
	locals := map[policy.LocalKey]identity.Number{{Cgroup: 5, UID: policy.AnyUID}: sessiontest.APINumber}
	device := map[uint32]identity.Number{7: sessiontest.APINumber}
	for _, c := range []struct {
		name       string
		selector   string
		locals     map[policy.LocalKey]identity.Number
		interfaces map[uint32]identity.Number
		own        bool
		device     uint32
	}{
		{"a unit that does not run", "unit:api.service", nil, nil, true, 0},
		{"a device", "interface:veth1", nil, device, false, 7},
		{"a device that is missing", "interface:veth1", nil, nil, false, 0},
		{"a container with a namespace", "container:app=web", locals, device, false, 7},
		{"a container on the host's network", "container:app=web", locals, nil, true, 0},
		{"a container that does not run", "container:app=web", nil, nil, false, 0},
	} {
		s := sessiontest.Sample(t, 1, now)
		sel, err := policy.ParseSelector(c.selector)
		if err != nil {
			t.Fatal(err)
		}
		s.Workloads[0].Selectors = []policy.Selector{sel}
		change(t, r, func(in *reconcile.Input) { in.Snapshot, in.Locals, in.Interfaces = &s, c.locals, c.interfaces })
		addrs, behind := target.look()
		for _, a := range s.Workloads[0].Addresses {
			if slices.Contains(addrs, a) != c.own || behind[a] != c.device {
				t.Errorf("%s: address %v is among %v, behind %v", c.name, a, addrs, behind)
			}
		}
		if !slices.Contains(addrs, s.Self.Addresses[0]) {
			t.Errorf("%s: the node's address is not among %v", c.name, addrs)
		}
	}
	// The same again is no work, and a failure is tried again after the host's own addresses.
	s := sessiontest.Sample(t, 1, now)
	change(t, r, func(in *reconcile.Input) { in.Snapshot, in.Interfaces = &s, device })
	target.take()
	change(t, r, func(*reconcile.Input) {})
	if calls := target.take(); strings.Contains(calls, "routes") {
		t.Errorf("nothing changed, and there were %s", calls)
	}
	target.set("routes", errors.New("no such device"))
	version := r.Set(func(in *reconcile.Input) { in.Interfaces = map[uint32]identity.Number{8: sessiontest.APINumber} })
	if err := r.Wait(t.Context(), version); err == nil || !strings.Contains(err.Error(), "routes workloads: no such device") {
		t.Errorf("a route that cannot be made: %v", err)
	}
	target.set("routes", nil)
	change(t, r, func(*reconcile.Input) {})
	if _, behind := target.look(); behind[s.Workloads[0].Addresses[0]] != 8 {
		t.Errorf("afterwards they are %v", behind)
	}
}

func change(t *testing.T, r *reconcile.Reconciler, f func(*reconcile.Input)) {
	t.Helper()
	if err := r.Wait(t.Context(), r.Set(f)); err != nil {
		t.Fatal(err)
	}
}
