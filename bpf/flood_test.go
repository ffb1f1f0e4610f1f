package bpf

import (
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
)

// TestFloodVerifier loads every entrance of the flood guard by itself.
func TestFloodVerifier(t *testing.T) {
	spec, err := LoadFlood()
	if err != nil {
		t.Fatal(err)
	}
	for name := range spec.Programs {
		one := spec.Copy()
		for other := range one.Programs {
			if other != name {
				delete(one.Programs, other)
			}
		}
		began := time.Now()
		coll, err := ebpf.NewCollection(one)
		if err != nil {
			t.Errorf("%s: %+v", name, err)
			continue
		}
		info, err := coll.Programs[name].Info()
		if err != nil {
			t.Fatal(err)
		}
		insns, _ := info.VerifiedInstructions()
		if insns > verifierBudget {
			t.Errorf("%s: the verifier needs %d instructions, more than %d", name, insns, verifierBudget)
		}
		t.Logf("%s: %d instructions verified in %v", name, insns, time.Since(began).Round(time.Millisecond))
		coll.Close()
	}
}

// TestFloodNumbers compares the causes of flood.c with those in Go, both ways.
func TestFloodNumbers(t *testing.T) {
	want := map[string]int{
		"FLOOD_PASSED": FloodPassed, "FLOOD_BAD_LENGTH": FloodBadLength, "FLOOD_BAD_TYPE": FloodBadType,
		"FLOOD_RATE_SOURCE": FloodRateSource, "FLOOD_RATE_GLOBAL": FloodRateGlobal, "FLOOD_CAUSES": FloodCauses,
	}
	c := enums(t, "flood.c")
	for name, n := range want {
		if got, ok := c[name]; !ok || got != n {
			t.Errorf("%s is %d in C (there: %v), want %d", name, got, ok, n)
		}
	}
	for name := range c {
		if _, ok := want[name]; !ok && strings.HasPrefix(name, "FLOOD_") {
			t.Errorf("%s is not in Go", name)
		}
	}
}
