package enforce

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/signet-overlay/signet/internal/policy"
)

// ABI is the version of everything that is pinned (bpf/lib/maps.h). It is part of the path, so that two versions never
// share a map.
const ABI = "v1"

// ErrConfig is wrapped by every refusal of a Config.
var ErrConfig = errors.New("invalid enforcement configuration")

// Sizes bounds the kernel's maps. Nothing is allocated ahead, apart from hash buckets of 16 bytes each; zero values
// take the defaults. When a map is pinned with another size, what it holds moves to one of the new size before anything is
// attached; where it holds more than would fit, the size stays as it is.
type Sizes struct {
	Addresses  int // of one View; two generations exist while a View is made real
	Workloads  int // selectors of one View
	Entries    int // policy entries over all rulesets, old and new ones together
	Conns      int // tracked connections of each IP version; a full table denies new ones with CT_FULL
	Quota      int // connections that one identity may have opened; negative for no bound
	EventBytes int // ring buffer, a power of two
}

// The defaults of Sizes hold what a View may. Entries hold the largest View alone, and two of the largest policies that
// the coordinator compiles (half as many) beside each other; their buckets, 32 MiB, are most of the 41 MiB that an
// idle host pays. Twice as many would double that, for a View that no coordinator makes: Apply has another way for it.
const (
	DefaultAddresses  = policy.MaxAddresses
	DefaultWorkloads  = policy.MaxLocals
	DefaultEntries    = policy.MaxEntries
	DefaultConns      = 1 << 18
	DefaultQuota      = DefaultConns / 4
	DefaultRanges     = 1 << 16
	DefaultEventBytes = 1 << 20
)

func (s Sizes) withDefaults() Sizes {
	for _, d := range []struct {
		v   *int
		def int
	}{
		{&s.Addresses, DefaultAddresses}, {&s.Workloads, DefaultWorkloads}, {&s.Entries, DefaultEntries},
		{&s.Conns, DefaultConns}, {&s.Quota, DefaultQuota}, {&s.EventBytes, DefaultEventBytes},
	} {
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	return s
}

// mapEntries gives the size of each sized map by its name. Addresses, workloads and rulesets exist twice while a View
// is made real.
func (s Sizes) mapEntries() map[string]uint32 {
	return map[string]uint32{
		mapAddrs:    uint32(2 * s.Addresses),
		mapLocals:   uint32(2 * s.Workloads),
		mapOwns:     uint32(2 * s.Workloads),
		mapRulesets: uint32(2 * policy.MaxRulesets),
		mapEntries:  uint32(s.Entries),
		mapIfaces:   uint32(2 * policy.MaxDevices),
		mapConns4:   uint32(s.Conns),
		mapConns6:   uint32(s.Conns),
		mapEvents:   uint32(s.EventBytes),
	}
}

// Config says what to enforce and where.
type Config struct {
	BPFFS      string // directory on a bpffs; everything is pinned below BPFFS/v1
	CgroupRoot string // directory of a cgroup v2: the sockets of processes in it and below it are judged
	Tunnel     int    // ifindex of the tunnel, 0 until AttachTunnel
	Overlay4   netip.Prefix
	Overlay6   netip.Prefix
	Sizes      Sizes
	Logger     *slog.Logger // nil discards

	// Filters attaches to devices where the kernel has no tcx; nil refuses such a kernel. Clsact uses it even where the
	// kernel has tcx.
	Filters Filters
	Clsact  bool
	// Accept names hooks of the cgroup without which the host is judged all the same, because the operator has accepted
	// what that means. Without any other, Open refuses.
	Accept []string
	// Without names hooks that are taken for missing, whatever the kernel has.
	Without []string

	// SweepEvery is how often idle connections are removed; 0 takes 20 s, negative never.
	SweepEvery time.Duration
}

func (c Config) pins() string  { return filepath.Join(c.BPFFS, ABI) }
func (c Config) maps() string  { return filepath.Join(c.pins(), dirMaps) }
func (c Config) links() string { return filepath.Join(c.pins(), dirLinks) }

// Directories of pins, below the version's.
const (
	dirMaps  = "maps"
	dirLinks = "links"
)

const defaultSweep = 20 * time.Second

func (c Config) complete() (Config, error) {
	if !c.Overlay4.IsValid() || !c.Overlay4.Addr().Is4() || !c.Overlay6.IsValid() || c.Overlay6.Addr().Is4() {
		return c, fmt.Errorf("%w: overlay prefixes %v and %v are not one IPv4 and one IPv6 prefix", ErrConfig, c.Overlay4, c.Overlay6)
	}
	if c.Overlay4.Bits() == 0 || c.Overlay6.Bits() == 0 {
		return c, fmt.Errorf("%w: an overlay of every address would police the whole host", ErrConfig)
	}
	if c.BPFFS == "" || c.CgroupRoot == "" {
		return c, fmt.Errorf("%w: the bpffs directory and the cgroup root must be given", ErrConfig)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.SweepEvery == 0 {
		c.SweepEvery = defaultSweep
	}
	c.Overlay4, c.Overlay6 = c.Overlay4.Masked(), c.Overlay6.Masked()
	c.Sizes = c.Sizes.withDefaults()
	return c, nil
}
