package link

import (
	"errors"
	"fmt"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Errors that a caller tells apart.
var (
	// ErrNoFilter: no filter of ours stands in that place.
	ErrNoFilter = errors.New("no such filter")
	// ErrNotDirect: what stands in our place is not as we made it.
	ErrNotDirect = errors.New("the filter there is not in direct-action mode, so that its verdicts mean nothing")
)

// Clsact attaches programs to devices of kernels that have no tcx (below 6.6): filters of kind bpf, in direct-action
// mode, on the clsact queueing discipline.
//
// Nothing owns such a filter: it stands until somebody deletes it, whether this process lives or not. Ours are known by
// their priority, handle and name. They are in front of every filter of a later priority, and of those of their own
// priority that stood there first. Filters of others are never touched.
//
// Its methods may be called from several goroutines.
type Clsact struct {
	handle *netlink.Handle

	mu      sync.Mutex // one question at a time on the socket
	sockets map[int]*nl.SocketHandle
}

// filterPriority is the first that the kernel runs.
const filterPriority = 1

// anyProtocol is ETH_P_ALL, in network order.
const anyProtocol = uint16(unix.ETH_P_ALL << 8)

// NewClsact opens the sockets, in the network namespace of the calling thread: every method works there.
func NewClsact() (*Clsact, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, explain(fmt.Errorf("open netlink socket: %w", err))
	}
	s, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		h.Close()
		return nil, explain(fmt.Errorf("open netlink socket: %w", err))
	}
	if err := errors.Join(s.SetSendTimeout(&nl.SocketTimeoutTv), s.SetReceiveTimeout(&nl.SocketTimeoutTv)); err != nil {
		h.Close()
		s.Close()
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	return &Clsact{handle: h, sockets: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}}, nil
}

// Close closes the sockets; filters stay.
func (c *Clsact) Close() error {
	c.handle.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.sockets {
		s.Close()
	}
	return nil
}

// Attach puts a program, given by its descriptor, into a place of a device. What stood there before is replaced in one
// step: no packet passes between the two. name is what tc shows.
func (c *Clsact) Attach(ifindex int, egress bool, handle uint32, name string, program int) error {
	if err := c.ensureQdisc(ifindex); err != nil {
		return err
	}
	err := c.handle.FilterReplace(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: parentOf(egress), Handle: handle, Priority: filterPriority, Protocol: unix.ETH_P_ALL,
		},
		Fd: program, Name: name, DirectAction: true,
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		if other := c.inTheWay(ifindex, egress); other != "" {
			return fmt.Errorf("%w: %s stands at the first priority of device %d; move it to a later one", ErrConflict, other, ifindex)
		}
	}
	if err != nil {
		return explain(fmt.Errorf("attach filter %s to device %d: %w", name, ifindex, err))
	}
	return nil
}

// ensureQdisc makes the clsact queueing discipline where there is none.
func (c *Clsact) ensureQdisc(ifindex int) error {
	err := c.handle.QdiscAdd(clsactOf(ifindex))
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EEXIST) {
		return explain(fmt.Errorf("add clsact to device %d: %w", ifindex, err))
	}
	// In the place may stand the older kind, which puts every filter on the way in, whatever it was made for.
	kind, err := c.qdisc(ifindex)
	if err != nil {
		return err
	}
	if kind != "clsact" {
		return fmt.Errorf("%w: queueing discipline %s stands on device %d where clsact must be; remove it with tc qdisc del, or use tc qdisc replace", ErrConflict, kind, ifindex)
	}
	return nil
}

func clsactOf(ifindex int) *netlink.GenericQdisc {
	return &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}, QdiscType: "clsact",
	}
}

func parentOf(egress bool) uint32 {
	if egress {
		return netlink.HANDLE_MIN_EGRESS
	}
	return netlink.HANDLE_MIN_INGRESS
}

// Program asks the kernel for the id of the program that stands in a place. No filter is ErrNoFilter, and so is a device
// that is gone, which is ENODEV too; one that was changed is ErrNotDirect.
func (c *Clsact) Program(ifindex int, egress bool, handle uint32) (id uint32, err error) {
	reply, err := c.ask(&nl.TcMsg{
		Family: nl.FAMILY_ALL, Ifindex: int32(ifindex), Handle: handle, Parent: parentOf(egress), Info: filterPriority<<16 | uint32(anyProtocol),
	})
	switch {
	case errors.Is(err, unix.ENODEV):
		return 0, fmt.Errorf("%w: device %d is gone: %w", ErrNoFilter, ifindex, err)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return 0, ErrNoFilter // also where the queueing discipline is gone
	case err != nil:
		return 0, explain(fmt.Errorf("read filter of device %d: %w", ifindex, err))
	}
	return programOf(reply)
}

// programOf reads the kernel's description of a filter.
func programOf(reply []byte) (id uint32, err error) {
	if len(reply) < nl.SizeofTcMsg {
		return 0, fmt.Errorf("%w: the kernel's answer has %d bytes", ErrNoFilter, len(reply))
	}
	var direct bool
	walk(reply[nl.SizeofTcMsg:], func(kind uint16, value []byte) {
		if kind != nl.TCA_OPTIONS {
			return
		}
		walk(value, func(kind uint16, value []byte) {
			if len(value) < 4 {
				return
			}
			switch n := nl.NativeEndian().Uint32(value); kind {
			case nl.TCA_BPF_ID:
				id = n
			case nl.TCA_BPF_FLAGS:
				direct = n&nl.TCA_BPF_FLAG_ACT_DIRECT != 0
			}
		})
	})
	if !direct {
		return 0, ErrNotDirect
	}
	return id, nil
}

// walk calls f for each attribute, and ends at the first one that does not fit.
func walk(b []byte, f func(kind uint16, value []byte)) {
	for order := nl.NativeEndian(); len(b) >= unix.SizeofRtAttr; {
		size, kind := int(order.Uint16(b)), order.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)
		if size < unix.SizeofRtAttr || size > len(b) {
			return
		}
		f(kind, b[unix.SizeofRtAttr:size])
		padded := (size + unix.RTA_ALIGNTO - 1) &^ (unix.RTA_ALIGNTO - 1)
		b = b[min(padded, len(b)):]
	}
}

// ask reads one filter.
func (c *Clsact) ask(m *nl.TcMsg) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	req := nl.NewNetlinkRequest(unix.RTM_GETTFILTER, 0)
	req.Sockets = c.sockets
	req.AddData(m)
	req.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("bpf")))
	replies, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil {
		return nil, err
	}
	if len(replies) == 0 {
		return nil, unix.ENOENT
	}
	return replies[0], nil
}

// qdisc is the kind of what stands in clsact's place. (Asked for one, kernels answer to everybody but the one who asks.)
func (c *Clsact) qdisc(ifindex int) (kind string, err error) {
	all, err := dump(func() ([]netlink.Qdisc, error) {
		return c.handle.QdiscList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}})
	})
	if err != nil {
		return "", explain(fmt.Errorf("list queueing disciplines of device %d: %w", ifindex, err))
	}
	for _, q := range all {
		if q.Attrs().LinkIndex == ifindex && q.Attrs().Parent == netlink.HANDLE_CLSACT {
			kind = q.Type()
		}
	}
	return kind, nil
}

// inTheWay describes the filter of another kind that keeps ours out of its priority; empty when there is none.
func (c *Clsact) inTheWay(ifindex int, egress bool) string {
	all, err := c.filters(ifindex, egress)
	if err != nil {
		return ""
	}
	for _, f := range all {
		a := f.Attrs()
		if a.Priority == filterPriority && (f.Type() != "bpf" || a.Protocol != unix.ETH_P_ALL) {
			return fmt.Sprintf("a filter of kind %s for protocol %#04x", f.Type(), a.Protocol)
		}
	}
	return ""
}

func (c *Clsact) filters(ifindex int, egress bool) ([]netlink.Filter, error) {
	all, err := dump(func() ([]netlink.Filter, error) {
		return c.handle.FilterList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}, parentOf(egress))
	})
	if err != nil {
		return nil, explain(fmt.Errorf("list filters of device %d: %w", ifindex, err))
	}
	return all, nil
}

// Detach removes our filter from a place. One that is not there, and a device that is gone, are success.
func (c *Clsact) Detach(ifindex int, egress bool, handle uint32) error {
	if _, err := c.Program(ifindex, egress, handle); errors.Is(err, ErrNoFilter) {
		return nil
	}
	err := c.handle.FilterDel(&netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{
		LinkIndex: ifindex, Parent: parentOf(egress), Handle: handle, Priority: filterPriority, Protocol: unix.ETH_P_ALL,
	}, Fd: -1})
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		return explain(fmt.Errorf("remove filter of device %d: %w", ifindex, err))
	}
	return nil
}

// Clear removes our filters with the given handles from a device, and clsact itself when no filter of anybody is left.
// Only the release of a host calls it: another tool that makes a filter at that very moment would lose it.
func (c *Clsact) Clear(ifindex int, handles ...uint32) error {
	var errs []error
	ours, left := 0, 0
	for _, egress := range []bool{true, false} {
		for _, h := range handles {
			if _, err := c.Program(ifindex, egress, h); !errors.Is(err, ErrNoFilter) {
				ours++
				errs = append(errs, c.Detach(ifindex, egress, h))
			}
		}
		all, err := c.filters(ifindex, egress)
		errs = append(errs, err)
		left += len(all)
	}
	if err := errors.Join(errs...); err != nil || ours == 0 || left > 0 {
		return err
	}
	if err := c.handle.QdiscDel(clsactOf(ifindex)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENODEV) {
		return explain(fmt.Errorf("remove clsact of device %d: %w", ifindex, err))
	}
	return nil
}
