package enforce

import (
	"context"
	"errors"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// party is a socket of a process in one of the lab's cgroups.
func (l *lab) party(cgroup string) *Party {
	l.t.Helper()
	s, err := SocketIn(l.cgroups[cgroup], 0)
	must(l.t, err, "socket")
	return &Party{Socket: s}
}

// ask explains, and fails when the judge counted, tracked or told anything because of it. What a host sends by itself is
// counted too, now and then; what the twin left would be there every time.
func (l *lab) ask(e *Enforcer, q Question) (v Verdict) {
	l.t.Helper()
	var before, after Counters
	for range 5 {
		var err error
		before, err = e.Counters()
		must(l.t, err, "counters")
		v, err = e.Explain(q)
		must(l.t, err, "explain")
		after, err = e.Counters()
		must(l.t, err, "counters")
		if reflect.DeepEqual(before, after) {
			return v
		}
	}
	l.t.Errorf("%v: the twin left traces: %+v, before %+v", q.Tuple, after, before)
	return v
}

func tcpTo(src netip.Addr, sport uint16, dst netip.Addr, dport uint16) flow.Tuple {
	return flow.Tuple{Src: netip.AddrPortFrom(src, sport), Dst: netip.AddrPortFrom(dst, dport), Proto: flow.TCP}
}

// explainCase is one flow, as it leaves or as it arrives.
type explainCase struct {
	name string
	from string // cgroup; "" where the flow arrives
	dst  netip.AddrPort
	want flow.Reason // PolicyAllow for none
	rule uint32
}

// explainView has a rule for every reason.
func (l *lab) explainView() *policy.View {
	v := l.view()
	permit(v, 11, numA, numRemote, flow.TCP, 80)
	permit(v, 12, numRemote, numB, flow.TCP, 80)
	past := time.Now().Add(-time.Hour)
	for port, val := range map[uint16]policy.Value{
		81: {Allow: policy.Slot{Rule: 13}, Deny: policy.Slot{Rule: 14}},
		82: {Allow: policy.Slot{Rule: 15, NotAfter: past}},
	} {
		v.Rulesets[numA][policy.Key{Peer: numRemote, Port: port, Proto: flow.TCP, Dir: policy.Egress}] = val
		v.Rulesets[numB][policy.Key{Peer: numRemote, Port: port, Proto: flow.TCP, Dir: policy.Ingress}] = val
	}
	return v
}

// TestExplainOnTheWire asks, asks the judge in Go, and does what was asked: the three agree.
func TestExplainOnTheWire(t *testing.T) {
	l := newLab(t)
	e := l.open()
	v := l.explainView()
	must(t, e.Apply(context.Background(), v), "apply")
	procs := map[string]*proc{"a": l.start("a"), "other": l.start("other")}
	server := l.start("b")
	server.do("socket tcp4")
	server.want("ok", "bind 0.0.0.0:80")
	server.want("ok", "listen")
	stranger := netip.MustParseAddr("198.18.77.77")
	for _, c := range []explainCase{
		{"allowed", "a", netip.AddrPortFrom(remote4, 80), flow.PolicyAllow, 11},
		{"denied", "a", netip.AddrPortFrom(remote4, 81), flow.PolicyDeny, 14},
		{"expired", "a", netip.AddrPortFrom(remote4, 82), flow.Expired, 15},
		{"no rule", "a", netip.AddrPortFrom(remote4, 83), flow.NoRule, 0},
		{"no identity", "other", netip.AddrPortFrom(remote4, 80), flow.NoIdentity, 0},
		{"unknown peer", "a", netip.AddrPortFrom(stranger, 80), flow.UnknownPeer, 0},
		{"allowed, IPv6", "a", netip.AddrPortFrom(remote6, 80), flow.PolicyAllow, 11},
		{"no rule, IPv6", "a", netip.AddrPortFrom(remote6, 83), flow.NoRule, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.t = t
			q := Question{Tuple: flow.Tuple{Dst: c.dst, Proto: flow.TCP}, From: l.party(c.from)}
			got := l.ask(e, q)
			l.agrees(e, c, q, got)
			l.connects(procs[c.from], c)
		})
	}
	for _, c := range []explainCase{
		{"arrives", "", netip.AddrPortFrom(b4, 80), flow.PolicyAllow, 12},
		{"arrives denied", "", netip.AddrPortFrom(b4, 81), flow.PolicyDeny, 14},
		{"arrives expired", "", netip.AddrPortFrom(b4, 82), flow.Expired, 15},
		{"arrives without a rule", "", netip.AddrPortFrom(b4, 83), flow.NoRule, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.t = t
			q := Question{Tuple: tcpTo(remote4, 40000, c.dst.Addr(), c.dst.Port()), To: l.party("b")}
			got := l.ask(e, q)
			l.agrees(e, c, q, got)
			l.arrives(e, c, q.Tuple)
		})
	}
	l.t = t
}

// agrees compares the twin's answer with what is wanted, and with the judge in Go, hook by hook over one table.
func (l *lab) agrees(e *Enforcer, c explainCase, q Question, got Verdict) {
	l.t.Helper()
	if got.Reason != c.want || got.Rule != c.rule || (got.Verdict == flow.Allow) != (c.want == flow.PolicyAllow) {
		l.t.Errorf("the twin says %+v, want %v by rule %d", got, c.want, c.rule)
	}
	if got.Tracked || got.View.Revision != 7 || got.View.Generation != e.Generation() {
		l.t.Errorf("the twin says tracked %v under %+v, of a new flow under generation %d", got.Tracked, got.View, e.Generation())
	}
	if hooks := len(q.path()); c.want == flow.PolicyAllow && len(got.Hooks) != hooks {
		l.t.Errorf("the twin asked %d hooks, want %d", len(got.Hooks), hooks)
	}
	table := &policy.Table{Conns: map[flow.Tuple]policy.Conn{}}
	for i, h := range got.Hooks {
		s := q.path()[i]
		p := policy.Packet{Hook: s.hook, Device: s.device, Tuple: q.Tuple, Socket: s.socket, Interface: s.ifindex}
		own := a4
		if p.Tuple.Dst.Addr().Is6() {
			own = a6
		}
		switch {
		case s.hook == policy.HookConnect:
			p.Tuple.Src = sameFamily(p.Tuple.Src, p.Tuple.Dst)
		case !p.Tuple.Src.Addr().IsValid():
			p.Tuple.Src = netip.AddrPortFrom(own, anyPort)
		}
		if s.hook != policy.HookConnect {
			p.TCPFlags = policy.FlagSYN
		}
		want := policy.Judge(e.View(), table, p, time.Now())
		if h.Verdict != want.Verdict || h.Reason != want.Reason || h.Rule != want.Rule || h.Src != want.Src || h.Dst != want.Dst {
			l.t.Errorf("hook %v: the twin says %+v, the judge in Go %+v", s.hook, h.Decision, want)
		}
	}
}

// connects opens the flow for real.
func (l *lab) connects(p *proc, c explainCase) {
	l.t.Helper()
	p.t = l.t
	kind, own := "tcp4", a4
	if c.dst.Addr().Is6() {
		kind, own = "tcp6", a6
	}
	p.do("socket %s", kind)
	if c.want == flow.PolicyAllow {
		p.want("inprogress", "connect %v", c.dst)
		l.sent(c.name, own, c.dst.Port())
		return
	}
	p.want("EACCES", "connect %v", c.dst)
}

// arrives lets the flow's first packet arrive for real.
func (l *lab) arrives(e *Enforcer, c explainCase, tuple flow.Tuple) {
	l.t.Helper()
	before := denied(l.t, e, policy.HookIngressDevice, c.want)
	l.inject(ipPacket(tuple.Src, tuple.Dst, protoTCP, tcpHeader(tuple.Src, tuple.Dst, policy.FlagSYN, 1, 0)))
	if c.want == flow.PolicyAllow {
		l.sent(c.name, tuple.Dst.Addr(), tuple.Src.Port())
		if v := l.ask(e, Question{Tuple: tuple, To: l.party("b")}); !v.Tracked || v.Verdict != flow.Allow {
			l.t.Errorf("once it is open the twin says %+v", v)
		}
		return
	}
	for end := time.Now().Add(helperWait); denied(l.t, e, policy.HookIngressDevice, c.want) == before; {
		if time.Now().After(end) {
			l.t.Fatalf("%v was not counted", c.want)
		}
	}
}

// TestExplainSameHost: both ends are here, and the later hooks know what the earlier would have tracked.
func TestExplainSameHost(t *testing.T) {
	l := newLab(t)
	e := l.open()
	v := l.view()
	permit(v, 11, numA, numB, flow.TCP, 80)
	must(t, e.Apply(context.Background(), v), "apply")
	q := Question{Tuple: flow.Tuple{Dst: netip.AddrPortFrom(b4, 80), Proto: flow.TCP}, From: l.party("a"), To: l.party("b")}
	if got := l.ask(e, q); got.Verdict != flow.Allow || got.Rule != 11 || len(got.Hooks) != 4 || got.Hook != policy.HookIngressSocket {
		t.Errorf("got %+v, want allowed at four hooks", got)
	}
	q.To = l.party("other")
	if got := l.ask(e, q); got.Verdict != flow.Deny || got.Reason != flow.NoIdentity || got.Hook != policy.HookIngressSocket {
		t.Errorf("a receiver without identity: got %+v", got)
	}
	for _, proto := range []flow.Proto{flow.UDP, flow.ICMP} {
		q := Question{Tuple: flow.Tuple{Dst: netip.AddrPortFrom(remote6, 53), Proto: proto}, From: l.party("a")}
		if got := l.ask(e, q); got.Reason != flow.NoRule || got.Hook != policy.HookConnect {
			t.Errorf("%v: got %+v", proto, got)
		}
	}
}

// TestExplainQuota: an identity whose quota is used up opens nothing, says the twin, and so it is.
func TestExplainQuota(t *testing.T) {
	l := newLab(t)
	l.cfg.Sizes.Quota = 1
	e := l.open()
	v := l.view()
	permit(v, 11, numA, numRemote, flow.TCP, 80)
	must(t, e.Apply(context.Background(), v), "apply")
	a := l.start("a")
	q := Question{Tuple: flow.Tuple{Dst: netip.AddrPortFrom(remote4, 80), Proto: flow.TCP}, From: l.party("a")}
	if got := l.ask(e, q); got.Verdict != flow.Allow {
		t.Errorf("with room: got %+v", got)
	}
	a.do("socket tcp4")
	a.want("inprogress", "connect 198.18.1.9:80")
	l.sent("the first flow", a4, 80)
	if got := l.ask(e, q); got.Reason != flow.CTFull || got.Hook != policy.HookEgressSocket {
		t.Errorf("without room: got %+v", got)
	}
	a.do("socket tcp4")
	a.do("connect 198.18.1.9:80")
	if denied(t, e, policy.HookEgressSocket, flow.CTFull) == 0 {
		t.Error("the judge let the second flow pass")
	}
}

// TestExplainRefuses: what cannot be asked is refused, and so is a closed judge.
func TestExplainRefuses(t *testing.T) {
	l := newLab(t)
	e := l.open()
	must(t, e.Apply(context.Background(), l.view()), "apply")
	for _, q := range []Question{
		{},
		{Tuple: tcpTo(a4, 1, remote4, 80)},
		{Tuple: flow.Tuple{Dst: netip.AddrPortFrom(b4, 80)}, To: l.party("b")},
		{Tuple: tcpTo(a4, 1, remote6, 80), From: l.party("a")},
		{Tuple: flow.Tuple{Dst: netip.AddrPortFrom(remote4, 80)}, From: &Party{Socket: policy.Socket{Cgroups: make([]uint64, maxLevels+1)}}},
	} {
		if v, err := e.Explain(q); !errors.Is(err, ErrQuestion) {
			t.Errorf("%+v: got %+v, %v", q, v, err)
		}
	}
	must(t, e.Close(), "close")
	if _, err := e.Explain(Question{Tuple: tcpTo(a4, 0, remote4, 80), From: l.party("a")}); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed judge says %v", err)
	}
}
