package main

import (
	"context"
	"fmt"
	"time"

	"github.com/signet-overlay/signet/dataplane/enforce"
)

// judge measures the judge by itself, net of the harness, and what its maps cost.
func (b *bench) judge(ctx context.Context) error {
	for _, entries := range []int{10, 100_000, 1_000_000} {
		ns, err := enforce.BenchEstablished(entries)
		if err != nil {
			return err
		}
		b.atMost(fmt.Sprintf("judge/established/entries=%d", entries), ns, "ns", 60)
		if ns, err = enforce.BenchEstablishedCgroup(entries); err != nil {
			return err
		}
		b.atMost(fmt.Sprintf("judge/established-cgroup/entries=%d", entries), ns, "ns", 60)
	}
	ns, err := enforce.BenchNewFlow(100_000)
	if err != nil {
		return err
	}
	b.atMost("judge/new-flow", ns, "ns", 800)
	if err := b.changes(); err != nil {
		return err
	}
	// The size is a power of two, as is the default, so that there is a bucket for each entry.
	bytes, err := enforce.BenchConnBytes(1 << 17)
	if err != nil {
		return err
	}
	b.atMost("conntrack/bytes-ipv4", bytes, "B", 160)
	return b.burst(ctx)
}

// changes measures how soon other rules are in force.
func (b *bench) changes() error {
	var swaps []float64
	for range 5 {
		s, err := enforce.BenchSwap(100_000)
		if err != nil {
			return err
		}
		if s.Mixed > 0 {
			return fmt.Errorf("%d of %d pairs of packets were judged by a mix of two rulesets", s.Mixed, s.Pairs)
		}
		swaps = append(swaps, s.InForce.Seconds()*1000)
	}
	b.atMost("judge/swap-100000", percentile(swaps, 50), "ms", 150)
	b.tell("judge/swap-100000/max", percentile(swaps, 100), "ms")
	// A hundred changes a second leave 10 ms for each.
	for _, entries := range []int{10, 1_000_000} {
		took, err := enforce.BenchChange(entries)
		if err != nil {
			return err
		}
		b.tell(fmt.Sprintf("judge/change-one-of/entries=%d", entries), float64(took)/float64(time.Millisecond), "ms")
	}
	return nil
}

// burst measures what becomes of a million events.
func (b *bench) burst(ctx context.Context) error {
	const events = 1_000_000
	burst, err := enforce.BenchBurst(ctx, events)
	if err != nil {
		return err
	}
	b.tell("ring/burst/delivered", float64(burst.Delivered), "events")
	b.tell("ring/burst/lost", float64(burst.Lost), "events")
	accounted := burst.Delivered + burst.Lost
	b.promise("ring/burst", float64(accounted), "events", fmt.Sprintf("= %d", events), accounted == events)
	return nil
}
