package attest

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/dataplane/link"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// look is one look at the host. What several workloads ask is found out once.
type look struct {
	host     Host
	warnings []string
	dirs     []string // of cgroups that were searched

	devices  []link.Leg
	err      error // of the devices
	looked   bool
	searched bool
	running  []container
	fds      []int // of the running containers' network namespaces, -1 for none; open until the end of the look
	home     space
}

func newLook(h Host) *look { return &look{host: h} }

func (l *look) close() {
	for _, fd := range l.fds {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// legs are the host's devices.
func (l *look) legs() ([]link.Leg, error) {
	if !l.looked {
		l.looked = true
		l.devices, l.err = link.Legs()
	}
	return l.devices, l.err //nolint:wrapcheck // says what was looked for
}

// device resolves interface:NAME.
func (l *look) device(name string, w mesh.Workload) found {
	legs, err := l.legs()
	if err != nil {
		return unmatched("", err.Error())
	}
	i := slices.IndexFunc(legs, func(d link.Leg) bool { return d.Name == name })
	if i < 0 {
		return unmatched("", "device missing: no network device is called "+name)
	}
	if why := l.refuses(legs[i]); why != "" {
		l.warnings = append(l.warnings, w.ID.Short()+": "+why)
		return unmatched("", why)
	}
	return found{Match: Match{Device: name}, index: uint32(legs[i].Index)}
}

// refuses says why a device cannot stand for a workload, or nothing. All that arrives from such a device is the
// workload's: it must lead to one network namespace, and to nobody else.
func (l *look) refuses(d link.Leg) string {
	switch {
	case d.Loopback:
		return "device " + d.Name + " is loopback, which every process of this host has"
	case d.Name == l.host.Tunnel:
		return "device " + d.Name + " is the tunnel, which the whole overlay is behind"
	case d.Default:
		return "device " + d.Name + " holds this host's default route, so the rest of the world is behind it"
	case d.Kind != "veth" && d.Kind != "netkit":
		return fmt.Sprintf("device %s is of kind %s; a workload is behind a veth or netkit device whose other end is in its network namespace", d.Name, d.Kind)
	case d.Space == link.NoSpace:
		return "device " + d.Name + " does not lead into another network namespace: its other end is in this one"
	case d.Master != "":
		return "device " + d.Name + " is a port of " + d.Master + ", where the packets of all ports meet: give the workload a device of its own"
	}
	return ""
}

// search finds the host's containers and what their runtimes say of them.
func (l *look) search() {
	if l.searched {
		return
	}
	l.searched = true
	var full bool
	l.running, l.dirs, full = scan(l.host.Root)
	if full {
		l.warnings = append(l.warnings, fmt.Sprintf("not every container is found: this host has more than %d containers, or more or deeper cgroups than are looked through", maxContainers))
	}
	home, err := homeSpace()
	l.home, l.fds = home, make([]int, len(l.running))
	for i := range l.running {
		c := &l.running[i]
		var cerr error
		if l.fds[i], cerr = c.identify(l.host.Root, l.host.Runtimes); cerr == nil {
			cerr = err
		}
		if cerr != nil {
			c.why = cerr.Error()
		}
	}
	l.looked = true
	l.devices, l.err = number(l.running, l.fds, home)
}

// containers resolves container:KEY=VALUE, with the directory and the user that other selectors name. In order:
//
//  1. the containers below the directory that have all labels;
//  2. all of them are in this host's network namespace, and their cgroups are what matches; or
//  3. all of them share one of their own, with nobody who does not match, and one device leads there.
func (l *look) containers(t target) found {
	l.search()
	// 1.
	var match []*container
	unknown := ""
	for i := range l.running {
		c := &l.running[i]
		switch {
		case !within(c.path, t.path):
		case c.has(t.labels):
			match = append(match, c)
		case c.why != "":
			unknown = fmt.Sprintf("; of container %s nothing is known: %s", c.short(), c.why)
		}
	}
	if len(match) == 0 {
		return unmatched("", "no running container has "+strings.Join(t.labels, " and ")+unknown)
	}
	f := found{}
	var paths []string
	for _, c := range match {
		f.keys = append(f.keys, policy.LocalKey{Cgroup: c.cgroup, UID: t.uid})
		paths = append(paths, c.path)
	}
	f.Key, f.Path = f.keys[0], strings.Join(paths, "\n")
	for _, c := range match[1:] {
		if c.space != match[0].space {
			return unmatched(f.Path, fmt.Sprintf("containers %s and %s match and are in different network namespaces; a workload has one address of each family on a host: add a label that tells them apart",
				match[0].short(), c.short()))
		}
	}
	// 2.
	if match[0].space == l.home {
		return f
	}
	// 3.
	if t.uid != policy.AnyUID {
		return unmatched(f.Path, "container "+match[0].short()+" has a network namespace of its own, and packets from there do not tell their user: leave uid out")
	}
	for i := range l.running {
		c := &l.running[i]
		if c.space == match[0].space && !slices.Contains(match, c) {
			return unmatched(f.Path, fmt.Sprintf("container %s shares the network namespace of %s and does not match: select the pod as a whole", c.short(), match[0].short()))
		}
	}
	leg, why := l.legTo(match[0])
	if why != "" {
		return unmatched(f.Path, why)
	}
	f.Device, f.index = leg.Name, uint32(leg.Index)
	return f
}

// legTo finds the one device that leads to a container's network namespace and can stand for a workload.
func (l *look) legTo(c *container) (leg link.Leg, why string) {
	legs, err := l.legs()
	if err != nil {
		return leg, err.Error()
	}
	refused, good := "", []link.Leg{}
	for _, d := range legs {
		if c.numb == link.NoSpace || d.Space != c.numb {
			continue
		}
		if why := l.refuses(d); why != "" {
			refused = ": " + why
			continue
		}
		good = append(good, d)
	}
	switch len(good) {
	case 1:
		return good[0], ""
	case 0:
		return leg, "container " + c.short() + " has a network namespace of its own, and no device of this host leads there that it has to itself" + refused
	}
	return leg, fmt.Sprintf("devices %s and %s lead to container %s: say which one carries the overlay with interface:NAME", good[0].Name, good[1].Name, c.short())
}
