package enforce

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// Question asks what would become of the first packet of a flow, and of the connect before it. At least one end is on
// this host.
type Question struct {
	// Tuple is the flow's. An unset source address stands for a socket that its process has not bound: connect is then
	// asked as for such a socket, and the packets have the address that connect would have given it. A source port 0
	// stands for any port.
	Tuple    flow.Tuple
	From, To *Party // nil for an end that is on another host
}

// Party is an end of a flow that is on this host: a socket, or, where Interface is not 0, the workload behind the device
// of that index, whatever its sockets are.
type Party struct {
	Socket    policy.Socket
	Interface uint32
}

// HookDecision is what one hook decides.
type HookDecision struct {
	Hook policy.Hook
	policy.Decision
}

// Verdict answers a Question.
type Verdict struct {
	// HookDecision is the overall answer: the first denial; without one, the first decision with verdict Audit; without
	// one, that of the last hook.
	HookDecision
	// Hooks are the decisions in the order of the path. Behind a denial there are none: no packet gets there.
	Hooks []HookDecision
	// Tracked tells that the flow goes on already. Otherwise it would open.
	Tracked bool
	// View is what judged.
	View Version
}

// ErrQuestion is in the chain of errors about a Question that cannot be asked.
var ErrQuestion = errors.New("no such question")

// maxAsked bounds how often a question is asked again because another View came into force meanwhile.
const maxAsked = 3

// Explain answers by a dry-run twin of the judge: the same source over the same maps, compiled so that it writes nothing,
// counts nothing and tells nobody, and attached to nothing. A flow that is not tracked is answered as the hooks would
// one after the other, the later ones with what the earlier would have tracked; a full table or a used-up quota denies.
//
// The twin is loaded for the question, which takes some tenths of a second, and nothing of it stays. Errors are
// ErrClosed, ErrQuestion, and what the kernel says.
func (e *Enforcer) Explain(q Question) (Verdict, error) {
	q, err := q.complete()
	if err != nil {
		return Verdict{}, err
	}
	shared, err := e.shareMaps()
	if err != nil {
		return Verdict{}, err
	}
	defer closeMaps(shared)
	steps := q.path()
	d, err := loadDryRun(shared, e.cfg.Overlay4, e.cfg.Overlay6, steps)
	if err != nil {
		return Verdict{}, explain(err)
	}
	defer d.coll.Close()
	for range maxAsked {
		v, err := d.ask(q, steps)
		if err != nil {
			return Verdict{}, err
		}
		now, err := d.settings()
		if err != nil {
			return Verdict{}, err
		}
		if now.Generation == v.View.Generation {
			return v, nil
		}
	}
	return Verdict{}, fmt.Errorf("another view came into force %d times while the question was asked: ask again", maxAsked)
}

// anyPort stands for a source port that the asker leaves open. No kernel gives it to a socket by itself, so that no
// tracked flow has it.
const anyPort = 1

// complete checks the question, and sets what it leaves open but the source address.
func (q Question) complete() (Question, error) {
	src, dst := q.Tuple.Src, q.Tuple.Dst
	switch {
	case q.From == nil && q.To == nil:
		return q, fmt.Errorf("%w: no end of the flow is on this host", ErrQuestion)
	case !dst.Addr().IsValid():
		return q, fmt.Errorf("%w: the flow has no destination", ErrQuestion)
	}
	if src.Addr().IsValid() && src.Addr().IsUnspecified() {
		src = netip.AddrPortFrom(netip.Addr{}, src.Port())
	}
	switch {
	case !src.Addr().IsValid() && (q.From == nil || q.From.Interface != 0):
		return q, fmt.Errorf("%w: only a socket of this host is given its source address", ErrQuestion)
	case !src.Addr().IsValid() && src.Port() != 0:
		return q, fmt.Errorf("%w: a socket that is bound to port %d has an address", ErrQuestion, src.Port())
	case src.Addr().IsValid() && src.Addr().Unmap().Is4() != dst.Addr().Unmap().Is4():
		return q, fmt.Errorf("%w: the flow from %v to %v has ends of two IP versions", ErrQuestion, src.Addr(), dst.Addr())
	}
	q.Tuple.Src = netip.AddrPortFrom(src.Addr().Unmap(), src.Port())
	q.Tuple.Dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	for _, p := range []*Party{q.From, q.To} {
		if p != nil && len(p.Socket.Cgroups) > maxLevels {
			return q, fmt.Errorf("%w: the socket's cgroup is nested %d deep, more than %d", ErrQuestion, len(p.Socket.Cgroups), maxLevels)
		}
	}
	return q, nil
}

// maxLevels is MAX_LEVELS of bpf/lib/socket.h.
const maxLevels = len(bpf.TwinTestInput{}.Cgroups)

// dryStep is one hook on the path of a packet, and what it sees of it beside the packet itself.
type dryStep struct {
	hook    policy.Hook
	program string
	socket  policy.Socket
	device  policy.Device
	ifindex uint32
}

// path lists the hooks that the first packet of the flow meets on this host, in order.
func (q Question) path() []dryStep {
	var out []dryStep
	add := func(h policy.Hook, program string, s policy.Socket, d policy.Device, ifindex uint32) {
		out = append(out, dryStep{hook: h, program: program, socket: s, device: d, ifindex: ifindex})
	}
	// Where a socket sends to, and receives from.
	way := func(other *Party) (policy.Device, uint32) {
		switch {
		case other == nil:
			return policy.DeviceTunnel, 0
		case other.Interface != 0:
			return policy.DeviceOther, other.Interface
		}
		return policy.DeviceLoopback, 0
	}
	switch {
	case q.From == nil:
		add(policy.HookIngressDevice, bpf.TwinProgTunnelIngress, policy.Socket{}, policy.DeviceTunnel, 0)
	case q.From.Interface != 0:
		add(policy.HookFromWorkload, bpf.TwinProgGuard, policy.Socket{}, policy.DeviceOther, q.From.Interface)
		if q.To == nil {
			add(policy.HookEgressDevice, bpf.TwinProgTunnelEgress, policy.Socket{}, policy.DeviceTunnel, q.From.Interface)
		}
	default:
		s := q.From.Socket
		device, ifindex := way(q.To)
		add(policy.HookConnect, bpf.TwinProgTestConnect, s, device, 0)
		add(policy.HookEgressSocket, bpf.TwinProgEgress, s, device, ifindex)
		if q.To == nil {
			add(policy.HookEgressDevice, bpf.TwinProgTunnelEgress, s, device, 0)
		} else if q.To.Interface == 0 {
			add(policy.HookLoopback, bpf.TwinProgLoEgress, s, device, 0)
		}
	}
	switch {
	case q.To == nil:
	case q.To.Interface != 0:
		add(policy.HookToWorkload, bpf.TwinProgGuardEgress, policy.Socket{}, policy.DeviceOther, q.To.Interface)
	default:
		device, ifindex := way(q.From)
		add(policy.HookIngressSocket, bpf.TwinProgIngress, q.To.Socket, device, ifindex)
	}
	return out
}

// shareMaps gives descriptors of the judge's maps that outlive a Close.
func (e *Enforcer) shareMaps() (map[string]*ebpf.Map, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, ErrClosed
	}
	return cloneMaps(e.coll.Maps)
}

func cloneMaps(maps map[string]*ebpf.Map) (map[string]*ebpf.Map, error) {
	out := map[string]*ebpf.Map{}
	for name, m := range maps {
		own, err := m.Clone()
		if err != nil {
			closeMaps(out)
			return nil, fmt.Errorf("share map %s: %w", name, err)
		}
		out[name] = own
	}
	return out, nil
}

func closeMaps(maps map[string]*ebpf.Map) {
	for _, m := range maps {
		m.Close() // only a descriptor
	}
}

// dryRun is the twin, loaded.
type dryRun struct {
	coll   *ebpf.Collection
	shared map[string]*ebpf.Map
}

// loadDryRun loads the programs of the steps over the judge's maps. Maps that only the judge writes are not needed, and
// none but the twin's own three is created.
func loadDryRun(shared map[string]*ebpf.Map, v4, v6 netip.Prefix, steps []dryStep) (*dryRun, error) {
	spec, err := bpf.LoadTwin()
	if err != nil {
		return nil, fmt.Errorf("read the twin's object: %w", err)
	}
	if err := errors.Join(setOverlay(spec, v4, v6), setLinkHeader(spec, benchLinkHeader)); err != nil {
		return nil, err
	}
	forClsact(spec) // attached nowhere, so that no kernel need know how
	used := map[string]bool{}
	for name, p := range spec.Programs {
		if !slices.ContainsFunc(steps, func(s dryStep) bool { return s.program == name }) {
			delete(spec.Programs, name)
			continue
		}
		for _, in := range p.Instructions {
			if in.IsLoadFromMap() {
				used[in.Reference()] = true
			}
		}
	}
	replace := map[string]*ebpf.Map{}
	for name, m := range spec.Maps {
		switch real := shared[name]; {
		case !used[name]:
			delete(spec.Maps, name)
		case m.Pinning != ebpf.PinByName:
		case real == nil:
			return nil, fmt.Errorf("the judge has no map %s", name)
		default:
			replace[name] = real
			m.MaxEntries = real.MaxEntries() // the operator's choice
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		return nil, fmt.Errorf("load the twin: %w", err)
	}
	return &dryRun{coll: coll, shared: shared}, nil
}

// ask takes the question along its path.
func (d *dryRun) ask(q Question, steps []dryStep) (Verdict, error) {
	cfg, err := d.settings()
	if err != nil {
		return Verdict{}, err
	}
	v := Verdict{View: Version{Generation: cfg.Generation}}
	var view bpf.JudgeView
	if err := d.shared[mapViews].Lookup(uint32(cfg.Generation&1), &view); err != nil {
		return v, fmt.Errorf("read the view in force: %w", err)
	}
	v.View.Revision = view.Revision
	if err := d.clear(); err != nil {
		return v, err
	}
	for _, s := range steps {
		one, err := d.step(&q, s, cfg.Generation)
		if err != nil {
			return v, err
		}
		v.Hooks = append(v.Hooks, one)
		if one.Verdict == flow.Deny || v.Verdict != flow.Audit {
			v.HookDecision = one
		}
		if one.Verdict == flow.Deny {
			break
		}
	}
	v.Tracked, err = d.tracked()
	return v, err
}

// step asks one hook. After connect the socket has an address, and the table is looked at anew: the call knows no port.
func (d *dryRun) step(q *Question, s dryStep, generation uint64) (HookDecision, error) {
	p := policy.Packet{Hook: s.hook, Device: s.device, Tuple: q.Tuple, Socket: s.socket, Interface: s.ifindex}
	got, err := d.judge(s.program, inputOf(p), dryFrame(p.Hook, p.Tuple))
	one := HookDecision{Hook: s.hook, Decision: got}
	if err != nil || s.hook != policy.HookConnect || got.Verdict == flow.Deny {
		return one, err
	}
	if !q.Tuple.Src.Addr().IsValid() {
		own, err := d.ownAddress(got.Src, generation, q.Tuple.Dst.Addr().Is4())
		if err != nil {
			return one, err
		}
		if !own.IsValid() && got.Verdict != flow.Ignore {
			one.Decision = policy.Decision{Verdict: flow.Deny, Reason: flow.SourceBound, Src: got.Src, Dst: got.Dst}
			return one, nil
		}
		q.Tuple.Src = netip.AddrPortFrom(own, q.Tuple.Src.Port())
	}
	return one, d.clear()
}

// inputOf is what the programs cannot take from the packet. The time is the kernel's own.
func inputOf(p policy.Packet) bpf.TwinTestInput {
	in := bpf.TwinTestInput{Levels: uint32(len(p.Socket.Cgroups)), Uid: p.Socket.UID, Device: uint32(p.Device), Ifindex: p.Interface}
	if p.Connected {
		in.Connected = 1
	}
	if p.Device == policy.DeviceWorkload { // known by its number
		in.Device = uint32(policy.DeviceOther)
	}
	for i, id := range p.Socket.Cgroups {
		in.Cgroups[len(p.Socket.Cgroups)-1-i] = id
	}
	return in
}

// judge runs one program over one packet.
func (d *dryRun) judge(program string, in bpf.TwinTestInput, frame []byte) (policy.Decision, error) {
	var out bpf.TwinTestOutput
	err := errors.Join(d.coll.Maps[bpf.TwinMapTestIn].Put(uint32(0), in), d.coll.Maps[bpf.TwinMapTestOut].Put(uint32(0), out))
	if err != nil {
		return policy.Decision{}, fmt.Errorf("set the twin's input: %w", err)
	}
	if _, err := d.coll.Programs[program].Run(&ebpf.RunOptions{Data: frame}); err != nil {
		return policy.Decision{}, fmt.Errorf("run the twin's %s: %w", program, err)
	}
	if err := d.coll.Maps[bpf.TwinMapTestOut].Lookup(uint32(0), &out); err != nil {
		return policy.Decision{}, fmt.Errorf("read the twin's answer: %w", err)
	}
	if out.Runs != 1 {
		return policy.Decision{}, fmt.Errorf("the twin's %s decided %d times", program, out.Runs)
	}
	return policy.Decision{
		Verdict: flow.Verdict(out.Verdict), Reason: flow.Reason(out.Reason), Rule: out.Rule,
		Src: identity.Number(out.Src), Dst: identity.Number(out.Dst),
	}, nil
}

func (d *dryRun) settings() (s bpf.JudgeSettings, err error) {
	if err := d.shared[mapConfig].Lookup(uint32(0), &s); err != nil {
		return s, fmt.Errorf("read the judge's settings: %w", err)
	}
	return s, nil
}

// clear forgets what the twin has tracked, and tells it which tables are full.
func (d *dryRun) clear() error {
	var t bpf.TwinTwinFlow
	full, err := fullTables(d.shared)
	if err != nil {
		return err
	}
	t.Full = full
	if err := d.coll.Maps[bpf.TwinMapTwin].Put(uint32(0), t); err != nil {
		return fmt.Errorf("clear the twin's entry: %w", err)
	}
	return nil
}

// tracked reports whether the flow was in the table before the question.
func (d *dryRun) tracked() (bool, error) {
	var t bpf.TwinTwinFlow
	if err := d.coll.Maps[bpf.TwinMapTwin].Lookup(uint32(0), &t); err != nil {
		return false, fmt.Errorf("read the twin's entry: %w", err)
	}
	return t.Tracked != 0, nil
}

// ownAddress is the address that connect gives a socket of the workload; invalid for none.
func (d *dryRun) ownAddress(n identity.Number, generation uint64, v4 bool) (netip.Addr, error) {
	var own bpf.JudgeOwn
	err := d.shared[mapOwns].Lookup(bpf.JudgeOwnKey{Generation: generation, Number: uint32(n)}, &own)
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return netip.Addr{}, nil
	case err != nil:
		return netip.Addr{}, fmt.Errorf("read addresses of identity %d: %w", n, err)
	case v4 && own.Flags&bpf.OwnV4 != 0:
		return addrOf(own.V4.W), nil
	case !v4 && own.Flags&bpf.OwnV6 != 0:
		return addrOf(own.V6.W), nil
	}
	return netip.Addr{}, nil
}

// fullTables reports of the tables of IPv4 and IPv6 whether they have no room. The sum of what identities hold is never
// less than the truth and soon read; the tables themselves are counted only when that comes near.
func fullTables(m map[string]*ebpf.Map) (full [2]uint32, err error) {
	var held uint64
	if err := each(m[mapUsage], func(_ *uint32, n *uint32) bool { held += uint64(*n); return true }); err != nil {
		return full, fmt.Errorf("read what identities hold: %w", err)
	}
	if held < uint64(min(m[mapConns4].MaxEntries(), m[mapConns6].MaxEntries())) {
		return full, nil
	}
	var n [2]uint32
	err = errors.Join(
		each(m[mapConns4], func(*bpf.JudgeTuple4, *bpf.JudgeConn) bool { n[0]++; return true }),
		each(m[mapConns6], func(*bpf.JudgeTuple, *bpf.JudgeConn) bool { n[1]++; return true }))
	if err != nil {
		return full, fmt.Errorf("count connections: %w", err)
	}
	for i, name := range []string{mapConns4, mapConns6} {
		if n[i] >= m[name].MaxEntries() {
			full[i] = 1
		}
	}
	return full, nil
}
