package tunnel

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

var (
	endpoint1 = netip.MustParseAddrPort("192.0.2.1:51820")
	endpoint2 = netip.MustParseAddrPort("192.0.2.2:51820")
	endpoint3 = netip.MustParseAddrPort("[2001:db8::3]:51820")
)

// drive plays the engine: it follows the waits of next until the time is over, applies the steps, and lets the given
// endpoint answer at once. It returns the endpoints that were tried, with the time of each.
func drive(p path, start time.Time, d time.Duration, answers netip.AddrPort) (path, []netip.AddrPort, []time.Duration) {
	var tried []netip.AddrPort
	var at []time.Duration
	var handshake time.Time
	for now := start; now.Sub(start) < d; {
		var s step
		p = p.observe(now, p.endpoint, handshake)
		p, s = next(now, p)
		if s.initiate {
			tried, at = append(tried, p.endpoint), append(at, now.Sub(start))
			if p.endpoint == answers {
				handshake = now
			}
		}
		if s.wait == noDeadline {
			break
		}
		now = now.Add(max(s.wait, time.Millisecond))
	}
	return p, tried, at
}

func TestPathTriesCandidatesAndBacksOff(t *testing.T) {
	start := time.Now()
	p := path{endpoint: endpoint1}.restart(start, []netip.AddrPort{endpoint1, endpoint2})
	_, tried, at := drive(p, start, 25*time.Second, netip.AddrPort{})
	s := time.Second
	if want := []time.Duration{0, 1 * s, 2 * s, 4 * s, 6 * s, 11 * s, 16 * s, 21 * s}; !slices.Equal(at, want) {
		t.Errorf("tried at %v, want %v", at, want)
	}
	for i, e := range tried {
		if want := []netip.AddrPort{endpoint1, endpoint2}[i%2]; e != want {
			t.Errorf("attempt %d went to %v, want %v", i, e, want)
		}
	}
	_, _, at = drive(p, start, 2*time.Hour, netip.AddrPort{})
	if last := at[len(at)-1] - at[len(at)-2]; last != slowWait {
		t.Errorf("a host that is away is tried every %v", last)
	}
}

func TestPathKeepsWhatWorks(t *testing.T) {
	start := time.Now()
	p := path{endpoint: endpoint1}.restart(start, []netip.AddrPort{endpoint1, endpoint2, endpoint3})
	p, tried, at := drive(p, start, refreshAge, endpoint2)
	if want := []netip.AddrPort{endpoint1, endpoint2}; !slices.Equal(tried, want) {
		t.Fatalf("tried %v at %v, want %v", tried, at, want)
	}
	if p.works != endpoint2 {
		t.Errorf("works: %v", p.works)
	}
	// Idle for an hour: renewed in place, before it ends, never moved.
	p, tried, at = drive(p, start, time.Hour, endpoint2)
	for i, e := range tried[1:] {
		if e != endpoint2 || at[i+1]-at[i] >= sessionLife {
			t.Fatalf("attempt %d at %v to %v", i, at[i+1], e)
		}
	}
	// It stops answering: tried there first, then the others.
	now := start.Add(2 * time.Hour)
	_, tried, _ = drive(p, now, 4*time.Second, netip.AddrPort{})
	if want := []netip.AddrPort{endpoint2, endpoint1, endpoint3}; !slices.Equal(tried[:3], want) {
		t.Errorf("tried %v, want %v first", tried, want)
	}
}

func TestPathRoamingWins(t *testing.T) {
	now := time.Now()
	p := path{}.restart(now, []netip.AddrPort{endpoint1}).observe(now, endpoint3, now)
	p = p.restart(now, []netip.AddrPort{endpoint1, endpoint2})
	for _, age := range []time.Duration{0, time.Minute, refreshAge} {
		if _, s := next(now.Add(age), p); s.set.IsValid() || s.force || s.initiate != (age == refreshAge) {
			t.Errorf("live session of age %v: %+v", age, s)
		}
	}
	// When it has ended and the coordinator names other endpoints, those go before the one that worked.
	later := now.Add(time.Hour)
	p = p.restart(later, []netip.AddrPort{endpoint1, endpoint2})
	_, tried, _ := drive(p, later, 3*time.Second, netip.AddrPort{})
	if want := []netip.AddrPort{endpoint1, endpoint2, endpoint3}; !slices.Equal(tried, want) {
		t.Errorf("tried %v, want %v", tried, want)
	}
}

func TestPathSilence(t *testing.T) {
	now := time.Now()
	p := path{}.restart(now, []netip.AddrPort{endpoint1, endpoint2})
	if q := p.quiet(now); q.silent {
		t.Error("a peer without a session fell silent")
	}
	p = p.observe(now, endpoint1, now).quiet(now)
	if p.live(now) {
		t.Fatal("silent and live")
	}
	if _, s := next(now, p); s.initiate || s.wait != wait1 {
		t.Errorf("WireGuard's own attempt gets no time: %+v", s)
	}
	p, s := next(now.Add(wait1), p)
	if s.set != endpoint2 || !s.initiate || !s.force {
		t.Errorf("no failover: %+v", s)
	}
	if p = p.observe(now.Add(2*wait1), endpoint2, now.Add(wait1)); !p.live(now.Add(2 * wait1)) {
		t.Error("a handshake does not end the silence")
	}
}

func TestPathDoesNotCrossTheOtherEnd(t *testing.T) {
	now := time.Now()
	p := path{endpoint: endpoint1}.restart(now, []netip.AddrPort{endpoint1})
	p.heard = now.Add(-heardGrace / 2)
	if _, s := next(now, p); s.initiate || s.wait != heardGrace/2 {
		t.Errorf("crossed an initiation that was just answered: %+v", s)
	}
	leader, follower := p, p
	leader.heard, follower.heard, follower.follower = time.Time{}, time.Time{}, true
	_, _, first := drive(leader, now, 30*time.Second, netip.AddrPort{})
	_, _, second := drive(follower, now, 30*time.Second, netip.AddrPort{})
	for _, at := range first[1:] {
		if slices.Contains(second, at) {
			t.Errorf("both ends initiate at %v", at)
		}
	}
}

func TestPathWithoutEndpoints(t *testing.T) {
	now := time.Now()
	p, s := next(now, path{}.restart(now, nil))
	if s.initiate || s.wait != noDeadline {
		t.Errorf("%+v", s)
	}
	// The peer came to us: its session is renewed, and afterwards it is tried where it was.
	p = p.observe(now, endpoint3, now)
	if _, s = next(now.Add(time.Hour), p); !s.initiate || s.set.IsValid() && s.set != endpoint3 {
		t.Errorf("%+v", s)
	}
}

func TestPathSurvivesClockSteps(t *testing.T) {
	now := time.Now()
	p := path{}.restart(now, []netip.AddrPort{endpoint1}).observe(now, endpoint1, time.Time{})
	later := now.Add(time.Second)
	for name, handshake := range map[string]time.Time{"ahead": now.AddDate(10, 0, 0), "behind": now.AddDate(-10, 0, 0)} {
		q := p.observe(later, endpoint1, handshake)
		if !q.live(later) || q.live(later.Add(sessionLife)) {
			t.Errorf("wall clock %s: session %v", name, q.session.Sub(now))
		}
	}
}

func TestUsableEndpoints(t *testing.T) {
	var in []netip.AddrPort
	for _, s := range []string{
		"127.0.0.1:1", "[::1]:1", "0.0.0.0:1", "[::]:1", "224.0.0.1:1", "[ff02::1]:1", "192.0.2.1:0", "[fe80::1%eth0]:1",
		"169.254.1.1:1", "255.255.255.255:1", "192.0.2.1:51820", "[::ffff:192.0.2.1]:51820", "[2001:db8::3]:51820",
	} {
		in = append(in, netip.MustParseAddrPort(s))
	}
	in = append(in, netip.AddrPort{}, netip.AddrPortFrom(netip.MustParseAddr("2001:db8::1").WithZone("x\nprivate_key=0"), 1))
	if got, want := usable(in), []netip.AddrPort{endpoint1, endpoint3}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	in = nil
	for i := range 100 {
		in = append(in, netip.AddrPortFrom(endpoint1.Addr(), uint16(i+1)))
	}
	if got := len(usable(in)); got != maxEndpoints {
		t.Errorf("%d endpoints kept", got)
	}
}
