package enforce

import (
	"cmp"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policy/policytest"
)

// generator makes packets that have something to do with a view and with each other.
type generator struct {
	r       *rand.Rand
	cases   []policytest.Case
	pool    [2][]netip.Addr // by family: those of the view, and some that it does not know
	ports   []uint16
	devices []uint32
	rules   []ownedKey                          // everything that the view says of any conversation
	owned   map[identity.Number][]netip.Addr    // who has which addresses
	sockets map[identity.Number][]policy.Socket // who has which sockets
	sent    []policy.Packet                     // some of those before
	chains  map[uint64][]uint64                 // the ancestors of each cgroup, which never change
	ended   map[flow.Tuple]struct{}             // conversations with a FIN or RST, by their canonical tuple
}

// ownedKey is a line of a workload's ruleset.
type ownedKey struct {
	owner identity.Number
	key   policy.Key
}

// memory is how many packets a generator looks back at.
const memory = 48

func newGenerator(r *rand.Rand, cases []policytest.Case, v *policy.View) *generator {
	g := &generator{r: r, cases: cases, ended: map[flow.Tuple]struct{}{}, chains: map[uint64][]uint64{}}
	g.use(v)
	return g
}

// use makes packets for another view from now on. Maps are walked in no order, so everything is sorted: a seed means the
// same packets in every run.
func (g *generator) use(v *policy.View) {
	g.pool = [2][]netip.Addr{
		{netip.MustParseAddr("198.19.255.255"), netip.MustParseAddr("198.20.0.1"), netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("224.0.0.1")},
		{netip.MustParseAddr("fd5a:7:0:ffff::1"), netip.MustParseAddr("fd5b:7::1"), netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("::1"), netip.MustParseAddr("ff02::1")},
	}
	for a := range v.Addresses {
		at := one(a.Is6())
		g.pool[at] = append(g.pool[at], a, a, a)
	}
	g.ports = []uint16{0, 1, 80, 443, 5000, 8080, 65535, 40000}
	for _, rs := range v.Rulesets {
		for key := range rs {
			span := uint16(1)<<(16-min(key.Bits, 16)) - 1
			if key.Bits == 0 {
				span = 0
			}
			g.ports = append(g.ports, key.Port, key.Port-1, key.Port+span, key.Port+span+1)
		}
	}
	g.devices = []uint32{0, 9999}
	for index := range v.Interfaces {
		g.devices = append(g.devices, index, index)
	}
	g.useRules(v)
	for i := range g.pool {
		slices.SortFunc(g.pool[i], netip.Addr.Compare)
	}
	slices.Sort(g.ports)
	g.ports = slices.Compact(g.ports)
	slices.Sort(g.devices)
}

// useRules notes what likely needs.
func (g *generator) useRules(v *policy.View) {
	g.rules, g.owned, g.sockets = nil, map[identity.Number][]netip.Addr{}, map[identity.Number][]policy.Socket{}
	for owner, rs := range v.Rulesets {
		for key := range rs {
			g.rules = append(g.rules, ownedKey{owner, key})
		}
	}
	slices.SortFunc(g.rules, func(a, b ownedKey) int {
		return cmp.Or(cmp.Compare(a.owner, b.owner), cmp.Compare(a.key.Peer, b.key.Peer), cmp.Compare(a.key.Dir, b.key.Dir),
			cmp.Compare(a.key.Proto, b.key.Proto), cmp.Compare(a.key.Port, b.key.Port), cmp.Compare(a.key.Bits, b.key.Bits))
	})
	for a, info := range v.Addresses {
		g.owned[info.Number] = append(g.owned[info.Number], a)
	}
	for _, addrs := range g.owned {
		slices.SortFunc(addrs, netip.Addr.Compare)
	}
	for i := range g.cases {
		s := g.cases[i].Packet.Socket
		g.sockets[v.Owner(s)] = append(g.sockets[v.Owner(s)], s)
	}
}

// likely is a packet that a rule is about, from whom and at a hook where it may open something.
func (g *generator) likely() policy.Packet {
	if len(g.rules) == 0 {
		return g.fresh()
	}
	rule := g.rules[g.r.IntN(len(g.rules))]
	own, peer := g.owned[rule.owner], g.owned[rule.key.Peer]
	if len(own) == 0 || len(peer) == 0 {
		return g.fresh()
	}
	a, b := own[g.r.IntN(len(own))], peer[g.r.IntN(len(peer))]
	if a.Is6() != b.Is6() {
		return g.fresh()
	}
	p := policy.Packet{Tuple: flow.Tuple{
		Src: netip.AddrPortFrom(a, 40000+uint16(g.r.IntN(300))), Dst: netip.AddrPortFrom(b, rule.key.Port), Proto: rule.key.Proto,
	}}
	if rule.key.Proto == flow.AnyProto {
		p.Tuple.Proto = []flow.Proto{flow.TCP, flow.UDP, flow.SCTP}[g.r.IntN(3)]
	}
	if rule.key.Port == 0 {
		p.Tuple.Dst = netip.AddrPortFrom(b, g.ports[g.r.IntN(len(g.ports))])
	}
	if s := g.sockets[rule.owner]; len(s) > 0 {
		p.Socket = s[g.r.IntN(len(s))]
	}
	p.Hook = []policy.Hook{policy.HookEgressSocket, policy.HookEgressDevice}[g.r.IntN(2)]
	if rule.key.Dir == policy.Ingress {
		p.Tuple, p.Hook, p.Socket = flow.Tuple{
			Src: netip.AddrPortFrom(b, p.Tuple.Src.Port()), Dst: netip.AddrPortFrom(a, p.Tuple.Dst.Port()), Proto: p.Tuple.Proto,
		}, policy.HookIngressDevice, policy.Socket{}
	}
	if rule.key.Proto == flow.ICMP {
		g.ping(&p)
	}
	g.flags(&p, policy.FlagSYN)
	g.shape(&p)
	return p
}

func (g *generator) other() *policytest.Case { return &g.cases[g.r.IntN(len(g.cases))] }

// next gives one packet.
func (g *generator) next() policy.Packet {
	var p policy.Packet
	switch n := g.r.IntN(16); {
	case n < 3:
		p = vary(g.r, g.other(), g.other())
	case n < 9 && len(g.sent) > 0:
		p = g.again(g.sent[g.r.IntN(len(g.sent))])
	case n < 11 && len(g.sent) > 0:
		p = g.fault(g.sent[g.r.IntN(len(g.sent))])
	case n < 14:
		p = g.likely()
	default:
		p = g.fresh()
	}
	g.honest(&p)
	if p.Quoted == nil && p.Hook != policy.HookConnect && p.Hook != policy.HookBind && p.Part != policy.LaterFragment {
		if len(g.sent) < memory {
			g.sent = append(g.sent, p)
		} else {
			g.sent[g.r.IntN(memory)] = p
		}
	}
	return p
}

// honest makes a packet one that both twins are meant to judge alike. What has ended may be opened again sooner in the
// kernel, which remembers flags (TestIdle): nothing opens what has ended.
func (g *generator) honest(p *policy.Packet) {
	if p.Part == policy.LaterFragment && unnamed(p.Tuple.Proto) && (p.Hook == policy.HookGuard || p.Hook >= policy.HookFromWorkload) {
		p.Part, p.Fragment = policy.Whole, 0 // refused by both, and the kernel does not look further than that it is not the tunnel
	}
	if c := p.Socket.Cgroups; len(c) > 0 {
		if g.chains[c[0]] == nil { // the first that is met; cases do not agree
			g.chains[c[0]] = c
		}
		p.Socket.Cgroups = g.chains[c[0]]
	}
	if p.Malformed {
		// Nobody reads on: neither flags nor, of IPv6, the transport's protocol, by which it may be new to its receiver.
		p.TCPFlags, p.EchoReq, p.Connected = 0, false, true
	}
	if p.Hook == policy.HookToWorkload {
		p.Connected = true // nobody on this side of the device knows the socket
	}
	if p.Tuple.Proto != flow.TCP || p.Hook == policy.HookConnect || p.Hook == policy.HookBind {
		return
	}
	key, _ := p.Tuple.Canonical()
	if p.TCPFlags&(policy.FlagFIN|policy.FlagRST) != 0 {
		g.ended[key] = struct{}{}
		return
	}
	if _, ok := g.ended[key]; ok && p.TCPFlags&policy.FlagSYN != 0 {
		p.TCPFlags |= policy.FlagACK
	}
}

// unnamed: a protocol that rules cannot name.
func unnamed(p flow.Proto) bool {
	switch p {
	case flow.TCP, flow.UDP, flow.ICMP, flow.ICMPv6, flow.SCTP:
		return false
	}
	return true
}

// fresh is a packet of a conversation of its own, as a rule.
func (g *generator) fresh() policy.Packet {
	pool := g.pool[one(g.r.IntN(3) == 0)]
	src, dst := pool[g.r.IntN(len(pool))], pool[g.r.IntN(len(pool))]
	p := policy.Packet{Tuple: flow.Tuple{
		Src: netip.AddrPortFrom(src, 40000+uint16(g.r.IntN(4))), Dst: netip.AddrPortFrom(dst, g.ports[g.r.IntN(len(g.ports))]),
	}}
	switch n := g.r.IntN(20); {
	case n < 10:
		p.Tuple.Proto = flow.TCP
	case n < 15:
		p.Tuple.Proto = flow.UDP
	case n < 17:
		p.Tuple.Proto = flow.SCTP
	case n < 19:
		g.ping(&p)
	default:
		p.Tuple.Proto = flow.Proto([]uint8{2, 4, 41, 47, 50, 89, 255}[g.r.IntN(7)])
		p.Tuple = flow.Tuple{Src: netip.AddrPortFrom(src, 0), Dst: netip.AddrPortFrom(dst, 0), Proto: p.Tuple.Proto}
	}
	g.place(&p)
	g.flags(&p, policy.FlagSYN)
	g.shape(&p)
	return p
}

// ping makes an echo of a packet: its ports are its identifier.
func (g *generator) ping(p *policy.Packet) {
	id := uint16(g.r.IntN(4))
	p.Tuple = flow.Tuple{Src: netip.AddrPortFrom(p.Tuple.Src.Addr(), id), Dst: netip.AddrPortFrom(p.Tuple.Dst.Addr(), id), Proto: flow.ICMP}
	if p.Tuple.Src.Addr().Is6() {
		p.Tuple.Proto = flow.ICMPv6
	}
	p.EchoReq = g.r.IntN(4) > 0
}

// again is another packet of a conversation, in either direction, at the same or another hook.
func (g *generator) again(p policy.Packet) policy.Packet {
	if g.r.IntN(2) == 0 {
		p.Tuple = p.Tuple.Reverse()
		p.EchoReq = p.EchoReq && g.r.IntN(4) == 0
	}
	switch socket := p.Socket; g.r.IntN(4) {
	case 0:
		g.place(&p)
	case 1, 2:
		g.place(&p)
		p.Socket = socket
	}
	p.Malformed = false
	g.flags(&p, policy.FlagACK)
	g.shape(&p)
	return p
}

// fault is an ICMP error about a packet, mostly one that comes back.
func (g *generator) fault(about policy.Packet) policy.Packet {
	quote := about.Tuple
	p := policy.Packet{Tuple: flow.Tuple{
		Src: netip.AddrPortFrom(quote.Dst.Addr(), 0), Dst: netip.AddrPortFrom(quote.Src.Addr(), 0xffff), Proto: flow.ICMP,
	}}
	if quote.Src.Addr().Is6() {
		p.Tuple.Proto = flow.ICMPv6
	}
	pool := g.pool[one(quote.Src.Addr().Is6())]
	if g.r.IntN(6) == 0 {
		p.Tuple.Src = netip.AddrPortFrom(pool[g.r.IntN(len(pool))], 0)
	}
	if g.r.IntN(8) == 0 {
		p.Tuple.Dst = netip.AddrPortFrom(pool[g.r.IntN(len(pool))], 0xffff)
	}
	p.Quoted = &quote
	g.place(&p)
	return p
}

// place puts a packet at a hook, with a socket and a device.
func (g *generator) place(p *policy.Packet) {
	hooks := []policy.Hook{
		policy.HookEgressSocket, policy.HookEgressSocket, policy.HookIngressSocket, policy.HookIngressSocket, policy.HookEgressDevice,
		policy.HookEgressDevice, policy.HookIngressDevice, policy.HookIngressDevice, policy.HookLoopback, policy.HookGuard,
		policy.HookFromWorkload, policy.HookToWorkload,
	}
	if len(g.devices) == 2 && g.r.IntN(4) > 0 {
		hooks = hooks[:len(hooks)-3] // no workload is behind any device
	}
	p.Hook, p.Device, p.Interface = hooks[g.r.IntN(len(hooks))], policy.DeviceTunnel, 0
	p.Socket, p.Connected = g.other().Packet.Socket, g.r.IntN(2) == 0
	switch p.Hook {
	case policy.HookEgressSocket, policy.HookIngressSocket:
		p.Device = policy.Device(max(0, g.r.IntN(12)-9))
	case policy.HookEgressDevice:
		if g.r.IntN(3) == 0 {
			p.Interface = g.devices[g.r.IntN(len(g.devices))]
		}
	case policy.HookLoopback:
		p.Device = policy.DeviceLoopback
	case policy.HookGuard:
		p.Device = policy.DeviceOther
	case policy.HookFromWorkload, policy.HookToWorkload:
		p.Device, p.Interface = policy.DeviceWorkload, g.devices[g.r.IntN(len(g.devices))]
	}
}

// flags gives a TCP segment the usual ones, or any.
func (g *generator) flags(p *policy.Packet, usual uint8) {
	p.TCPFlags = 0
	if p.Tuple.Proto != flow.TCP {
		return
	}
	switch g.r.IntN(8) {
	case 0:
		p.TCPFlags = uint8(g.r.IntN(256))
	case 1:
		p.TCPFlags = policy.FlagSYN
	case 2:
		p.TCPFlags = policy.FlagSYN | policy.FlagACK
	default:
		p.TCPFlags = usual
	}
}

// shape makes some packets fragments, and some malformed. Later fragments name no ports.
func (g *generator) shape(p *policy.Packet) {
	p.Part, p.Fragment = policy.Whole, 0
	switch n := g.r.IntN(24); {
	case n == 0:
		p.Malformed = true
	case n < 4:
		p.Part, p.Fragment = policy.FirstFragment, uint32(1+g.r.IntN(3))
	case n < 6:
		p.Part, p.Fragment = policy.LaterFragment, uint32(1+g.r.IntN(3))
		p.EchoReq, p.TCPFlags = false, 0
	}
}
