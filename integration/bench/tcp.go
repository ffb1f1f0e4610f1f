package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/scenario"
	"github.com/signet-overlay/signet/internal/key"
)

const (
	iperfPort = 5432 // allowed by the demo's rule
	bareName  = "bare0"
	barePort  = 51999
)

// bareIP are the addresses of the tunnel without Signet (RFC 2544 range's neighbour, inside namespaces only).
var bareIP = [2]netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")}

// tcp compares one TCP stream through the mesh with one through bare wireguard-go, at few and at many policy entries.
func (b *bench) tcp(ctx context.Context) error {
	if b.only == "1000000" {
		return nil
	}
	d, err := scenario.StartDemo(ctx, scenario.Options{Prefix: "benchtcp", Dir: b.dir, Bin: b.bin})
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.ApplyPolicy(ctx, scenario.Workloads+scenario.Rules); err != nil {
		return err
	}
	bare, err := b.bareTunnel(ctx, d)
	if err != nil {
		return err
	}
	v4, _, err := d.Data.Address(ctx, "data/postgres")
	if err != nil {
		return err
	}
	for _, at := range []struct {
		name   string
		policy string
	}{{"10", scenario.Workloads + portRules(5428, 10)}, {"100000", scenario.Workloads + manyRules()}} {
		if b.only != "" && b.only != at.name {
			continue
		}
		if err := d.ApplyPolicy(ctx, at.policy); err != nil {
			return err
		}
		if err := b.entries(d, at.name); err != nil {
			return err
		}
		if err := b.compare(ctx, d, at.name, v4, bare); err != nil {
			return err
		}
	}
	return nil
}

// entries checks that the host's kernel really holds as many policy entries as the figure says.
func (b *bench) entries(d *scenario.Demo, name string) error {
	promised, err := strconv.Atoi(name)
	if err != nil {
		return fmt.Errorf("name %q is no number: %w", name, err)
	}
	m, err := ebpf.LoadPinnedMap(filepath.Join(d.App.Host.BPFFS(), "signet", enforce.ABI, "maps", "entries"), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return fmt.Errorf("open the kernel's entries: %w", err)
	}
	defer m.Close()
	held, key, value := 0, make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	all := m.Iterate()
	for all.Next(&key, &value) {
		held++
	}
	if err := all.Err(); err != nil {
		return fmt.Errorf("count entries: %w", err)
	}
	b.tell("tcp/entries="+name+"/held", float64(held), "entries")
	if held < promised {
		return fmt.Errorf("the kernel holds %d entries, expected %d", held, promised)
	}
	return nil
}

// portRules allows a run of single ports.
func portRules(first, n int) string {
	var services []string
	for p := first; p < first+n; p++ {
		services = append(services, fmt.Sprintf("tcp/%d", p))
	}
	return "rules:\n  - {id: ports, from: [app/api-server], to: [data/postgres], allow: [" + strings.Join(services, ", ") + "]}\n"
}

// manyRules compiles to more than 100,000 entries for the one pair of workloads that the measurement uses: single ports,
// since a range of them would be a handful of entries.
func manyRules() string {
	var b strings.Builder
	b.WriteString("rules:\n")
	for first := 1; first <= 65535; first += 500 {
		fmt.Fprintf(&b, "  - {id: wide-%d, from: [app/api-server], to: [data/postgres], allow: [", first)
		for p := first; p <= min(first+499, 65535); p++ {
			fmt.Fprintf(&b, "tcp/%d,", p)
			if first <= 35000 {
				fmt.Fprintf(&b, "udp/%d,", p)
			}
		}
		b.WriteString("]}\n")
	}
	return b.String()
}

// bareTunnel puts wireguard-go between the same two hosts.
func (b *bench) bareTunnel(ctx context.Context, d *scenario.Demo) ([2]*netlab.Cmd, error) {
	hosts := [2]*scenario.Agent{d.App, d.Data}
	var keys [2]key.Private
	var procs [2]*netlab.Cmd
	for i := range keys {
		var err error
		if keys[i], err = key.NewPrivate(); err != nil {
			return procs, err
		}
	}
	for i, a := range hosts {
		peer := 1 - i
		config := fmt.Sprintf("private_key=%x\nlisten_port=%d\npublic_key=%s\nendpoint=%v\nallowed_ip=%v/32\n\n",
			keys[i].Reveal(), barePort, keys[peer].Public().Hex(), netip.AddrPortFrom(hosts[peer].Underlay, barePort), bareIP[peer])
		procs[i] = a.Host.Command(ctx, netlab.Opts{Stdin: strings.NewReader(config)}, filepath.Join(b.bin, "probe"), "bare", bareName)
		if err := procs[i].Start(); err != nil {
			return procs, err
		}
		if err := procs[i].WaitFor(ctx, "ready"); err != nil {
			return procs, err
		}
		for _, args := range []string{
			fmt.Sprintf("addr add %v/32 dev %s", bareIP[i], bareName), "link set " + bareName + " mtu 1420 up",
			fmt.Sprintf("route add %v/32 dev %s src %v", bareIP[peer], bareName, bareIP[i]),
		} {
			if err := a.Host.Command(ctx, netlab.Opts{}, "ip", strings.Fields(args)...).Run(); err != nil {
				return procs, err
			}
		}
	}
	return procs, nil
}

// sample is one transfer: what went through, and what the tunnel's two processes spent on it.
type sample struct{ bitsPerSecond, cpuNanosPerByte float64 }

func (b *bench) compare(ctx context.Context, d *scenario.Demo, entries string, mesh netip.Addr, bare [2]*netlab.Cmd) error {
	meshPIDs := [2]int{d.App.Proc.PID(), d.Data.Proc.PID()}
	barePIDs := [2]int{bare[0].PID(), bare[1].PID()}
	var ours, theirs, ourCPU, theirCPU []float64
	for pair := range b.pairs {
		var got [2]sample
		// Every other pair starts with the other side, so that drift of the machine cancels.
		for turn := range 2 {
			which := (pair + turn) % 2
			to, pids := mesh, meshPIDs
			if which == 1 {
				to, pids = bareIP[1], barePIDs
			}
			s, err := b.transfer(ctx, d, to, pids)
			if err != nil {
				return fmt.Errorf("pair %d: %w", pair+1, err)
			}
			got[which] = s
		}
		ours, theirs = append(ours, got[0].bitsPerSecond), append(theirs, got[1].bitsPerSecond)
		ourCPU, theirCPU = append(ourCPU, got[0].cpuNanosPerByte), append(theirCPU, got[1].cpuNanosPerByte)
		fmt.Fprintf(os.Stderr, "entries %s, pair %d of %d: %.2f against %.2f Gbit/s\n", entries, pair+1, b.pairs, ours[pair]/1e9, theirs[pair]/1e9)
	}
	mean, lower := ratioBound(ours, theirs)
	name := "tcp/entries=" + entries
	b.tell(name+"/signet", percentile(ours, 50)/1e9, "Gbit/s")
	b.tell(name+"/wireguard-go", percentile(theirs, 50)/1e9, "Gbit/s")
	b.tell(name+"/ratio", mean, "x")
	b.atLeast(name+"/ratio-lower-95", lower, "x", 0.95)
	b.tell(name+"/cpu/signet", percentile(ourCPU, 50), "ns/B")
	b.tell(name+"/cpu/wireguard-go", percentile(theirCPU, 50), "ns/B")
	return nil
}

func (b *bench) transfer(ctx context.Context, d *scenario.Demo, to netip.Addr, pids [2]int) (sample, error) {
	server := d.Data.Host.Command(ctx, netlab.Opts{Cgroup: scenario.Postgres}, "iperf3", "-s", "-1", "-B", to.String(), "-p", fmt.Sprint(iperfPort), "--forceflush")
	if err := server.Start(); err != nil {
		return sample{}, err
	}
	defer func() { _ = server.Kill(9); <-server.Done() }()
	if err := server.WaitFor(ctx, "listening"); err != nil {
		return sample{}, err
	}
	before, err := cpuOf(pids)
	if err != nil {
		return sample{}, err
	}
	limited, cancel := context.WithTimeout(ctx, time.Duration(b.seconds+10)*time.Second)
	defer cancel()
	out, err := d.App.Host.Command(limited, netlab.Opts{Cgroup: scenario.APIServer}, "iperf3", "-c", to.String(), "-p", fmt.Sprint(iperfPort),
		"-t", fmt.Sprint(b.seconds), "-J").Output()
	if err != nil {
		return sample{}, fmt.Errorf("iperf3: %w: %.300s", err, out)
	}
	after, err := cpuOf(pids)
	if err != nil {
		return sample{}, err
	}
	var result struct {
		End struct {
			Received struct {
				Bytes         float64 `json:"bytes"`
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal([]byte(out), &result); err != nil || result.End.Received.Bytes == 0 {
		return sample{}, fmt.Errorf("iperf3 printed no result: %w: %.300s", err, out)
	}
	return sample{result.End.Received.BitsPerSecond, (after - before) * 1e9 / result.End.Received.Bytes}, nil
}

func cpuOf(pids [2]int) (sum float64, err error) {
	for _, pid := range pids {
		s, err := cpuSeconds(pid)
		if err != nil {
			return 0, err
		}
		sum += s
	}
	return sum, nil
}
