package enforce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"

	"github.com/signet-overlay/signet/bpf"
)

// FloodMode is how the flood guard sees packets. The zero value asks for the best that a device takes.
type FloodMode uint8

// The modes, best first. FloodAuto is only ever asked for; a guard that stands has one of the others.
const (
	FloodAuto    FloodMode = iota // native, else generic, else tc
	FloodNative                   // XDP in the driver, before the kernel makes anything of a packet
	FloodGeneric                  // XDP in the kernel's receive path: saves the stack's work, not the driver's; turns GRO off
	FloodTC                       // tcx ingress: also for devices without Ethernet, and beside another tool's XDP program
)

// floodModes are the names in configuration and status.
var floodModes = [...]string{FloodAuto: "auto", FloodNative: "native", FloodGeneric: "generic", FloodTC: "tc"}

// String is the mode's name in configuration and status.
func (m FloodMode) String() string {
	if int(m) < len(floodModes) {
		return floodModes[m]
	}
	return fmt.Sprintf("FloodMode(%d)", uint8(m))
}

// ParseFloodMode reads a mode's name. It refuses every other text with ErrConfig.
func ParseFloodMode(text string) (FloodMode, error) {
	if i := slices.Index(floodModes[:], text); i >= 0 {
		return FloodMode(i), nil
	}
	return 0, fmt.Errorf("%w: %q is no mode of the handshake guard: want auto, native, generic or tc", ErrConfig, text)
}

// FloodRate is a token bucket: Burst handshake initiations at once, and one more for each Every.
type FloodRate struct {
	Every time.Duration // at most an hour
	Burst int           // at most 65536
}

const (
	maxFloodEvery = time.Hour
	maxFloodBurst = 1 << 16
)

// FloodConfig says what the flood guard stands before. Zero values take the defaults, but for Port.
type FloodConfig struct {
	Interfaces []string // underlay devices to begin with; Attach adds more
	Port       uint16   // WireGuard's
	Mode       FloodMode
	PerSource  FloodRate // of each unknown source: an IPv4 address, an IPv6 /64
	Known      FloodRate // of each known address (SetKnown), which the global bucket does not concern
	Global     FloodRate // of all unknown sources together
	MaxSources int       // unknown sources remembered, about 96 bytes each; beyond it the longest unused is forgotten
	MaxKnown   int       // known addresses; SetKnown refuses more
	Logger     *slog.Logger
}

// DefaultFloodSources remembers as many unknown sources as 1.5 MiB hold; DefaultFloodKnown is a few addresses for each
// peer of a large mesh.
const (
	DefaultFloodSources = 1 << 14
	DefaultFloodKnown   = 1 << 16
)

// maxFloodOwn bounds the host's own addresses.
const maxFloodOwn = 1 << 12

// The default rates. A peer initiates every 5 s while it gets no answer, and every 120 s otherwise; an unknown source can
// be many peers behind one NAT. An initiation costs WireGuard about 0.1 ms of one core, so that all strangers together
// get about a tenth of it. A known address is generous because others can forge it.
const (
	defaultSourceEvery, defaultSourceBurst = 50 * time.Millisecond, 100
	defaultKnownEvery, defaultKnownBurst   = 5 * time.Millisecond, 1000
	defaultGlobalEvery, defaultGlobalBurst = time.Millisecond, 2000
)

// FloodCounters counts messages to WireGuard's port, by what became of them.
type FloodCounters struct {
	Passed     uint64 // of sound form and within the rates
	BadLength  uint64
	BadType    uint64 // no type of WireGuard's, or something in the three reserved bytes
	RateSource uint64 // initiations beyond the rate of their source
	RateGlobal uint64 // initiations beyond what all unknown sources have together
}

// FloodStatus is the guard of one device as the kernel has it.
type FloodStatus struct {
	Interface string
	Mode      FloodMode
	Attached  bool
	Refused   error // why the mode is no better one; nil for FloodNative, and where a mode was asked for by name
}

// Flood is a handshake-flood guard on underlay devices: it drops what cannot be WireGuard's and limits initiations, for
// messages to this host's own addresses at WireGuard's own port. It touches nothing else. It is hardening: WireGuard's
// own cookies hold without it.
//
// Nothing is pinned. The guard ends with its process, so that a dead agent's guard cannot keep a host from its peers; the
// embedded WireGuard that it protects ends at the same moment, and the kernel's goes on behind its cookies.
type Flood struct {
	cfg  FloodConfig
	log  *slog.Logger
	coll *ebpf.Collection

	mu     sync.Mutex // guards what follows, and that two writers of one address set do not mix
	guards map[string]floodGuard
	closed bool
}

type floodGuard struct {
	link    link.Link
	index   int
	mode    FloodMode
	refused error
}

// Names in bpf/flood.c.
const (
	floodXDP        = "flood_xdp"
	floodEther      = "flood_ether"
	floodPlain      = "flood_plain"
	mapFloodSources = "sources"
	mapFloodKnown   = "known"
	mapFloodOwn     = "own"
	mapFloodGlobal  = "global"
	mapFloodCauses  = "causes"
	varFloodPort    = "port"
	varFloodLimits  = "limits"
	xdpHasFrags     = 1 << 5 // BPF_F_XDP_HAS_FRAGS, Linux 5.18
)

// OpenFlood loads the guard and attaches it to the configured devices. The host's own addresses are those that its devices
// have now; SetOwn keeps them current. It needs CAP_BPF and CAP_NET_ADMIN. Other rates or another port need another guard,
// opened after this one is closed: a device takes one XDP program.
func OpenFlood(cfg FloodConfig) (*Flood, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, explain(fmt.Errorf("lift the limit on locked memory: %w", err))
	}
	coll, err := loadFlood(cfg)
	if err != nil {
		return nil, explain(err)
	}
	f := &Flood{cfg: cfg, log: cfg.Logger, coll: coll, guards: map[string]floodGuard{}}
	if err := f.begin(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (f *Flood) begin() error {
	own, err := hostAddresses()
	if err != nil {
		return err
	}
	if err := f.SetOwn(own); err != nil {
		return err
	}
	for _, name := range f.cfg.Interfaces {
		if err := f.Attach(name); err != nil {
			return err
		}
	}
	return nil
}

func (c FloodConfig) complete() (FloodConfig, error) {
	if c.Port == 0 {
		return c, fmt.Errorf("%w: the handshake guard needs WireGuard's port", ErrConfig)
	}
	if int(c.Mode) >= len(floodModes) {
		return c, fmt.Errorf("%w: %v is no mode of the handshake guard", ErrConfig, c.Mode)
	}
	for _, d := range []struct {
		name string
		rate *FloodRate
		def  FloodRate
	}{
		{"per source", &c.PerSource, FloodRate{defaultSourceEvery, defaultSourceBurst}},
		{"of known addresses", &c.Known, FloodRate{defaultKnownEvery, defaultKnownBurst}},
		{"of all unknown sources", &c.Global, FloodRate{defaultGlobalEvery, defaultGlobalBurst}},
	} {
		if *d.rate == (FloodRate{}) {
			*d.rate = d.def
		}
		if r := *d.rate; r.Every <= 0 || r.Every > maxFloodEvery || r.Burst < 1 || r.Burst > maxFloodBurst {
			return c, fmt.Errorf("%w: rate %s: one initiation each %v with a burst of %d is not within 1ns to %v and 1 to %d",
				ErrConfig, d.name, r.Every, r.Burst, maxFloodEvery, maxFloodBurst)
		}
	}
	for _, d := range []struct {
		v   *int
		def int
	}{{&c.MaxSources, DefaultFloodSources}, {&c.MaxKnown, DefaultFloodKnown}} {
		if *d.v == 0 {
			*d.v = d.def
		}
		if *d.v < 1 || *d.v > 1<<24 {
			return c, fmt.Errorf("%w: the handshake guard cannot remember %d addresses, only 1 to %d", ErrConfig, *d.v, 1<<24)
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// loadFlood loads the programs. Without multi-buffer support in the kernel they are loaded without it: drivers then refuse
// native mode on devices with large frames.
func loadFlood(cfg FloodConfig) (*ebpf.Collection, error) {
	spec, err := bpf.LoadFlood()
	if err != nil {
		return nil, fmt.Errorf("read the flood guard's object: %w", err)
	}
	spec.Maps[mapFloodSources].MaxEntries = uint32(cfg.MaxSources)
	spec.Maps[mapFloodKnown].MaxEntries = uint32(cfg.MaxKnown)
	spec.Maps[mapFloodOwn].MaxEntries = maxFloodOwn
	var limits bpf.FloodRates
	limits.Source.Every, limits.Source.Full = cfg.PerSource.bucket()
	limits.Known.Every, limits.Known.Full = cfg.Known.bucket()
	limits.Global.Every, limits.Global.Full = cfg.Global.bucket()
	if err := spec.Variables[varFloodLimits].Set(limits); err != nil {
		return nil, fmt.Errorf("set the rates: %w", err)
	}
	var port [2]byte
	binary.BigEndian.PutUint16(port[:], cfg.Port)
	if err := spec.Variables[varFloodPort].Set(port); err != nil {
		return nil, fmt.Errorf("set the port: %w", err)
	}
	coll, err := ebpf.NewCollection(spec.Copy())
	if err == nil {
		return coll, nil
	}
	spec.Programs[floodXDP].Flags &^= xdpHasFrags
	coll, plainErr := ebpf.NewCollection(spec)
	if plainErr != nil {
		return nil, fmt.Errorf("load the flood guard: %w", err)
	}
	return coll, nil
}

// bucket gives a rate as flood.c has it, in nanoseconds.
func (r FloodRate) bucket() (every, full uint64) {
	return uint64(r.Every), uint64(r.Every) * uint64(r.Burst)
}

// hostAddresses lists the addresses of all devices.
func hostAddresses() ([]netip.Addr, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the host's addresses: %w", err)
	}
	var out []netip.Addr
	for _, a := range list {
		p, err := netip.ParsePrefix(a.String())
		if err != nil {
			return nil, fmt.Errorf("read the host's address %s: %w", a, err)
		}
		out = append(out, p.Addr())
	}
	return out, nil
}

// Attach guards one device, in the configured mode or in the best that the device takes; Status says which. It is
// idempotent: a guard that stands is left alone, one that the kernel has let go of is made anew. Native mode makes some
// drivers set up their queues again, which loses packets for a moment.
func (f *Flood) Attach(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	device, err := net.InterfaceByName(name)
	if err != nil {
		return fmt.Errorf("guard the handshakes of %s: %w", name, err)
	}
	if g, ok := f.guards[name]; ok {
		if g.index == device.Index && g.attached() {
			return nil
		}
		if err := f.detachLocked(name); err != nil {
			return err
		}
	}
	g, err := f.attachLocked(device)
	if err != nil {
		return explain(fmt.Errorf("guard the handshakes of %s: %w", name, err))
	}
	f.guards[name] = g
	f.log.Info("handshakes are guarded", "device", name, "mode", g.mode.String(), "refused", g.refused)
	return nil
}

// The devices that some mode cannot guard. XDP programs are given no hint of what a packet begins with, and tc programs
// none of how long a strange header is.
var (
	errNoEthernet = errors.New("packets of this device have no Ethernet header")
	errLinkHeader = errors.New("packets of this device have a link header that is not Ethernet's")
)

// ethernetAddress is the length of a link-layer address on devices with Ethernet headers. Loopback has both, but Go hides
// its address; devices whose packets begin with the IP header have none, or an IP address, which Go hides as well.
const ethernetAddress = 6

func (f *Flood) attachLocked(device *net.Interface) (floodGuard, error) {
	modes := []FloodMode{FloodNative, FloodGeneric, FloodTC}
	if f.cfg.Mode != FloodAuto {
		modes = []FloodMode{f.cfg.Mode}
	}
	address := len(device.HardwareAddr)
	ethernet := address == ethernetAddress || device.Flags&net.FlagLoopback != 0
	if address != 0 && !ethernet {
		return floodGuard{}, errLinkHeader
	}
	var refused []error
	for _, mode := range modes {
		l, err := f.attachMode(device.Index, mode, ethernet)
		if err == nil {
			return floodGuard{link: l, index: device.Index, mode: mode, refused: errors.Join(refused...)}, nil
		}
		refused = append(refused, fmt.Errorf("%v: %w", mode, err))
	}
	return floodGuard{}, errors.Join(refused...)
}

func (f *Flood) attachMode(index int, mode FloodMode, ethernet bool) (link.Link, error) {
	if mode == FloodTC {
		prog := f.coll.Programs[floodPlain]
		if ethernet {
			prog = f.coll.Programs[floodEther]
		}
		l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
		if errors.Is(err, ebpf.ErrNotSupported) {
			err = fmt.Errorf("%w: %w", ErrNoTCX, err)
		}
		return l, err
	}
	if !ethernet {
		return nil, errNoEthernet
	}
	flags := link.XDPDriverMode
	if mode == FloodGeneric {
		flags = link.XDPGenericMode
	}
	return link.AttachXDP(link.XDPOptions{Program: f.coll.Programs[floodXDP], Interface: index, Flags: flags})
}

// attached asks the kernel: a link loses its device when that goes.
func (g floodGuard) attached() bool {
	info, err := g.link.Info()
	if err != nil {
		return false
	}
	if x := info.XDP(); x != nil {
		return int(x.Ifindex) == g.index
	}
	t := info.TCX()
	return t != nil && int(t.Ifindex) == g.index
}

// Detach takes the guard off a device. It is idempotent, and works for a device that is gone.
func (f *Flood) Detach(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	return f.detachLocked(name)
}

func (f *Flood) detachLocked(name string) error {
	g, ok := f.guards[name]
	if !ok {
		return nil
	}
	delete(f.guards, name)
	if err := g.link.Close(); err != nil {
		return fmt.Errorf("leave the handshakes of %s unguarded: %w", name, err)
	}
	return nil
}

// Status tells of each guarded device, by name, how it is guarded. After Close it tells of none.
func (f *Flood) Status() []FloodStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []FloodStatus
	for name, g := range f.guards {
		out = append(out, FloodStatus{Interface: name, Mode: g.mode, Attached: g.attached(), Refused: g.refused})
	}
	slices.SortFunc(out, func(a, b FloodStatus) int {
		if a.Interface < b.Interface {
			return -1
		}
		return 1
	})
	return out
}

// SetKnown replaces the addresses at which peers are expected. Initiations from there need nothing of the global bucket.
// An address that was known keeps its bucket. More than MaxKnown are refused whole, with ErrConfig.
func (f *Flood) SetKnown(addrs []netip.Addr) error {
	return f.replace(mapFloodKnown, f.cfg.MaxKnown, addrs, uint64(0))
}

// SetOwn replaces the host's own addresses: what is addressed to any other is never dropped, whatever it is. Broadcast and
// multicast are no addresses of a host and pass. More than 4096 are refused whole, with ErrConfig.
func (f *Flood) SetOwn(addrs []netip.Addr) error {
	return f.replace(mapFloodOwn, maxFloodOwn, addrs, uint8(1))
}

// replace makes the keys of a map the given addresses, and leaves values alone where a key stays.
func (f *Flood) replace(name string, limit int, addrs []netip.Addr, value any) error {
	want := make(map[[16]byte]bool, min(len(addrs), limit+1))
	for _, a := range addrs {
		if !a.IsValid() {
			return fmt.Errorf("%w: addresses for the handshake guard: one is not valid", ErrConfig)
		}
		want[a.Unmap().As16()] = true
		if len(want) > limit {
			return fmt.Errorf("%w: more than %d addresses for the handshake guard", ErrConfig, limit)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	m := f.coll.Maps[name]
	var gone [][16]byte
	var key [16]byte
	old := make([]byte, m.ValueSize())
	it := m.Iterate()
	for it.Next(&key, &old) {
		if !want[key] {
			gone = append(gone, key)
		}
		delete(want, key)
	}
	if err := it.Err(); err != nil {
		return explain(fmt.Errorf("list %s addresses: %w", name, err))
	}
	// What goes makes room first: a full map must take its successor.
	for _, key := range gone {
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return explain(fmt.Errorf("forget a %s address: %w", name, err))
		}
	}
	for key := range want {
		if err := m.Update(key, value, ebpf.UpdateNoExist); err != nil {
			return explain(fmt.Errorf("add a %s address: %w", name, err))
		}
	}
	return nil
}

// Counters reads what was counted since OpenFlood, on all devices and CPUs together.
func (f *Flood) Counters() (FloodCounters, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return FloodCounters{}, ErrClosed
	}
	var out FloodCounters
	for cause, to := range [bpf.FloodCauses]*uint64{
		bpf.FloodPassed: &out.Passed, bpf.FloodBadLength: &out.BadLength, bpf.FloodBadType: &out.BadType,
		bpf.FloodRateSource: &out.RateSource, bpf.FloodRateGlobal: &out.RateGlobal,
	} {
		var each []uint64
		if err := f.coll.Maps[mapFloodCauses].Lookup(uint32(cause), &each); err != nil {
			return FloodCounters{}, explain(fmt.Errorf("read the flood guard's counters: %w", err))
		}
		for _, n := range each {
			*to += n
		}
	}
	return out, nil
}

// Close takes every guard away. It is idempotent.
func (f *Flood) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	var errs []error
	for name := range f.guards {
		errs = append(errs, f.detachLocked(name))
	}
	f.coll.Close()
	return errors.Join(errs...)
}
