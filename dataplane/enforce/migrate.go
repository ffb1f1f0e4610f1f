package enforce

import (
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// migration replaces pinned maps that do not have the shape that the new programs want. The order keeps what is in force
// in force:
//
//  1. a new map is made and pinned under another name, and what the old one holds is copied where the layout is the same;
//  2. the programs are loaded with the new maps and attached, each by one update of its link; until then the old programs
//     judge with the old maps;
//  3. what the old programs wrote during 1 and 2 is copied too;
//  4. the new pins take the names of the old ones.
//
// An interruption before 2 leaves the old maps in force, and the next start begins anew. One after it is told by the
// programs that are attached: the maps that they use are the ones in force.
type migration struct {
	cfg   Config
	known map[string]*ebpf.MapSpec
	moved []*movedMap
}

// movedMap is one map of another shape.
type movedMap struct {
	name      string
	old, next *ebpf.Map
	copied    bool                // the layout is the same
	seen      map[uint64]struct{} // hashes of the keys that were copied
	seed      maphash.Seed
}

// groups are maps whose rows name or count each other's, so that one of another layout empties all of its group: those of
// a view, and those of connections.
var groups = [][]string{
	{mapAddrs, mapLocals, mapOwns, mapIfaces, mapRulesets, mapEntries, mapRanges, mapWindows}, {mapConns4, mapConns6, mapUsage},
}

// migrateMaps sets the sizes of maps and prepares new maps in the place of those that are pinned with another shape.
func migrateMaps(spec *ebpf.CollectionSpec, cfg Config) (_ *migration, err error) {
	for name, n := range cfg.Sizes.mapEntries() {
		spec.Maps[name].MaxEntries = n
	}
	if err := cfg.settleMaps(); err != nil {
		return nil, err
	}
	m := &migration{cfg: cfg, known: spec.Maps}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	old := map[string]*ebpf.Map{}
	defer func() {
		for name, o := range old { // those that stay as they are
			if !slices.ContainsFunc(m.moved, func(mm *movedMap) bool { return mm.name == name }) {
				err = errors.Join(err, o.Close())
			}
		}
	}()
	for name, s := range spec.Maps {
		if s.Pinning != ebpf.PinByName {
			continue
		}
		pinned, err := ebpf.LoadPinnedMap(filepath.Join(cfg.maps(), name), nil)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open pinned map %s: %w", name, err)
		}
		old[name] = pinned
	}
	fresh := freshMaps(spec, old)
	for name, pinned := range old {
		if spec.Maps[name].Compatible(pinned) == nil && !fresh[name] {
			continue
		}
		if err := m.prepare(name, spec.Maps[name], pinned, fresh[name]); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// freshMaps names the maps whose contents cannot be taken over.
func freshMaps(spec *ebpf.CollectionSpec, old map[string]*ebpf.Map) map[string]bool {
	fresh := map[string]bool{}
	for name, o := range old {
		fresh[name] = !sameLayout(spec.Maps[name], o)
	}
	for _, group := range groups {
		if slices.ContainsFunc(group, func(name string) bool { return fresh[name] }) {
			for _, name := range group {
				fresh[name] = true
			}
		}
	}
	if fresh[mapConfig] {
		// The count of generations begins anew, and a stamp of the old count must not be taken for one of the new.
		for name := range old {
			fresh[name] = true
		}
	}
	return fresh
}

// sameLayout: the rows mean the same, whatever the number of them.
func sameLayout(s *ebpf.MapSpec, m *ebpf.Map) bool {
	return s.Type == m.Type() && s.KeySize == m.KeySize() && s.ValueSize == m.ValueSize()
}

// copyable are the types whose rows can be read and written in batches.
func copyable(t ebpf.MapType) bool { return t == ebpf.Hash || t == ebpf.LRUHash || t == ebpf.LPMTrie }

// prepare makes the successor of a map, and fills it.
func (m *migration) prepare(name string, spec *ebpf.MapSpec, old *ebpf.Map, fresh bool) error {
	mm := &movedMap{name: name, old: old, copied: !fresh && copyable(spec.Type), seen: map[uint64]struct{}{}, seed: maphash.MakeSeed()}
	if mm.copied {
		held, err := countRows(old)
		if err != nil {
			return err
		}
		if held > int(spec.MaxEntries) {
			m.cfg.Logger.Warn("pinned map keeps its size, because it holds more than would fit", "map", name, "size", old.MaxEntries(), "holds", held,
				"configured", spec.MaxEntries)
			spec.MaxEntries = old.MaxEntries()
			if spec.Compatible(old) == nil {
				return nil
			}
		}
	}
	unpinned := spec.Copy()
	unpinned.Pinning = ebpf.PinNone
	next, err := ebpf.NewMap(unpinned)
	if err != nil {
		return fmt.Errorf("make map %s of the new shape: %w", name, err)
	}
	mm.next = next
	m.moved = append(m.moved, mm)
	if err := next.Pin(m.path(name) + pinNext); err != nil {
		return fmt.Errorf("pin map %s of the new shape: %w", name, err)
	}
	n := 0
	if mm.copied {
		if n, err = mm.copy(); err != nil {
			return fmt.Errorf("copy map %s: %w", name, err)
		}
	}
	m.cfg.Logger.Info("map changes its shape", "map", name, "from", shape(old), "to", shape(next), "copied", n)
	return nil
}

func shape(m *ebpf.Map) string {
	return fmt.Sprintf("%s of %d rows, key %d B, value %d B, flags %#x", m.Type(), m.MaxEntries(), m.KeySize(), m.ValueSize(), m.Flags())
}

func (m *migration) path(name string) string { return filepath.Join(m.cfg.maps(), name) }

// replacements are the maps that the programs are loaded with.
func (m *migration) replacements() map[string]*ebpf.Map {
	out := map[string]*ebpf.Map{}
	for _, mm := range m.moved {
		out[mm.name] = mm.next
	}
	return out
}

// commit makes the new maps the ones that the next start finds, and drops what other versions left. Call it when
// everything is attached.
func (m *migration) commit() error {
	defer m.close()
	for _, mm := range m.moved {
		if mm.copied {
			if _, err := mm.copyLate(); err != nil {
				return fmt.Errorf("copy map %s: %w", mm.name, err)
			}
		}
		if err := os.Rename(m.path(mm.name)+pinNext, m.path(mm.name)); err != nil {
			return fmt.Errorf("pin map %s: %w", mm.name, err)
		}
	}
	versions, err := m.cfg.versions()
	errs := []error{err, m.dropUnknown()}
	for _, dir := range versions {
		if dir != filepath.Clean(m.cfg.pins()) {
			m.cfg.Logger.Info("pins of another version are removed", "directory", dir)
			errs = append(errs, releaseVersion(dir))
		}
	}
	return errors.Join(errs...)
}

// dropUnknown removes the pins of maps that these programs do not have: nothing reads them any more.
func (m *migration) dropUnknown() error {
	pins, err := os.ReadDir(m.cfg.maps())
	errs := []error{err}
	for _, p := range pins {
		if m.known[p.Name()] == nil && p.Name() != mapBuild {
			m.cfg.Logger.Info("pin of a map that is not used any more is removed", "map", p.Name())
			errs = append(errs, os.Remove(m.path(p.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove pins that are not used any more: %w", err)
	}
	return nil
}

// close lets the descriptors go; pins stay.
func (m *migration) close() {
	for _, mm := range m.moved {
		_ = mm.old.Close()
		_ = mm.next.Close()
	}
}

// copy fills the new map, which nobody else knows yet.
func (mm *movedMap) copy() (n int, err error) {
	err = eachRaw(mm.old, func(keys, values reflect.Value, rows int) error {
		for i := range rows {
			mm.seen[mm.hash(keys.Index(i))] = struct{}{}
		}
		done, err := mm.next.BatchUpdate(keys.Slice(0, rows).Interface(), values.Slice(0, rows).Interface(), nil)
		n += done
		return err //nolint:wrapcheck // the caller names the map
	})
	return n, err
}

// copyLate writes the rows that came since copy. One that is there already is newer, and what no longer fits is left out:
// its packets are judged anew. (A batch cannot be told to spare what is there.)
func (mm *movedMap) copyLate() (n int, err error) {
	full := false
	err = eachRaw(mm.old, func(keys, values reflect.Value, rows int) error {
		for i := range rows {
			if _, done := mm.seen[mm.hash(keys.Index(i))]; done || full {
				continue
			}
			err := mm.next.Update(keys.Index(i).Interface(), values.Index(i).Interface(), ebpf.UpdateNoExist)
			full = errors.Is(err, unix.E2BIG)
			if err != nil && !full && !errors.Is(err, ebpf.ErrKeyExist) {
				return err //nolint:wrapcheck // the caller names the map
			}
			n++
		}
		return nil
	})
	return n, err
}

func (mm *movedMap) hash(key reflect.Value) uint64 {
	return maphash.Bytes(mm.seed, key.Slice(0, key.Len()).Bytes())
}

func countRows(m *ebpf.Map) (n int, err error) {
	err = eachRaw(m, func(_, _ reflect.Value, rows int) error {
		n += rows
		return nil
	})
	return n, err
}

// eachRaw calls f for the rows of a map of any layout, in batches. keys and values are slices of arrays of bytes.
func eachRaw(m *ebpf.Map, f func(keys, values reflect.Value, rows int) error) error {
	size := min(batch, int(m.MaxEntries()))
	rows := func(bytes uint32) reflect.Value {
		return reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(int(bytes), reflect.TypeFor[byte]())), size, size)
	}
	keys, values := rows(m.KeySize()), rows(m.ValueSize())
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys.Interface(), values.Interface(), nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read map %s: %w", m, err)
		}
		if ferr := f(keys, values, n); ferr != nil {
			return ferr
		}
		if err != nil {
			return nil
		}
	}
}

// settleMaps ends what an interrupted migration left: maps that attached programs use get their names, others go.
func (c Config) settleMaps() error {
	left, err := filepath.Glob(filepath.Join(c.maps(), "*"+pinNext))
	if err != nil || len(left) == 0 {
		return err //nolint:wrapcheck // the pattern is ours, and correct
	}
	used := c.usedMaps()
	for _, path := range left {
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return fmt.Errorf("open unfinished map: %w", err)
		}
		info, err := m.Info()
		if err = errors.Join(err, m.Close()); err != nil {
			return fmt.Errorf("read unfinished map: %w", err)
		}
		if id, ok := info.ID(); ok && used[id] {
			err = os.Rename(path, strings.TrimSuffix(path, pinNext))
		} else {
			err = os.Remove(path)
		}
		if err != nil {
			return fmt.Errorf("settle unfinished map: %w", err)
		}
	}
	return nil
}

// usedMaps are the maps of the programs that are attached by pinned links. What cannot be read is left out.
func (c Config) usedMaps() map[ebpf.MapID]bool {
	used := map[ebpf.MapID]bool{}
	pins, err := os.ReadDir(c.links())
	if err != nil {
		return used
	}
	for _, p := range pins {
		ids, err := mapsOf(filepath.Join(c.links(), p.Name()))
		if err != nil {
			c.Logger.Warn("pinned link cannot be read", "hook", p.Name(), "error", err)
		}
		for _, id := range ids {
			used[id] = true
		}
	}
	return used
}

func mapsOf(pin string) ([]ebpf.MapID, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, fmt.Errorf("open link: %w", err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return nil, fmt.Errorf("read link: %w", err)
	}
	prog, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return nil, fmt.Errorf("open program: %w", err)
	}
	defer prog.Close()
	about, err := prog.Info()
	if err != nil {
		return nil, fmt.Errorf("read program: %w", err)
	}
	ids, _ := about.MapIDs()
	return ids, nil
}
