package enforce

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// FloodCost is what the flood guard in XDP costs a packet, in nanoseconds, net of the harness.
type FloodCost struct {
	Other      float64 // UDP to another port
	Data       float64 // a data message
	BadLength  float64 // dropped for its length
	Initiation float64 // from an unknown source, within the rates
	Limited    float64 // from an unknown source, dropped
}

// BenchFlood measures the flood guard as BenchEstablished measures the judge: the best of several rounds, interleaved with
// a program that does nothing. It needs root and attaches nothing.
func BenchFlood() (FloodCost, error) {
	// One token a nanosecond: the benchmark never finds an empty bucket where it should not.
	open := FloodRate{time.Nanosecond, maxFloodBurst}
	cfg := FloodConfig{Port: benchPort, PerSource: open, Global: open}
	wide, err := OpenFlood(cfg)
	if err != nil {
		return FloodCost{}, err
	}
	defer wide.Close()
	cfg.PerSource = FloodRate{maxFloodEvery, 1}
	narrow, err := OpenFlood(cfg)
	if err != nil {
		return FloodCost{}, err
	}
	defer narrow.Close()
	for _, f := range []*Flood{wide, narrow} {
		if err := f.SetOwn([]netip.Addr{benchLocal}); err != nil {
			return FloodCost{}, err
		}
	}
	idle, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "idle", Type: ebpf.XDP, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
	})
	if err != nil {
		return FloodCost{}, explain(fmt.Errorf("load the idle program: %w", err))
	}
	defer idle.Close()
	var cost FloodCost
	for _, c := range []struct {
		to     *float64
		f      *Flood
		port   uint16
		kind   uint32
		length int
	}{
		{&cost.Other, wide, benchPort + 1, 4, 128}, {&cost.Data, wide, benchPort, 4, 128}, {&cost.BadLength, wide, benchPort, 2, 128},
		{&cost.Initiation, wide, benchPort, 1, 148}, {&cost.Limited, narrow, benchPort, 1, 148},
	} {
		packet := floodBenchPacket(c.port, c.kind, c.length)
		if *c.to, err = floodDifference(c.f.coll.Programs[floodXDP], idle, packet); err != nil {
			return FloodCost{}, err
		}
	}
	return cost, nil
}

// floodDifference runs the two programs in turns.
func floodDifference(guard, idle *ebpf.Program, packet []byte) (float64, error) {
	const runs, rounds = 1 << 17, 10
	best := [2]float64{math.Inf(1), math.Inf(1)}
	for range rounds {
		for i, prog := range []*ebpf.Program{guard, idle} {
			_, took, err := prog.Benchmark(packet, runs, nil)
			if err != nil {
				return 0, fmt.Errorf("run %s: %w", prog, err)
			}
			best[i] = min(best[i], float64(took))
		}
	}
	return best[0] - best[1], nil
}

// floodBenchPacket is a WireGuard message in UDP, IPv4 and Ethernet, without checksums: the guard does not look at them.
func floodBenchPacket(port uint16, kind uint32, length int) []byte {
	const ip, udp = 20, 8
	b := make([]byte, benchLinkHeader+ip+udp+length)
	b[12], b[13] = 0x08, 0x00
	h := b[benchLinkHeader:]
	h[0], h[8], h[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)))
	src, dst := benchRemote.As4(), benchLocal.As4()
	copy(h[12:], src[:])
	copy(h[16:], dst[:])
	binary.BigEndian.PutUint16(h[ip:], 40000)
	binary.BigEndian.PutUint16(h[ip+2:], port)
	binary.BigEndian.PutUint16(h[ip+4:], uint16(udp+length))
	binary.LittleEndian.PutUint32(h[ip+udp:], kind)
	return b
}
