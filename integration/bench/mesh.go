package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/scenario"
	"github.com/signet-overlay/signet/internal/key"
)

// meshVerb makes this program one of the hosts of startMesh.
const meshVerb = "mesh-host"

var meshOwn = [2]netip.Addr{netip.MustParseAddr("198.18.0.5"), netip.MustParseAddr("198.18.1.9")}

// startMesh makes two hosts whose dataplanes this program feeds, without a coordinator.
func (b *bench) startMesh(ctx context.Context, prefix string, entries, changes int) (d *scenario.Demo, lab *netlab.Lab, err error) {
	lab, err = netlab.New(ctx, netlab.Options{Prefix: prefix, Dir: b.dir})
	if err != nil {
		return nil, nil, fmt.Errorf("make lab: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lab.Close())
		}
	}()
	wire, err := lab.Bridge(ctx, "wire")
	if err != nil {
		return nil, nil, err
	}
	var agents [2]*scenario.Agent
	var keys [2]key.Private
	for i := range agents {
		if keys[i], err = key.NewPrivate(); err != nil {
			return nil, nil, err
		}
		h, err := lab.Host(ctx, fmt.Sprintf("h%d", i))
		if err != nil {
			return nil, nil, err
		}
		agents[i] = &scenario.Agent{Host: h, Underlay: netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + i)})}
		if agents[i].If, err = lab.Connect(ctx, h, wire, netip.PrefixFrom(agents[i].Underlay, 24)); err != nil {
			return nil, nil, err
		}
	}
	for i, unit := range []string{scenario.APIServer, scenario.Postgres} {
		h, peer := agents[i].Host, keys[1-i].Public()
		workload, err := h.Cgroup(unit)
		if err != nil {
			return nil, nil, err
		}
		config, err := json.Marshal(meshHost{
			Private: keys[i].Reveal(), Peer: peer, Endpoint: netip.AddrPortFrom(agents[1-i].Underlay, meshPort),
			Own: meshOwn[i], Other: meshOwn[1-i], Node: netip.AddrFrom4([4]byte{198, 18, 200, byte(1 + i)}),
			CgroupRoot: h.CgroupRoot(), Workload: workload, BPFFS: filepath.Join(h.BPFFS(), "signet"), First: i == 0, Entries: entries, Changes: changes,
		})
		if err != nil {
			return nil, nil, fmt.Errorf("write host: %w", err)
		}
		agents[i].Proc = h.Command(ctx, netlab.Opts{Cgroup: "system.slice/signetd.service", Stdin: bytes.NewReader(config)}, filepath.Join(b.bin, "bench"), meshVerb)
		if err := agents[i].Proc.Start(); err != nil {
			return nil, nil, err
		}
		if err := agents[i].Proc.WaitFor(ctx, "ready"); err != nil {
			return nil, nil, err
		}
	}
	return &scenario.Demo{App: agents[0], Data: agents[1]}, lab, nil
}

// million compares TCP beside a million entries of which some change all the time.
func (b *bench) million(ctx context.Context) (err error) {
	const entries, changes = 1_000_000, 100
	if b.only != "" && b.only != fmt.Sprint(entries) {
		return nil
	}
	d, lab, err := b.startMesh(ctx, "benchmil", entries, changes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	bare, err := b.bareTunnel(ctx, d)
	if err != nil {
		return err
	}
	if err := b.entries(d, fmt.Sprint(entries)); err != nil {
		return err
	}
	if err := b.compare(ctx, d, fmt.Sprint(entries), meshOwn[1], bare); err != nil {
		return err
	}
	var rates []float64
	for line := range strings.Lines(d.Data.Proc.Text()) {
		var rate float64
		if n, _ := fmt.Sscanf(line, "changes %f a second", &rate); n == 1 {
			rates = append(rates, rate)
		}
	}
	if len(rates) == 0 {
		return errors.New("the host reported no change")
	}
	b.atLeast(fmt.Sprintf("tcp/entries=%d/changes", entries), percentile(rates, 50), "1/s", 0.95*changes)
	return nil
}

// ping measures what a flood of pings takes longer through the mesh than through wireguard-go alone.
func (b *bench) ping(ctx context.Context) (err error) {
	d, lab, err := b.startMesh(ctx, "benchping", 10, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	if _, err := b.bareTunnel(ctx, d); err != nil {
		return err
	}
	var added []float64
	for round := range b.pairs {
		var micros [2]float64
		for turn := range 2 {
			which := (round + turn) % 2
			ends := [2][2]netip.Addr{meshOwn, bareIP}[which]
			if micros[which], err = floodPing(ctx, d.App.Host, ends[0], ends[1]); err != nil {
				return err
			}
		}
		added = append(added, micros[0]-micros[1])
	}
	b.atMost("ping/judge-adds", percentile(added, 50), "us", 3)
	return nil
}

// floodPing gives the mean round trip in microseconds. Without a source, ping would look for one by a datagram of its
// own, which no rule allows.
func floodPing(ctx context.Context, h *netlab.Host, from, to netip.Addr) (float64, error) {
	out, err := h.Command(ctx, netlab.Opts{Cgroup: scenario.APIServer}, "ping", "-f", "-q", "-c", "5000", "-I", from.String(), to.String()).Output()
	if err != nil {
		return 0, fmt.Errorf("ping: %w: %.300s", err, out)
	}
	_, values, _ := strings.Cut(out, "mdev = ")
	var least, mean float64
	if n, _ := fmt.Sscanf(values, "%f/%f", &least, &mean); n != 2 {
		return 0, fmt.Errorf("ping printed no times: %.300s", out)
	}
	return mean * 1000, nil
}
