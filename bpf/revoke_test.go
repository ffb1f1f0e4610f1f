package bpf

import (
	"testing"

	"github.com/cilium/ebpf"
)

// TestRevokeVerifier loads the iterators by themselves, with an overlay set. It needs Linux 6.5.
func TestRevokeVerifier(t *testing.T) {
	spec, err := LoadRevoke()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	var r RevokePrefixes
	r.V4.W, r.V4Mask.W = [4]uint32{0, 0, 0xffff0000, 0x12c6}, [4]uint32{^uint32(0), ^uint32(0), ^uint32(0), 0xfeff}
	r.V6.W[0], r.V6Mask.W = 0x07005afd, [4]uint32{^uint32(0), ^uint32(0), 0, 0}
	if err := spec.Variables[RevokeVarOverlay].Set(r); err != nil {
		t.Fatal(err)
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer coll.Close()
	for name, p := range coll.Programs {
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		insns, _ := info.VerifiedInstructions()
		if insns > verifierBudget {
			t.Errorf("%s: the verifier needs %d instructions, more than %d", name, insns, verifierBudget)
		}
		t.Logf("%s: %d instructions verified", name, insns)
	}
}

// TestRevokeMaps: the iterators read the judge's maps, so the two objects must say the same of each.
func TestRevokeMaps(t *testing.T) {
	judge, err := LoadJudge()
	if err != nil {
		t.Fatal(err)
	}
	revoke, err := LoadRevoke()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for name, m := range revoke.Maps {
		if m.Pinning != ebpf.PinByName {
			continue
		}
		j := judge.Maps[name]
		if j == nil || j.Type != m.Type || j.KeySize != m.KeySize || j.ValueSize != m.ValueSize || j.Flags != m.Flags {
			t.Errorf("map %s: %v here, %v in the judge; generate both again", name, m, j)
		}
		n++
	}
	if n < 5 {
		t.Errorf("only %d shared maps", n)
	}
}
