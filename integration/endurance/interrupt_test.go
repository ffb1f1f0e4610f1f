package endurance

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/scenario"
)

const (
	// killApart is the time between two deaths of the receiver's agent.
	killApart = 5 * time.Second
	// darkFor is how long the allowed flow may be interrupted by each.
	darkFor = time.Second
	// pingEvery is the time between two questions of one flow, and so the resolution.
	pingEvery = 10 * time.Millisecond
	// uninterrupted is the port of the flows that are watched.
	uninterrupted = 5432
)

// TestKillInterruption kills the receiver's agent every five seconds and measures how long established flows, which ask and
// get an answer a hundred times a second, are without one.
func TestKillInterruption(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	kills := 4
	if nightly() {
		kills = 12
	}
	d := start(ctx, t, "interrupt", "  - {id: udp-too, from: [app/api-server], to: [data/postgres], allow: [udp/5432]}\n")
	pg, pg6, err := d.Data.Address(ctx, "data/postgres")
	must(t, err)
	streams := map[string]*netlab.Cmd{}
	for _, addr := range []netip.Addr{pg, pg6} {
		for _, network := range []string{"tcp", "udp"} {
			to := netip.AddrPortFrom(addr, uninterrupted)
			listen(ctx, t, d, network, to)
			cmd := d.Probe(ctx, d.App, scenario.APIServer, "stream", network, to.String(), pingEvery.String())
			must(t, cmd.Start())
			must(t, cmd.WaitFor(ctx, "answer 20 "))
			streams[fmt.Sprint(network, map[bool]string{true: "4", false: "6"}[addr.Is4()])] = cmd
		}
	}
	var when []time.Time
	for range kills {
		when = append(when, time.Now())
		must(t, d.Data.KillAgent())
		must(t, d.Data.StartAgent(ctx))
		must(t, d.Data.Proc.WaitFor(ctx, "agent runs"))
		runs := time.Since(when[len(when)-1])
		must(t, d.Data.WaitConnected(ctx))
		healthy, used := time.Since(when[len(when)-1]), processorTime(t, d.Data.Proc.PID())
		must(t, d.Data.WaitStatus(ctx, "have its peer up", func(s scenario.Status) bool { return s.Peers.Up > 0 }))
		t.Logf("kill %d: the agent ran again after %v, enforced after %v (of which it had %v of processor time), and had its peer up after %v", len(when),
			runs.Round(time.Millisecond), healthy.Round(time.Millisecond), used, time.Since(when[len(when)-1]).Round(time.Millisecond))
		waitUntil(ctx, when[len(when)-1].Add(killApart))
	}
	for name, cmd := range streams {
		must(t, stillRuns(cmd))
		answers := answersOf(cmd.Text())
		for i, at := range when {
			gap, got := longestGap(answers, at, at.Add(killApart))
			gap = gap.Round(time.Millisecond)
			t.Logf("%s, kill %d: interrupted for %v (%d answers in %v)", name, i+1, gap, got, killApart)
			if gap > darkFor {
				t.Errorf("%s: the flow was interrupted for %v by kill %d", name, gap, i+1)
			}
			if got < 100 {
				t.Errorf("%s: only %d answers in %v", name, got, killApart)
			}
		}
	}
	if t.Failed() {
		t.Logf("%.6000s", d.Evidence(ctx))
	}
}

// processorTime is what a process has used so far. Where it is much less than the time that passed, others had the processor.
func processorTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var ticks time.Duration
	for _, field := range fields[11:13] { // utime and stime, in hundredths of a second (proc_pid_stat(5))
		n, err := strconv.Atoi(field)
		must(t, err)
		ticks += time.Duration(n)
	}
	return ticks * 10 * time.Millisecond
}

func stillRuns(cmd *netlab.Cmd) error {
	select {
	case <-cmd.Done():
		return fmt.Errorf("a stream ended: %w", cmd.Wait())
	default:
		return nil
	}
}

// answersOf are the times at which a stream got its answers.
func answersOf(text string) (out []time.Time) {
	for line := range strings.Lines(text) {
		var n, ms int64
		if got, _ := fmt.Sscanf(line, "answer %d at %d", &n, &ms); got == 2 {
			out = append(out, time.UnixMilli(ms))
		}
	}
	return out
}

// longestGap is the longest time without an answer between from and to, whose ends count as answers, and how many there were.
func longestGap(answers []time.Time, from, to time.Time) (gap time.Duration, n int) {
	last := from
	for _, a := range answers {
		if a.Before(from) || a.After(to) {
			continue
		}
		gap, last, n = max(gap, a.Sub(last)), a, n+1
	}
	return max(gap, to.Sub(last)), n
}
