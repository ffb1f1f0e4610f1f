package enforce

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/signet-overlay/signet/bpf"
)

// An agent that starts again finds its own programs attached. To verify them once more would take most of the time in
// which the host's tunnel is dark, so they are taken over: where the pinned map "build" says that this build, with this
// configuration, attached them, and each link still has the very program that is noted there.

// mapBuild is pinned beside the judge's maps. The judge does not know it.
const mapBuild = "build"

// buildRow is one program that is attached.
type buildRow struct {
	Hash    [32]byte // of the object and of everything that is compiled into its programs
	Program uint32   // the kernel's number; never given twice between two starts of the machine
	_       uint32
}

type buildKey [32]byte // the program's name

func keyOf(name string) (k buildKey) {
	copy(k[:], name)
	return k
}

// buildHash tells builds and configurations apart.
func buildHash(cfg Config) [32]byte {
	h := sha256.New()
	h.Write(bpf.JudgeObject())
	fmt.Fprintf(h, "%v %v %+v %t %q", cfg.Overlay4, cfg.Overlay6, cfg.Sizes, cfg.Clsact, cfg.Without)
	return [32]byte(h.Sum(nil))
}

// adopt gives the programs of this build that are attached, by name, and takes them out of spec. config is the judge's
// map of that name: what does not use it is not ours.
func adopt(spec *ebpf.CollectionSpec, cfg Config, config *ebpf.Map) (map[string]*ebpf.Program, error) {
	noted, err := readBuild(cfg)
	if err != nil || len(noted) == 0 {
		return nil, err
	}
	info, err := config.Info()
	if err != nil {
		return nil, fmt.Errorf("read map %s: %w", mapConfig, err)
	}
	used, _ := info.ID()
	pins, err := os.ReadDir(cfg.links())
	if err != nil {
		return nil, fmt.Errorf("list pins: %w", err)
	}
	adopted := map[string]*ebpf.Program{}
	for _, p := range pins {
		name := programOf(p.Name())
		row, ok := noted[name]
		if !ok || adopted[name] != nil || spec.Programs[name] == nil || row.Hash != buildHash(cfg) {
			continue
		}
		if prog := attachedProgram(filepath.Join(cfg.links(), p.Name()), row.Program, used); prog != nil {
			adopted[name] = prog
			delete(spec.Programs, name)
		}
	}
	return adopted, nil
}

// programOf is the program of a pinned link.
func programOf(pin string) string {
	if _, ok := guardIndex(pin); !ok {
		return pin
	}
	if strings.HasPrefix(pin, hookGuardEgress+"_") {
		return hookGuardEgress
	}
	return hookGuard
}

// attachedProgram opens the program of a link, if it is the one that is expected; nil for every other case, in which it
// is loaded.
func attachedProgram(pin string, id uint32, config ebpf.MapID) *ebpf.Program {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil || uint32(info.Program) != id {
		return nil
	}
	prog, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return nil
	}
	about, err := prog.Info()
	if err == nil {
		if maps, ok := about.MapIDs(); ok && (len(maps) == 0 || slices.Contains(maps, config)) {
			return prog
		}
	}
	_ = prog.Close()
	return nil
}

// readBuild reads what is noted; nothing where nothing is.
func readBuild(cfg Config) (map[string]buildRow, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(cfg.maps(), mapBuild), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open map %s: %w", mapBuild, err)
	}
	defer m.Close()
	out := map[string]buildRow{}
	err = each(m, func(k *buildKey, row *buildRow) bool {
		out[strings.TrimRight(string(k[:]), "\x00")] = *row
		return true
	})
	return out, err
}

// forgetBuild makes the next start load everything. (What is noted is never wrong: another program has another number.)
func forgetBuild(cfg Config) error {
	if err := os.Remove(filepath.Join(cfg.maps(), mapBuild)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove map %s: %w", mapBuild, err)
	}
	return nil
}

// noteBuild says what is attached, when all of it is.
func noteBuild(cfg Config, coll *ebpf.Collection) error {
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: mapBuild, Type: ebpf.Hash, KeySize: 32, ValueSize: 40, MaxEntries: 64})
	if err != nil {
		return fmt.Errorf("make map %s: %w", mapBuild, err)
	}
	defer m.Close()
	for name, prog := range coll.Programs {
		info, err := prog.Info()
		if err != nil {
			return fmt.Errorf("read program %s: %w", name, err)
		}
		id, ok := info.ID()
		if !ok || len(name) > len(buildKey{}) {
			continue
		}
		if err := m.Put(keyOf(name), buildRow{Hash: buildHash(cfg), Program: uint32(id)}); err != nil {
			return fmt.Errorf("write map %s: %w", mapBuild, err)
		}
	}
	if err := forgetBuild(cfg); err != nil {
		return err
	}
	if err := m.Pin(filepath.Join(cfg.maps(), mapBuild)); err != nil {
		return fmt.Errorf("pin map %s: %w", mapBuild, err)
	}
	return nil
}
