package dataplane

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/dataplane/enforce"
)

// ErrGap: this host cannot give a guarantee, and the operator has not accepted that.
var ErrGap = errors.New("this host cannot give a guarantee")

// ErrUnknownGap: no gap has that name.
var ErrUnknownGap = errors.New("no such gap")

// gap is a guarantee that some hosts cannot give. The list is closed: what is not in it cannot be accepted, and a host
// that lacks it is refused.
type gap struct {
	name  string   // in accept_gaps
	hooks []string // hooks of the judge whose absence it is
	means string   // what goes wrong without, as a sentence
}

// gapCgroupNamespace is the one gap that is no hook's.
const gapCgroupNamespace = "cgroup-namespace"

var gaps = []gap{
	{"no-setsockopt-hook", []string{"setsockopt"},
		"setsockopt hook missing: a process with CAP_NET_RAW can send past the judge at the tunnel, by a packet socket with PACKET_QDISC_BYPASS or by AF_XDP"},
	{"no-connect-hook", []string{"connect4", "connect6"},
		"connect hook missing: a program does not get its workload's own source address by itself, and one that is refused waits for a timeout instead of an error at once"},
	{"no-sendmsg-hook", []string{"sendmsg4", "sendmsg6"},
		"sendmsg hook missing: a UDP server on a wildcard address answers from the host's first overlay address, and what is refused is lost without an error"},
	{"no-bind-hook", []string{"bind4", "bind6"},
		"bind hook missing: a process can take an overlay address and port that belong to another workload; it receives nothing there, but keeps the owner from listening"},
	{gapCgroupNamespace, nil,
		"cgroup_root is the root of a namespace and not of this machine: processes outside it are not judged by their identity, and one with CAP_NET_RAW can send past the judge at the tunnel"},
}

// GapNames lists what accept_gaps may name.
func GapNames() []string {
	out := make([]string, len(gaps))
	for i, g := range gaps {
		out[i] = g.name
	}
	return out
}

// CheckGaps refuses names that are no gap's.
func CheckGaps(names []string) error {
	for _, name := range names {
		if !slices.ContainsFunc(gaps, func(g gap) bool { return g.name == name }) {
			return fmt.Errorf("%w: %q; there are %s", ErrUnknownGap, name, strings.Join(GapNames(), ", "))
		}
	}
	return nil
}

// probe is what was found out about this host.
type probe struct {
	lacks     []enforce.Lack
	namespace bool // cgroup_root is the root of a cgroup namespace
}

// probeHost asks the kernel. An answer that is not clear counts against the host.
func probeHost(cfg Config) (p probe, err error) {
	if p.lacks, err = enforce.Probe(enforceConfig(cfg)); err != nil {
		return p, err //nolint:wrapcheck // it says what failed
	}
	p.namespace, err = namespaceRoot(cfg.CgroupRoot)
	return p, err
}

// namespaceRoot: the directory is where a cgroup v2 tree is mounted, so that nobody has chosen it, and yet not the
// machine's own root, which has the id 1. Where a directory below a mount is given, the operator has chosen it.
func namespaceRoot(dir string) (bool, error) {
	id, err := enforce.CgroupID(dir)
	if err != nil {
		return false, err //nolint:wrapcheck // it says what failed
	}
	var about unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, 0, &about); err != nil {
		return false, fmt.Errorf("look at %s: %w", dir, err)
	}
	mount := about.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 || about.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
	return mount && id != rootCgroup, nil
}

// rootCgroup is the id of the machine's cgroup root.
const rootCgroup = 1

// foundGap is a gap that this host has.
type foundGap struct {
	gap
	why error // what the kernel said; nil when there is nothing to add
}

// judgeGaps says what this host cannot guarantee. It is an error that names all gaps that were not accepted.
func judgeGaps(p probe, accepted []string) (found []foundGap, err error) {
	if err := CheckGaps(accepted); err != nil {
		return nil, err
	}
	for _, g := range gaps {
		has, why := p.namespace && g.name == gapCgroupNamespace, error(nil)
		for _, l := range p.lacks {
			if slices.Contains(g.hooks, l.Hook) {
				has, why = true, errors.Join(why, fmt.Errorf("%s: %w", l.Hook, l.Err))
			}
		}
		if has {
			found = append(found, foundGap{gap: g, why: why})
		}
	}
	var errs []error
	for _, l := range p.lacks {
		if !slices.ContainsFunc(gaps, func(g gap) bool { return slices.Contains(g.hooks, l.Hook) }) {
			errs = append(errs, fmt.Errorf("%w: hook %s is missing, and without it packets are not judged; nothing can make up for that: %w", ErrGap, l.Hook, l.Err))
		}
	}
	for _, f := range found {
		if slices.Contains(accepted, f.name) {
			continue
		}
		err := fmt.Errorf("%w: %s; where that can be borne, write in agent.yaml: accept_gaps: [%s]", ErrGap, f.means, f.name)
		if f.why != nil {
			err = fmt.Errorf("%w (the kernel said: %w)", err, f.why)
		}
		errs = append(errs, err)
	}
	return found, errors.Join(errs...)
}

// acceptedHooks are the hooks that may be missing.
func acceptedHooks(accepted []string) (out []string) {
	for _, g := range gaps {
		if slices.Contains(accepted, g.name) {
			out = append(out, g.hooks...)
		}
	}
	return out
}

// gapOfHook finds the gap that the absence of a hook is, where it was found at start.
func gapOfHook(found []foundGap, hook string) (gap, bool) {
	for _, f := range found {
		if slices.Contains(f.hooks, hook) {
			return f.gap, true
		}
	}
	return gap{}, false
}
