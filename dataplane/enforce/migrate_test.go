package enforce

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
)

// fillConns puts n rows into the table of connections, and readConns finds them.
func fillConns(t *testing.T, m *ebpf.Map, n int) {
	t.Helper()
	var keys []bpf.JudgeTuple
	var rows []bpf.JudgeConn
	for i := range n {
		k := bpf.JudgeTuple{Sport: uint16(i), Dport: uint16(i >> 16), Proto: 6}
		keys, rows = append(keys, k), append(rows, bpf.JudgeConn{Deadline: uint32(i) + 1})
	}
	must(t, put(m, keys, rows), "fill the table")
}

func readConns(t *testing.T, m *ebpf.Map) (n int) {
	t.Helper()
	must(t, each(m, func(k *bpf.JudgeTuple, c *bpf.JudgeConn) bool {
		if k.Src.W != [4]uint32{} {
			return true // of a real call, which may be tried again at any moment
		}
		if c.Deadline != uint32(k.Sport)+uint32(k.Dport)<<16+1 {
			t.Errorf("row %d has deadline %d", k.Sport, c.Deadline)
		}
		n++
		return true
	}), "read the table")
	return n
}

// rows counts what any map holds.
func rows(t *testing.T, e *Enforcer, name string) int {
	t.Helper()
	n, err := countRows(e.coll.Maps[name])
	must(t, err, "count")
	return n
}

// pinnedAsLoaded: every pin is the map that the programs use, and nothing unfinished is left.
func (l *lab) pinnedAsLoaded(e *Enforcer) {
	l.t.Helper()
	pins, err := os.ReadDir(l.cfg.maps())
	must(l.t, err, "list pins")
	for _, p := range pins {
		if p.Name() == mapBuild {
			continue // the agent's own note
		}
		m, err := ebpf.LoadPinnedMap(filepath.Join(l.cfg.maps(), p.Name()), nil)
		must(l.t, err, "open pin")
		loaded := e.coll.Maps[p.Name()]
		if loaded == nil {
			l.t.Errorf("pin %s is no map of the programs", p.Name())
		} else if mapID(l.t, m) != mapID(l.t, loaded) {
			l.t.Errorf("pin %s is another map than the programs use", p.Name())
		}
		must(l.t, m.Close(), "close")
	}
}

func mapID(t *testing.T, m *ebpf.Map) ebpf.MapID {
	t.Helper()
	info, err := m.Info()
	must(t, err, "read map")
	id, _ := info.ID()
	return id
}

// reopen ends one process's part and begins the next.
func (l *lab) reopen(e *Enforcer) *Enforcer {
	l.t.Helper()
	must(l.t, e.Close(), "close")
	return l.open()
}

// smallSizes are sizes that are quickly made.
var smallSizes = Sizes{Addresses: 256, Workloads: 64, Entries: 512, Conns: 10000, EventBytes: 1 << 16}

// TestMapsChangeSize: with another size, what was in force stays in force, without a view from anybody, and tracked
// connections stay tracked.
func TestMapsChangeSize(t *testing.T) {
	l := newLab(t)
	l.cfg.Sizes = smallSizes
	e := l.open()
	v := l.view()
	permit(v, 4, numA, numRemote, flow.TCP, 80)
	must(t, e.Apply(t.Context(), v), "apply")
	fillConns(t, e.coll.Maps[mapConns6], 9000)
	generation, held := e.Generation(), rows(t, e, mapAddrs)
	for _, next := range []Sizes{
		{Addresses: 512, Workloads: 128, Entries: 1024, Conns: 20000, EventBytes: 1 << 17}, // all grow
		{Addresses: 256, Workloads: 64, Entries: 512, Conns: 9001, EventBytes: 1 << 16},    // all shrink, to what just fits
	} {
		l.cfg.Sizes = next
		e = l.reopen(e)
		for name, want := range next.mapEntries() {
			if got := e.coll.Maps[name].MaxEntries(); got != want {
				t.Errorf("map %s has room for %d, want %d", name, got, want)
			}
		}
		if n := readConns(t, e.coll.Maps[mapConns6]); n != 9000 {
			t.Errorf("%d connections of 9000 are tracked", n)
		}
		if rows(t, e, mapAddrs) != held || e.Generation() != generation {
			t.Errorf("%d addresses of generation %d, before %d of %d", rows(t, e, mapAddrs), e.Generation(), held, generation)
		}
		l.pinnedAsLoaded(e)
		p := l.start("a")
		p.do("socket tcp4")
		p.want("inprogress", "connect 198.18.1.9:80")
		l.sent("a permitted call", a4, 80)
		_, _, err := purge(e.coll.Maps[mapConns6], func(k *bpf.JudgeTuple, _ *bpf.JudgeConn) bool { return k.Src.W != [4]uint32{} })
		must(t, err, "forget the call")
	}
	// What would not fit keeps its room.
	fillConns(t, e.coll.Maps[mapConns6], 9000)
	l.cfg.Sizes.Conns = 1000
	e = l.reopen(e)
	if n := readConns(t, e.coll.Maps[mapConns6]); n != 9000 || e.coll.Maps[mapConns6].MaxEntries() != 9001 {
		t.Errorf("%d connections of 9000 are tracked, in a table of %d", n, e.coll.Maps[mapConns6].MaxEntries())
	}
	l.pinnedAsLoaded(e)
}

// otherLayout pins a map of the name with larger rows, as another build would have left it.
func (l *lab) otherLayout(name string, like *ebpf.Map) {
	l.t.Helper()
	path := filepath.Join(l.cfg.maps(), name)
	must(l.t, os.Remove(path), "remove pin")
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: name, Type: like.Type(), KeySize: like.KeySize(), ValueSize: like.ValueSize() + 8, MaxEntries: like.MaxEntries(), Flags: like.Flags(),
	})
	must(l.t, err, "make map")
	must(l.t, m.Pin(path), "pin map")
	must(l.t, m.Close(), "close")
}

// TestMapsChangeLayout: rows of another layout are left behind, with all that hangs on them, and the next view puts
// everything in force.
func TestMapsChangeLayout(t *testing.T) {
	for _, c := range []struct {
		name                   string
		addrs, conns, countsOn bool // are kept
	}{
		{mapConns6, true, false, true},
		{mapAddrs, false, true, true},
		{mapEntries, false, true, true},
		{mapConfig, false, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.cfg.Sizes = smallSizes
			e := l.open()
			v := l.view()
			permit(v, 4, numA, numRemote, flow.TCP, 80)
			must(t, e.Apply(t.Context(), v), "apply")
			must(t, e.Apply(t.Context(), l.view()), "apply")
			must(t, e.Apply(t.Context(), v), "apply")
			fillConns(t, e.coll.Maps[mapConns6], 10)
			generation := e.Generation()
			must(t, e.Close(), "close")
			l.otherLayout(c.name, e.coll.Maps[c.name])
			e = l.open()
			if kept := rows(t, e, mapAddrs) > 0; kept != c.addrs {
				t.Errorf("addresses are kept: %v", kept)
			}
			if kept := rows(t, e, mapConns6) > 0; kept != c.conns {
				t.Errorf("connections are kept: %v", kept)
			}
			if on := e.Generation() == generation; on != c.countsOn {
				t.Errorf("generation %d after %d", e.Generation(), generation)
			}
			l.pinnedAsLoaded(e)
			p := l.start("a")
			p.do("socket tcp4")
			if !c.addrs {
				p.do("connect 198.18.1.9:80")
				l.silent("before the first view")
			}
			must(t, e.Apply(t.Context(), v), "apply")
			p.do("socket tcp4")
			p.want("inprogress", "connect 198.18.1.9:80")
			l.sent("a permitted call", a4, 80)
		})
	}
}

// refusing is a Filters that attaches nothing.
type refusing struct{ Filters }

func (refusing) Attach(int, bool, uint32, string, int) error { return errOnce }

// TestMigrationInterrupted stops a start at two points: before anything is attached, and between two attachments. Nothing
// that was in force is lost either way.
func TestMigrationInterrupted(t *testing.T) {
	l := newLab(t)
	l.cfg.Sizes = smallSizes
	e := l.open()
	stray, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	must(t, err, "make map")
	must(t, stray.Pin(filepath.Join(l.cfg.maps(), "of_another_build")), "pin a map that no program has")
	must(t, stray.Close(), "close")
	fillConns(t, e.coll.Maps[mapConns6], 5000)
	before := mapID(t, e.coll.Maps[mapConns6])
	must(t, e.Close(), "close")

	// Before: the new map exists and is filled, and no program uses it.
	cfg, err := l.cfg.complete()
	must(t, err, "config")
	cfg.Sizes.Conns = 20000
	spec, err := bpf.LoadJudge()
	must(t, err, "read object")
	m, err := migrateMaps(spec, cfg)
	must(t, err, "migrate")
	m.close()
	e = l.open()
	if id := mapID(t, e.coll.Maps[mapConns6]); id != before || readConns(t, e.coll.Maps[mapConns6]) != 5000 {
		t.Errorf("map %d, before %d", id, before)
	}
	l.pinnedAsLoaded(e)
	must(t, e.Close(), "close")

	// Between: the hooks of the cgroup have changed to the new map when a device refuses.
	grown := l.cfg
	grown.Sizes.Conns, grown.Clsact = 20000, true
	grown.Filters = refusing{l.cfg.Filters}
	if _, err := Open(grown); !errors.Is(err, errOnce) {
		t.Fatalf("open: %v", err)
	}
	pinned, err := ebpf.LoadPinnedMap(filepath.Join(cfg.maps(), mapConns6), nil)
	must(t, err, "open pin")
	if mapID(t, pinned) != before {
		t.Error("the pin was changed before all was attached")
	}
	must(t, pinned.Close(), "close")
	l.cfg.Sizes.Conns = 20000
	e = l.open()
	if id := mapID(t, e.coll.Maps[mapConns6]); id == before || readConns(t, e.coll.Maps[mapConns6]) != 5000 {
		t.Errorf("map %d, before %d", id, before)
	}
	l.pinnedAsLoaded(e)
}

// TestOtherVersionIsDropped: hooks of another layout's version judge until ours stand, and go then.
func TestOtherVersionIsDropped(t *testing.T) {
	l := newLab(t)
	l.cfg.Sizes = smallSizes
	e := l.open()
	must(t, e.Close(), "close")
	for _, name := range []string{"v0", "v17"} {
		must(t, os.Rename(l.cfg.pins(), filepath.Join(l.cfg.BPFFS, name)), "rename")
		e = l.open()
		all, err := os.ReadDir(l.cfg.BPFFS)
		must(t, err, "list pins")
		if len(all) != 1 || all[0].Name() != ABI {
			t.Errorf("pins of %v", all)
		}
		for _, h := range e.Hooks() {
			must(t, h.Err, h.Name)
		}
		must(t, e.Close(), "close")
	}
	must(t, Release(l.cfg), "release")
	if all, err := os.ReadDir(l.cfg.BPFFS); err != nil || len(all) > 0 {
		t.Errorf("after the release: %v, %v", all, err)
	}
}

// TestLateRows: what the old programs wrote while the new ones were being attached is not lost, and does not replace what
// the new ones wrote since.
func TestLateRows(t *testing.T) {
	l := newLab(t)
	l.cfg.Sizes = smallSizes
	e := l.open()
	old := e.coll.Maps[mapConns6]
	fillConns(t, old, 5000)
	cfg, err := l.cfg.complete()
	must(t, err, "config")
	cfg.Sizes.Conns = 20000
	spec, err := bpf.LoadJudge()
	must(t, err, "read object")
	m, err := migrateMaps(spec, cfg)
	must(t, err, "migrate")
	next, err := m.replacements()[mapConns6].Clone()
	must(t, err, "clone")
	defer next.Close()
	fillConns(t, old, 7000) // 2000 more
	newer := bpf.JudgeTuple{Sport: 6000, Proto: 6}
	must(t, next.Put(newer, bpf.JudgeConn{Deadline: 6001, Rule: 77}), "write what is newer")
	must(t, m.commit(), "commit")
	if n := readConns(t, next); n != 7000 {
		t.Errorf("%d rows of 7000", n)
	}
	var row bpf.JudgeConn
	must(t, next.Lookup(newer, &row), "look up")
	if row.Rule != 77 {
		t.Error("an older row took the place of a newer one")
	}
}
