package revoke

import (
	"net/netip"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// TestAllowed tells the cases that the stories of revoke_test.go do not reach, one change at a time.
func TestAllowed(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	tcp := Socket{Opener: OpenerLocal, Tuple: flow.Tuple{
		Src: netip.AddrPortFrom(a4, 40000), Dst: netip.AddrPortFrom(remote4, 80), Proto: flow.TCP}}
	for _, c := range []struct {
		name   string
		change func(*policy.View, *Socket)
		want   bool
	}{
		{"allowed", func(*policy.View, *Socket) {}, true},
		{"opened by the other end", func(_ *policy.View, s *Socket) { s.Opener = OpenerRemote }, false},
		{"not tracked", func(_ *policy.View, s *Socket) { s.Opener = OpenerUnknown }, false},
		{"being opened", func(_ *policy.View, s *Socket) { s.Opener, s.Opening = OpenerUnknown, true }, true},
		{"another port", func(_ *policy.View, s *Socket) { s.Tuple.Dst = netip.AddrPortFrom(remote4, 81) }, false},
		{"no local address", func(v *policy.View, _ *Socket) { v.Addresses[a4] = policy.Address{Number: numA} }, false},
		{"unknown peer", func(v *policy.View, _ *Socket) { delete(v.Addresses, remote4) }, false},
		{"revoked peer", func(v *policy.View, _ *Socket) {
			v.Addresses[remote4] = policy.Address{Number: numRemote, Revoked: true}
		}, false},
		{"Binding ends now", func(v *policy.View, _ *Socket) {
			v.Addresses[remote4] = policy.Address{Number: numRemote, NotAfter: now}
		}, false},
		{"Binding ends later", func(v *policy.View, _ *Socket) {
			v.Addresses[remote4] = policy.Address{Number: numRemote, NotAfter: now.Add(1)}
		}, true},
		{"lease over, everything denied", func(v *policy.View, _ *Socket) { v.Lease.Ends = now }, false},
		{"lease over, new ones denied", func(v *policy.View, _ *Socket) {
			v.Lease = policy.Lease{Ends: now, Mode: policy.LeaseDenyNew}
		}, true},
		{"denied", func(v *policy.View, _ *Socket) {
			v.Rulesets[numA][policy.Key{Peer: numRemote}] = policy.Value{Deny: policy.Slot{Rule: 13}}
		}, false},
		{"denied on record only", func(v *policy.View, _ *Socket) {
			v.Rulesets[numA][policy.Key{Peer: numRemote}] = policy.Value{Audit: policy.Slot{Rule: 13}}
		}, true},
		{"answering UDP, not tracked", func(v *policy.View, s *Socket) {
			permit(v, 12, numRemote, numA, flow.UDP, 53)
			s.Opener, s.Opening = OpenerUnknown, true
			s.Tuple = flow.Tuple{Src: netip.AddrPortFrom(a4, 53), Dst: netip.AddrPortFrom(remote4, 40000), Proto: flow.UDP}
		}, true},
	} {
		v := &policy.View{
			Lease:     policy.Lease{Ends: now.Add(time.Hour)},
			Addresses: map[netip.Addr]policy.Address{a4: {Number: numA, Local: true}, remote4: {Number: numRemote}},
			Rulesets:  map[identity.Number]policy.Ruleset{numA: {}},
		}
		permit(v, 11, numA, numRemote, flow.TCP, 80)
		s := tcp
		c.change(v, &s)
		if got := Allowed(v, s, now); got != c.want {
			t.Errorf("%s: allowed %v, want %v", c.name, got, c.want)
		}
	}
	if !Allowed(nil, tcp, now) {
		t.Error("no view has taken something back")
	}
}

func TestDue(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	in := func(s int) time.Time { return now.Add(time.Duration(s) * time.Second) }
	v := &policy.View{Lease: policy.Lease{Ends: in(50), Mode: policy.LeaseDenyNew}}
	if !Due(nil, now).IsZero() || !Due(v, now).IsZero() {
		t.Error("nothing is due where nothing ends")
	}
	v.Lease.Mode = policy.LeaseDenyAll
	v.Addresses = map[netip.Addr]policy.Address{remote4: {Number: numRemote, NotAfter: in(40)}, a4: {Number: numA, Local: true}}
	v.Rulesets = map[identity.Number]policy.Ruleset{numA: {{Peer: numRemote}: {
		Allow: policy.Slot{Rule: 1, NotBefore: in(5), NotAfter: in(30)},
		Deny:  policy.Slot{Rule: 2, NotBefore: in(20), NotAfter: in(25)},
	}}}
	for _, c := range []struct{ after, want int }{{0, 20}, {20, 30}, {30, 40}, {40, 50}} {
		if got := Due(v, in(c.after)); !got.Equal(in(c.want)) {
			t.Errorf("after %d s: due %v, want %v", c.after, got.Sub(now), c.want)
		}
	}
	if got := Due(v, in(50)); !got.IsZero() {
		t.Errorf("after everything has ended: due %v", got)
	}
}
