package enforce

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/rlimit"
)

// Lack is a hook that this kernel does not have.
type Lack struct {
	Hook string
	Err  error // what the kernel said
}

// errWithout: the configuration says so.
var errWithout = errors.New("it is configured to be taken for missing")

// Probe asks the kernel for every hook at the cgroup, by loading a program that does nothing, and lists those that it
// lacks. A question without a clear answer counts as a lack.
func Probe(cfg Config) ([]Lack, error) {
	// The programs are small, but kernels before 5.11 charge them to the limit of locked memory.
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, explain(fmt.Errorf("lift the limit on locked memory: %w", err))
	}
	return lacks(cfg.Without, probeHook)
}

// lacks asks for each hook. Without the right to load programs nothing is known of any.
func lacks(without []string, probe func(ebpf.ProgramType, ebpf.AttachType) error) ([]Lack, error) {
	var out []Lack
	for _, h := range cgroupHooks {
		err := errWithout
		if !slices.Contains(without, h.name) {
			err = explain(probe(h.kind, h.attach))
		}
		if errors.Is(err, ErrPermission) {
			return nil, fmt.Errorf("probe hook %s: %w", h.name, err)
		}
		if err != nil {
			out = append(out, Lack{Hook: h.name, Err: err})
		}
	}
	return out, nil
}

// probeHook loads a program that allows everything, and lets it go.
func probeHook(kind ebpf.ProgramType, attach ebpf.AttachType) error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: kind, AttachType: attach, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		return fmt.Errorf("load a program for it: %w", err)
	}
	return prog.Close() //nolint:wrapcheck // it is the library's only error
}

// leaveOut takes the programs of missing hooks out of the description, and refuses where one of them was not accepted.
func leaveOut(spec *ebpf.CollectionSpec, cfg Config) error {
	missing, err := lacks(cfg.Without, probeHook)
	if err != nil {
		return err
	}
	for _, l := range missing {
		if !slices.Contains(cfg.Accept, l.Hook) || !optional(l.Hook) {
			return fmt.Errorf("%w: %s: %w", ErrNoHook, l.Hook, l.Err)
		}
		delete(spec.Programs, l.Hook) // named by Hooks
	}
	return nil
}

// optional: without the hooks that judge packets nothing is judged, and no operator can accept that.
func optional(hook string) bool { return hook != "egress" && hook != "ingress" }
