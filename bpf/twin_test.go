package bpf

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// twinPrograms are those that answer questions; dataplane/enforce loads no others.
var twinPrograms = []string{
	TwinProgTestConnect, TwinProgEgress, TwinProgIngress, TwinProgTunnelEgress, TwinProgTunnelIngress, TwinProgLoEgress,
	TwinProgGuard, TwinProgGuardEgress,
}

// TestTwinVerifier loads every program of the twin by itself.
func TestTwinVerifier(t *testing.T) {
	spec, err := LoadTwin()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	for _, name := range twinPrograms {
		one := spec.Copy()
		for other := range one.Programs {
			if other != name {
				delete(one.Programs, other)
			}
		}
		coll, err := ebpf.NewCollection(one)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		info, err := coll.Programs[name].Info()
		if err != nil {
			t.Fatal(err)
		}
		if insns, _ := info.VerifiedInstructions(); insns > verifierBudget {
			t.Errorf("%s: the verifier needs %d instructions, more than %d", name, insns, verifierBudget)
		}
		coll.Close()
	}
}

// TestTwinCallsNothingThatWrites looks at every call of a helper: those that change a map, tell a reader or change a
// packet or socket are none of the twin's. (What it stores through pointers is compared by dataplane/enforce.)
func TestTwinCallsNothingThatWrites(t *testing.T) {
	spec, err := LoadTwin()
	if err != nil {
		t.Fatal(err)
	}
	may := map[asm.BuiltinFunc]bool{
		asm.FnMapLookupElem: true, asm.FnKtimeGetCoarseNs: true, asm.FnKtimeGetNs: true, asm.FnJiffies64: true,
		asm.FnSkbLoadBytes: true, asm.FnSkbLoadBytesRelative: true,
		asm.FnSkbPullData: true, // makes headers readable, and changes none
	}
	for _, name := range twinPrograms {
		p := spec.Programs[name]
		if p == nil {
			t.Errorf("there is no program %s", name)
			continue
		}
		for i, in := range p.Instructions {
			if in.IsBuiltinCall() && !may[asm.BuiltinFunc(in.Constant)] {
				t.Errorf("%s calls %v at instruction %d", name, asm.BuiltinFunc(in.Constant), i)
			}
			for _, m := range []string{TwinMapEvents, TwinMapLost, TwinMapCounters} {
				if in.IsLoadFromMap() && in.Reference() == m {
					t.Errorf("%s uses map %s at instruction %d", name, m, i)
				}
			}
		}
	}
}
