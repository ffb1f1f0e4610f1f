package enforce

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// hook is one place in the kernel, and the program that should stand there: in a link that is pinned, or in a filter.
type hook struct {
	name   string
	prog   *ebpf.Program   // nil where the kernel cannot load it
	id     ebpf.ProgramID  // of prog, once it was ensured
	device int             // ifindex; 0 for hooks of the cgroup
	side   ebpf.AttachType // of the device
	here   func(*link.Info) bool
	attach func() (link.Link, error)
	place  *place // of a filter, which has neither of the two above
}

// Why a hook is not as it should be.
var (
	errOtherTarget  = errors.New("link was detached, or is attached elsewhere")
	errOtherProgram = errors.New("another program was put in its place")
	errNotPinned    = errors.New("it is attached, but not pinned, so it would end with this process")
	errNoProgram    = errors.New("this kernel has no such kind of program")
	errNotAttached  = errors.New("it is not attached")
	errNoTunnel     = errors.New("there is no tunnel device yet")
)

// stands asks the kernel whether a link is attached where it should be and runs our program. A link that was detached
// is still there and has neither device nor cgroup.
func (h *hook) stands(l link.Link) error {
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("read link: %w", err)
	}
	if !h.here(info) {
		return errOtherTarget
	}
	if h.id != info.Program {
		return otherProgram(info.Program)
	}
	return nil
}

// otherProgram names the program that stands in a place of ours.
func otherProgram(id ebpf.ProgramID) error {
	return fmt.Errorf("%w: %s", errOtherProgram, describeProgram(id))
}

// describeProgram names a program, and who loaded it, as far as the kernel tells.
func describeProgram(id ebpf.ProgramID) string {
	text := fmt.Sprintf("program %d", id)
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return text
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return text
	}
	text += fmt.Sprintf(", %q", info.Name)
	if uid, ok := info.CreatedByUID(); ok {
		text += fmt.Sprintf(", loaded by user %d", uid)
	}
	return text
}

func programID(p *ebpf.Program) (ebpf.ProgramID, error) {
	info, err := p.Info()
	if err != nil {
		return 0, fmt.Errorf("read program: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return 0, errors.New("read program: the kernel gives it no id")
	}
	return id, nil
}

// adopt updates a link that is attached where it should be.
func (h *hook) adopt(l link.Link) error {
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("read link: %w", err)
	}
	if !h.here(info) {
		return errOtherTarget
	}
	if err := l.Update(h.prog); err != nil {
		return fmt.Errorf("update link: %w", err)
	}
	return nil
}

// ensure makes the pinned link of a hook run its program, and notes what keeps it from that.
func (e *Enforcer) ensure(h hook) error {
	err := h.identify()
	e.wants[h.name] = h
	if err == nil {
		err = e.place(&h)
	}
	if err != nil {
		e.failed[h.name] = err
		return err
	}
	delete(e.failed, h.name)
	return nil
}

func (h *hook) identify() (err error) {
	if h.prog != nil && h.id == 0 {
		h.id, err = programID(h.prog)
	}
	return err
}

// place does the work of ensure. A link that stands is updated in one step, without a moment between the two programs.
// One that was severed with its device or cgroup, or belongs to another, is replaced.
func (e *Enforcer) place(h *hook) error {
	if h.prog == nil {
		return fmt.Errorf("attach %s: %w", h.name, errNoProgram)
	}
	if h.place != nil {
		return e.placeFilter(h)
	}
	path := filepath.Join(e.cfg.links(), h.name)
	if held := e.links[h.name]; held != nil && h.stands(held) == nil {
		if pinned(path) {
			return nil
		}
		return pin(held, h.name, path)
	}
	old, err := link.LoadPinnedLink(path, nil)
	if err == nil && h.adopt(old) == nil {
		e.keep(h.name, old)
		return nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		e.log.Warn("pinned link cannot be opened and is replaced", "hook", h.name, "error", err)
	}
	l, err := h.attach()
	if err == nil {
		// Where this fails the new link is kept all the same: while this process lives, it judges.
		err = pin(l, h.name, path)
		e.keep(h.name, l)
	} else {
		err = fmt.Errorf("attach %s: %w", h.name, err)
	}
	if old != nil {
		// Only now, so that there is no gap.
		if err := old.Close(); err != nil {
			e.log.Warn("close replaced link", "hook", h.name, "error", err)
		}
	}
	return err
}

// pinNext ends the name of a pin that is to take the place of another. (bpffs takes no dots.)
const pinNext = "_next"

// pin puts a link into the place of what is pinned there, in one step: an interruption leaves the old one or the new.
func pin(l link.Link, name, path string) error {
	next := path + pinNext
	// The library takes a link that it has pinned before for pinned still, and would not pin it again.
	if err := l.Unpin(); err != nil {
		return fmt.Errorf("pin %s: %w", name, err)
	}
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("pin %s: %w", name, err)
	}
	if err := l.Pin(next); err != nil {
		return fmt.Errorf("pin %s: %w", name, err)
	}
	if err := os.Rename(next, path); err != nil {
		return errors.Join(fmt.Errorf("pin %s: %w", name, err), os.Remove(next))
	}
	return nil
}

func pinned(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode().IsRegular()
}

// clearUnfinishedPins removes what an interrupted pin left, which would hold a second link for ever.
func (e *Enforcer) clearUnfinishedPins() error {
	left, err := filepath.Glob(filepath.Join(e.cfg.links(), "*"+pinNext))
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove unfinished pin: %w", err)
		}
	}
	return nil
}

func (e *Enforcer) keep(name string, l link.Link) {
	if old := e.links[name]; old != nil && old != l {
		if err := old.Close(); err != nil {
			e.log.Warn("close replaced link", "hook", name, "error", err)
		}
	}
	e.links[name] = l
}

// drop takes a hook away: its pin is the last that holds it.
func (e *Enforcer) drop(name string) error {
	var errs []error
	if l := e.links[name]; l != nil {
		errs = append(errs, l.Close())
		delete(e.links, name)
	}
	if p := e.wants[name].place; p != nil {
		errs = append(errs, e.cfg.Filters.Detach(p.ifindex, p.egress, p.handle))
	}
	delete(e.failed, name)
	delete(e.wants, name)
	return errors.Join(append(errs, removePin(e.cfg.links(), name))...)
}

func removePin(dir, name string) error {
	if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the pin of %s: %w", name, err)
	}
	return nil
}

// check tells what is wrong with a hook, as the kernel has it.
func (e *Enforcer) check(name string) error {
	h, l := e.wants[name], e.links[name]
	if err := e.failed[name]; err != nil {
		return err
	}
	if h.place != nil {
		return e.filterStands(&h)
	}
	if l == nil {
		return errNotAttached
	}
	if err := h.stands(l); err != nil {
		return err
	}
	if !pinned(filepath.Join(e.cfg.links(), name)) {
		return errNotPinned
	}
	return nil
}

// Repair is a hook that was put back.
type Repair struct {
	Hook  string
	Where string // the device, or the cgroup
	Cause error  // what was found there
}

// Ensure attaches again what others detached or replaced, and names it. The guard of a device that is gone is forgotten
// without a word; a hook that the kernel lacks is for Hooks to tell.
func (e *Enforcer) Ensure() (repaired []Repair, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, ErrClosed
	}
	var errs []error
	for name, h := range e.wants {
		cause := e.check(name)
		if cause == nil || h.prog == nil {
			continue
		}
		err := e.ensure(h)
		if _, guard := guardIndex(name); guard && errors.Is(err, unix.ENODEV) {
			errs = append(errs, e.drop(name))
		} else if err != nil {
			errs = append(errs, err)
		} else {
			repaired = append(repaired, Repair{Hook: name, Where: e.where(h), Cause: cause})
		}
	}
	slices.SortFunc(repaired, func(a, b Repair) int { return strings.Compare(a.Hook, b.Hook) })
	return repaired, explain(errors.Join(errs...))
}

// Ahead names, in words, the programs of others that run before ours at a device, which could pass packets that ours never
// see. They were put there later, in front of the first place. It knows those of tcx; nothing can be done about them without a
// gap, and they are not ours to remove.
func (e *Enforcer) Ahead() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []string
	for name, h := range e.wants {
		if h.device == 0 || h.place != nil || e.failed[name] != nil {
			continue
		}
		all, err := link.QueryPrograms(link.QueryOptions{Target: h.device, Attach: h.side})
		if err != nil || len(all.Programs) == 0 || all.Programs[0].ID == h.id {
			continue // what is missing altogether is for Hooks to tell
		}
		out = append(out, fmt.Sprintf("%s stands before the judge's hook %s at %s", describeProgram(all.Programs[0].ID), name, e.where(h)))
	}
	slices.Sort(out)
	return out
}

// where names the place of a hook in words.
func (e *Enforcer) where(h hook) string {
	if h.device == 0 {
		return "cgroup " + e.cfg.CgroupRoot
	}
	device, err := net.InterfaceByIndex(h.device)
	if err != nil {
		return fmt.Sprintf("device %d", h.device)
	}
	return "device " + device.Name
}

// HookStatus is one place in the kernel where the judge should stand.
type HookStatus struct {
	Name     string
	Attached bool
	Err      error // why it is not attached
}

// Hooks lists every hook, by name, as the kernel has it now.
func (e *Enforcer) Hooks() []HookStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []HookStatus
	for name := range e.wants {
		err := e.check(name)
		if err != nil && guardOfNone(name) {
			continue
		}
		out = append(out, HookStatus{Name: name, Attached: err == nil, Err: err})
	}
	for _, name := range []string{hookTunnelEgress, hookTunnelIngress} {
		if _, wanted := e.wants[name]; !wanted {
			out = append(out, HookStatus{Name: name, Err: errNoTunnel})
		}
	}
	slices.SortFunc(out, func(a, b HookStatus) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// guardOfNone: the device of a guard is gone, and nobody has told us yet.
func guardOfNone(name string) bool {
	index, ok := guardIndex(name)
	if !ok {
		return false
	}
	_, err := net.InterfaceByIndex(index)
	return err != nil
}
