package enforce

import (
	"maps"
	"slices"
	"testing"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policy/policytest"
)

// fuzzPlaces are the hooks that FuzzPacket puts packets at, three bits each.
var fuzzPlaces = [8]struct {
	hook   policy.Hook
	device policy.Device
}{
	{policy.HookIngressDevice, policy.DeviceTunnel}, {policy.HookEgressDevice, policy.DeviceTunnel},
	{policy.HookEgressSocket, policy.DeviceTunnel}, {policy.HookIngressSocket, policy.DeviceTunnel},
	{policy.HookLoopback, policy.DeviceLoopback}, {policy.HookGuard, policy.DeviceOther},
	{policy.HookEgressSocket, policy.DeviceOther}, {policy.HookIngressSocket, policy.DeviceLoopback},
}

// fuzzWorld is what every input of FuzzPacket meets: the world of the cases, with connections of both IP versions.
type fuzzWorld struct {
	k       *fastTwin
	view    *policy.View
	base    map[flow.Tuple]policy.Conn
	table   *policy.Table
	sockets [4]policy.Socket
}

func newFuzzWorld(t testing.TB) *fuzzWorld {
	t.Helper()
	cases := policytest.Cases()
	w := &fuzzWorld{view: cases[0].View, base: map[flow.Tuple]policy.Conn{}}
	w.k = newFastTwin(t, w.view)
	for i := range cases {
		for key, c := range bounded(cases[i].Table(), w.view).Conns {
			if len(w.base) < fastRoom/2 && c.Generation == w.view.Generation && !endsSoon(&policy.Table{Conns: map[flow.Tuple]policy.Conn{key: c}}, key, policytest.Now) {
				w.base[key] = c
			}
		}
	}
	at := 1 // the first one is the kernel's own
	for i := range cases {
		if s := cases[i].Packet.Socket; at < len(w.sockets) && len(s.Cgroups) > 0 && !slices.ContainsFunc(w.sockets[:at], func(o policy.Socket) bool { return len(o.Cgroups) > 0 && o.Cgroups[0] == s.Cgroups[0] }) {
			w.sockets[at] = s
			at++
		}
	}
	w.table = &policy.Table{Conns: maps.Clone(w.base), Max: fastRoom}
	w.k.load(t, w.view, w.table, policytest.Now)
	return w
}

// reset puts the tables back.
func (w *fuzzWorld) reset(t testing.TB) {
	t.Helper()
	w.k.forget(t)
	w.table = &policy.Table{Conns: maps.Clone(w.base), Max: fastRoom}
	usage := map[uint32]uint32{}
	for key, c := range w.table.Conns {
		row := w.k.conn(w.view, key, c, policytest.Now)
		usage[row.Number[0]]++
		must(t, putConn(w.k.coll.Maps, tupleKey(key), row), "put connection")
	}
	for n, held := range usage {
		must(t, w.k.coll.Maps[mapUsage].Put(n, held), "put usage")
	}
}

// FuzzPacket gives two packets of any bytes to both twins, one after the other: the programs read the bytes by themselves,
// the judge in Go is told what readPacket makes of them. place is the hook of each, three bits for the first and three
// for the second, and the socket.
func FuzzPacket(f *testing.F) {
	if testing.Short() {
		f.Skip("runs packets through the loaded programs: left out of -short")
	}
	needRootFuzz(f)
	w := newFuzzWorld(f)
	cases := policytest.Cases()
	for i := range cases {
		p := &cases[i].Packet
		if p.Hook == policy.HookConnect || p.Hook == policy.HookBind {
			continue
		}
		data := frame(*p)[benchLinkHeader:]
		f.Add(data[0]>>4 == 6, uint8(i), data, data)
	}
	f.Fuzz(func(t *testing.T, v6 bool, place uint8, first, second []byte) {
		if len(first) > 1400 || len(second) > 1400 {
			return
		}
		allowed := false
		var before policy.Packet
		for i, data := range [][]byte{first, second} {
			for len(data) < 40 { // the harness refuses less than an IP header
				data = append(data, 0)
			}
			kind := uint16(0x0800)
			if v6 {
				kind = 0x86dd
			}
			p, part := readPacket(v6, data)
			at := fuzzPlaces[place>>(3*i)&7]
			p.Hook, p.Device = at.hook, at.device
			if p.Hook != policy.HookIngressDevice {
				p.Socket = w.sockets[place>>6]
			}
			if i > 0 && before.TCPFlags&(policy.FlagFIN|policy.FlagRST) != 0 && p.TCPFlags&policy.FlagSYN != 0 {
				break // what has ended may be opened again sooner in the kernel
			}
			if p.Hook == policy.HookGuard && p.Part == policy.LaterFragment && unnamed(p.Tuple.Proto) {
				break // refused by both, and the kernel does not look further than that it is not the tunnel
			}
			before = p
			want := w.judge(p, part)
			got := w.k.run(t, &p, ether(kind, data), policytest.Now)
			allowed = allowed || want.Verdict == flow.Allow || got.Verdict == flow.Allow
			if got != want {
				t.Errorf("packet %d: kernel %+v, want %+v, for %s (fragment of %v): %x", i, got, want, showPacket(p), part, data)
			}
		}
		if allowed {
			w.k.sameTable(t, w.view, w.table)
			w.reset(t)
		}
	})
}

// judge is policy.Judge. What a first fragment leaves is named by the protocol of what is fragmented, which Packet does
// not tell from the transport's.
func (w *fuzzWorld) judge(p policy.Packet, part flow.Proto) policy.Decision {
	want := policy.Judge(w.view, w.table, p, policytest.Now)
	if p.Part == policy.FirstFragment && part != p.Tuple.Proto {
		key := policy.FragmentKey{Src: p.Tuple.Src.Addr(), Dst: p.Tuple.Dst.Addr(), Proto: p.Tuple.Proto, ID: p.Fragment}
		if left, ok := w.table.Fragments[key]; ok {
			delete(w.table.Fragments, key)
			key.Proto = part
			w.table.Fragments[key] = left
		}
	}
	return want
}
