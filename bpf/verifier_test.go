package bpf

import (
	"testing"
	"time"

	"github.com/cilium/ebpf"
)

// verifierBudget is a tenth of what the kernel allows (one million instructions on all paths together): loading is part
// of every start of an agent, and kernels differ in how well they prune.
const verifierBudget = 100_000

// TestVerifier loads every program by itself, with an overlay set, since the verifier leaves out what constants rule out.
func TestVerifier(t *testing.T) {
	for name, load := range map[string]func() (*ebpf.CollectionSpec, error){"judge": LoadJudge, "test": LoadJudgeTest} {
		spec, err := load()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range spec.Maps {
			m.Pinning = ebpf.PinNone
		}
		var r JudgePrefixes
		r.V4.W = [4]uint32{0, 0, 0xffff0000, 0x12c6}
		r.V4Mask.W = [4]uint32{^uint32(0), ^uint32(0), ^uint32(0), 0xfeff}
		r.V6.W[0], r.V6Mask.W = 0x07005afd, [4]uint32{^uint32(0), ^uint32(0), 0, 0}
		if err := spec.Variables["overlay"].Set(r); err != nil {
			t.Fatal(err)
		}
		for n := range spec.Programs {
			one := spec.Copy()
			for other := range one.Programs {
				if other != n {
					delete(one.Programs, other)
				}
			}
			began := time.Now()
			coll, err := ebpf.NewCollection(one)
			if err != nil {
				t.Errorf("%s %s: %v", name, n, err)
				continue
			}
			info, err := coll.Programs[n].Info()
			if err != nil {
				t.Fatal(err)
			}
			insns, _ := info.VerifiedInstructions()
			if insns > verifierBudget {
				t.Errorf("%s %s: the verifier needs %d instructions, more than %d", name, n, insns, verifierBudget)
			}
			t.Logf("%s %s: %d instructions verified in %v", name, n, insns, time.Since(began).Round(time.Millisecond))
			coll.Close()
		}
	}
}
