package revoke

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/bpf"
)

// iterators are the two programs of bpf/revoke.c.
type iterators struct {
	coll  *ebpf.Collection
	links []*link.Iter
}

// openIterators loads the programs over the judge's maps. It fails where the kernel has no bpf_sock_destroy.
func openIterators(cfg Config) (sweeper, error) {
	spec, err := bpf.LoadRevoke()
	if err != nil {
		return nil, fmt.Errorf("read the object: %w", err)
	}
	if err := setOverlay(spec, cfg.Overlay4, cfg.Overlay6); err != nil {
		return nil, err
	}
	pinned, err := judgeMaps(spec, cfg.Maps)
	defer func() {
		for _, m := range pinned {
			m.Close() // the collection has descriptors of its own
		}
	}()
	if err != nil {
		return nil, err
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: pinned})
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	it := &iterators{coll: coll}
	for _, name := range []string{bpf.RevokeProgRevokeTcp, bpf.RevokeProgRevokeUdp} {
		l, err := link.AttachIter(link.IterOptions{Program: coll.Programs[name]})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("attach %s: %w", name, err), it.close())
		}
		it.links = append(it.links, l)
	}
	return it, nil
}

// setOverlay fixes the overlay's ranges in the programs.
func setOverlay(spec *ebpf.CollectionSpec, v4, v6 netip.Prefix) error {
	var r bpf.RevokePrefixes
	r.V4.W, r.V4Mask.W = words(v4.Masked().Addr()), mask(v4.Bits()+96)
	r.V6.W, r.V6Mask.W = words(v6.Masked().Addr()), mask(v6.Bits())
	if err := spec.Variables[bpf.RevokeVarOverlay].Set(r); err != nil {
		return fmt.Errorf("set the overlay prefixes: %w", err)
	}
	return nil
}

// words is an address as the kernel has it: network order, IPv4 mapped.
func words(a netip.Addr) (w [4]uint32) {
	b := a.As16()
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&w)), 16), b[:])
	return w
}

// mask is a netmask of 128 bits in the kernel's words.
func mask(bits int) [4]uint32 {
	var b [16]byte
	for i := range bits {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return words(netip.AddrFrom16(b))
}

// judgeMaps opens the pinned maps that the programs use, and takes every other one out of spec. The header declares all
// maps of the judge; those that are not used here need not exist, and none is created.
func judgeMaps(spec *ebpf.CollectionSpec, dir string) (map[string]*ebpf.Map, error) {
	used := map[string]bool{}
	for _, p := range spec.Programs {
		for _, in := range p.Instructions {
			if in.IsLoadFromMap() {
				used[in.Reference()] = true
			}
		}
	}
	pinned := map[string]*ebpf.Map{}
	for name, m := range spec.Maps {
		if !used[name] {
			delete(spec.Maps, name)
			continue
		}
		if m.Pinning != ebpf.PinByName {
			continue
		}
		p, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		if err != nil {
			return pinned, fmt.Errorf("open the judge's map %s: %w", name, err)
		}
		pinned[name] = p
		m.MaxEntries = p.MaxEntries() // the operator's choice
	}
	return pinned, nil
}

// maxReads bounds the system calls of one iterator. The kernel interrupts one after a million sockets (EAGAIN), and has
// nothing to say otherwise, since the programs write nothing.
const maxReads = 1000

func (it *iterators) sweep(ctx context.Context) (int, error) {
	destroyed, refused := it.coll.Variables[bpf.RevokeVarDestroyed], it.coll.Variables[bpf.RevokeVarRefused]
	if err := errors.Join(destroyed.Set(uint64(0)), refused.Set(uint64(0))); err != nil {
		return 0, fmt.Errorf("reset the counters: %w", err)
	}
	var errs []error
	for _, l := range it.links {
		errs = append(errs, visit(ctx, l))
	}
	var gone, kept uint64
	errs = append(errs, destroyed.Get(&gone), refused.Get(&kept))
	if kept > 0 {
		errs = append(errs, fmt.Errorf("the kernel did not end %d sockets", kept))
	}
	if err := errors.Join(errs...); err != nil {
		return int(gone), fmt.Errorf("sweep sockets: %w", err)
	}
	return int(gone), nil
}

// visit runs one iterator to its end.
func visit(ctx context.Context, l *link.Iter) error {
	f, err := l.Open()
	if err != nil {
		return err
	}
	defer f.Close()
	var buf [64]byte
	for range maxReads {
		if err := ctx.Err(); err != nil {
			return err
		}
		_, err := f.Read(buf[:])
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("read iterator: %w", err)
		}
	}
	return fmt.Errorf("iterator has no end after %d reads", maxReads)
}

func (it *iterators) close() error {
	var errs []error
	for _, l := range it.links {
		errs = append(errs, l.Close())
	}
	it.coll.Close()
	return errors.Join(errs...)
}
