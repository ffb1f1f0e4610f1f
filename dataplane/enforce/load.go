package enforce

import (
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/cilium/ebpf"
)

// heavyPrograms take the verifier ten times as long as the others.
var heavyPrograms = []string{"egress", "ingress", hookTunnelEgress, hookTunnelIngress, hookLoopback, hookGuard, hookGuardEgress}

// loadPrograms loads a collection with as many programs at a time as there are processors: to verify them is nearly all
// of an agent's start, and a host whose agent restarts sends nothing meanwhile. adopt takes out of spec what need not be
// loaded.
func loadPrograms(
	spec *ebpf.CollectionSpec, opts ebpf.CollectionOptions, adopt func(config *ebpf.Map) (map[string]*ebpf.Program, error),
) (_ *ebpf.Collection, err error) {
	maps := spec.Copy()
	clear(maps.Programs)
	coll, err := ebpf.NewCollectionWithOptions(maps, opts)
	if err != nil {
		return nil, err //nolint:wrapcheck // the caller says what was loaded
	}
	defer func() {
		if err != nil {
			coll.Close()
		}
	}()
	adopted, err := adopt(coll.Maps[mapConfig])
	if err != nil {
		return nil, err
	}
	for name, prog := range adopted {
		coll.Programs[name] = prog
	}
	groups := splitPrograms(spec, max(1, runtime.GOMAXPROCS(0)))
	parts := make([]*ebpf.Collection, len(groups))
	errs := make([]error, len(groups))
	var done sync.WaitGroup
	for i, names := range groups {
		done.Go(func() { parts[i], errs[i] = loadPart(spec, names, coll.Maps) })
	}
	done.Wait()
	for _, part := range parts {
		if part == nil {
			continue
		}
		for name := range part.Programs {
			coll.Programs[name] = part.DetachProgram(name)
		}
		part.Close()
	}
	return coll, errors.Join(errs...)
}

// splitPrograms deals the programs out, the heavy ones first.
func splitPrograms(spec *ebpf.CollectionSpec, n int) [][]string {
	groups := make([][]string, min(n, max(1, len(spec.Programs))))
	next := 0
	deal := func(name string) {
		groups[next%len(groups)] = append(groups[next%len(groups)], name)
		next++
	}
	heavy := map[string]bool{}
	for _, name := range heavyPrograms {
		if spec.Programs[name] != nil {
			heavy[name] = true
			deal(name)
		}
	}
	for name := range spec.Programs {
		if !heavy[name] {
			deal(name)
		}
	}
	return groups
}

func loadPart(spec *ebpf.CollectionSpec, names []string, maps map[string]*ebpf.Map) (*ebpf.Collection, error) {
	part := spec.Copy()
	clear(part.Programs)
	for _, name := range names {
		part.Programs[name] = spec.Programs[name].Copy()
	}
	coll, err := ebpf.NewCollectionWithOptions(part, ebpf.CollectionOptions{MapReplacements: maps})
	if err != nil {
		return nil, fmt.Errorf("load %v: %w", names, err)
	}
	return coll, nil
}
