package endurance

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/probe/pulse"
	"github.com/signet-overlay/signet/integration/scenario"
)

const (
	// nightlyEnv makes the tests of this package as long as the acceptance of the product asks for; "make nightly" sets it.
	nightlyEnv = "SIGNET_NIGHTLY"
	// cutWithin is how soon a decision that was taken back has to count, and programs to know.
	cutWithin = time.Second
	// watchFor is how long flows are watched after the cut: a packet that comes later than cutWithin has to be seen.
	watchFor = 1500 * time.Millisecond
	// firstPulse is the first port of the flows that are cut.
	firstPulse = 7000
	// shortLease is the shortest that a coordinator accepts, and a little more.
	shortLease = 12 * time.Second
)

// nightly reports whether there is time for the long form.
func nightly() bool { return os.Getenv(nightlyEnv) != "" }

// trials are the rounds of each cause, and the ports in each. A round cuts four flows for each port: TCP and UDP, of both
// families.
func trials() (rounds, ports int) {
	if nightly() {
		return 10, 5
	}
	return 1, 3
}

const pulseRule = "rules:\n  - {id: pulses, from: [app/api-server], to: [data/postgres], allow: [tcp/7000-7099, udp/7000-7099]%s}\n"

// pulsePolicy lets the flows pass, until a time if there is one.
func pulsePolicy(expires time.Time) string {
	more := ""
	if !expires.IsZero() {
		more = ", expires: " + expires.UTC().Format(time.RFC3339)
	}
	return scenario.Workloads + fmt.Sprintf(pulseRule, more)
}

// cutLab is a database's host and a client's, and what was measured between them.
type cutLab struct {
	*scenario.Cluster
	client, server *scenario.Agent
	ports          int
	byCause        map[string]*latencies
	order          []string
}

// latencies are what one cause showed.
type latencies struct {
	stop      []time.Duration            // from the cut to the last packet at either end, one for each flow
	told      map[string][]time.Duration // from the cut to the socket's error, by network and end
	errors    map[string]int             // by errno
	firstLast time.Duration              // the earliest end of a flow, to see that none ended before its time
}

// TestRevocationLatency takes back what live flows depend on, in each of the ways there are, and measures when the last
// packet came and when programs learned.
func TestRevocationLatency(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 18*time.Minute)
	defer cancel()
	l := startCutLab(ctx, t, "cut", "")
	rounds, _ := trials()
	for range rounds {
		l.round(ctx, t, "rule removed", l.allow, func() (at, at) {
			begin := time.Now()
			return l.now(t, l.ApplyPolicy(ctx, scenario.Workloads), begin)
		})
		l.expire(ctx, t)
		l.round(ctx, t, "workload revoked", l.allow, func() (at, at) {
			begin := time.Now()
			_, err := l.Admin(ctx, "workload", "revoke", "app/api-server", "--node", l.client.Host.Name())
			return l.now(t, err, begin)
		})
		// A revoked workload comes back when the policy takes it out and places it anew.
		must(t, l.ApplyPolicy(ctx, strings.Replace(scenario.Workloads, "  - {id: app/api-server, selectors: [\"unit:api-server.service\"], nodes: [\"api-*\"]}\n", "", 1)))
	}
	for i := range rounds {
		l.round(ctx, t, "node revoked", l.allow, func() (at, at) {
			begin := time.Now()
			_, err := l.Admin(ctx, "node", "revoke", l.client.Host.Name())
			return l.now(t, err, begin)
		})
		if i+1 < rounds {
			must(t, l.client.StopAgent())
			l.client = l.add(ctx, t, fmt.Sprintf("api-%d", i+2))
		}
	}
	l.judge(t)
}

// TestLeaseEndLatency lets leases end while the coordinator is away.
func TestLeaseEndLatency(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	l := startCutLab(ctx, t, "lease", fmt.Sprintf("lease: %v", shortLease))
	rounds, ports := trials()
	if nightly() {
		rounds, ports = 5, 10
	}
	l.ports = ports
	for i := range rounds {
		if i > 0 {
			must(t, l.ServeCoordinator(ctx))
			for _, a := range []*scenario.Agent{l.client, l.server} {
				must(t, a.WaitConnected(ctx))
			}
		}
		l.round(ctx, t, "lease ended", l.allow, func() (at, at) {
			must(t, l.KillCoordinator())
			ends := [2]time.Time{l.leaseEnds(ctx, t, l.client), l.leaseEnds(ctx, t, l.server)}
			// Nothing tells that a lease has ended but the clock.
			waitUntil(ctx, slices.MaxFunc(ends[:], time.Time.Compare))
			return ends[0], ends[1]
		})
	}
	l.judge(t)
}

// at is when a cut counts at one host.
type at = time.Time

func (l *cutLab) now(t *testing.T, err error, begin time.Time) (at, at) {
	t.Helper()
	must(t, err)
	return begin, begin
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func waitUntil(ctx context.Context, when time.Time) {
	select {
	case <-time.After(time.Until(when)):
	case <-ctx.Done():
	}
}

func startCutLab(ctx context.Context, t *testing.T, prefix, config string) *cutLab {
	t.Helper()
	l := &cutLab{Cluster: startCoordinator(ctx, t, prefix, config), byCause: map[string]*latencies{}}
	_, l.ports = trials()
	l.server, l.client = l.add(ctx, t, "db-1"), l.add(ctx, t, "api-1")
	return l
}

func (l *cutLab) add(ctx context.Context, t *testing.T, name string) *scenario.Agent {
	t.Helper()
	a, err := l.AddHost(ctx, name)
	must(t, err)
	for _, unit := range []string{scenario.APIServer, scenario.Postgres} {
		_, err := a.Host.Cgroup(unit)
		must(t, err)
	}
	must(t, a.WaitConnected(ctx))
	return a
}

func (l *cutLab) allow(ctx context.Context, t *testing.T) {
	t.Helper()
	must(t, l.ApplyPolicy(ctx, pulsePolicy(time.Time{})))
}

// expire is a round whose cut is in the policy from the start.
func (l *cutLab) expire(ctx context.Context, t *testing.T) {
	t.Helper()
	var ends time.Time
	l.round(ctx, t, "rule expired", func(ctx context.Context, t *testing.T) {
		ends = time.Now().Add(5 * time.Second).Truncate(time.Second)
		must(t, l.ApplyPolicy(ctx, pulsePolicy(ends)))
	}, func() (at, at) {
		if !time.Now().Before(ends) {
			t.Fatal("the rule expired before its flows were up")
		}
		waitUntil(ctx, ends)
		return ends, ends
	})
}

// round brings the flows up, cuts them, and notes what both ends saw.
func (l *cutLab) round(ctx context.Context, t *testing.T, cause string, allow func(context.Context, *testing.T), cut func() (client, server at)) {
	t.Helper()
	allow(ctx, t)
	serve, dial := l.pulses(ctx, t)
	live := time.Now()
	client, server := cut()
	first, last := client, server
	if server.Before(client) {
		first, last = server, client
	}
	limited, cancel := context.WithDeadline(ctx, last.Add(watchFor))
	defer cancel()
	for _, end := range []*netlab.Cmd{serve, dial} {
		_ = end.WaitFor(limited, "over") // who was not told shows in the reports
	}
	// Datagrams are tried after the error as well: what still comes has to be seen.
	waitUntil(ctx, last.Add(watchFor))
	ends := map[string][]pulse.Report{}
	for name, cmd := range map[string]*netlab.Cmd{"server": serve, "client": dial} {
		must(t, cmd.Kill(syscall.SIGTERM))
		must(t, cmd.Wait())
		reports, err := pulse.Parse(cmd.Text())
		must(t, err)
		if len(reports) != 4*l.ports {
			t.Fatalf("%s: the %s tells of %d flows of %d: %.1000s", cause, name, len(reports), 4*l.ports, cmd.Text())
		}
		ends[name] = reports
	}
	l.note(t, cause, ends, live, first, map[string]time.Time{"client": client, "server": server})
}

// pulses starts both ends and waits until every flow has delivered at both.
func (l *cutLab) pulses(ctx context.Context, t *testing.T) (serve, dial *netlab.Cmd) {
	t.Helper()
	v4, v6, err := l.server.Address(ctx, "data/postgres")
	must(t, err)
	for begin := time.Now(); ; {
		args := []string{fmt.Sprint(firstPulse), fmt.Sprint(l.ports), v4.String(), v6.String()}
		serve = l.Probe(ctx, l.server, scenario.Postgres, append([]string{"pulse", "serve"}, args...)...)
		must(t, serve.Start())
		must(t, serve.WaitFor(ctx, "ready"))
		dial = l.Probe(ctx, l.client, scenario.APIServer, append([]string{"pulse", "dial"}, args...)...)
		must(t, dial.Start())
		limited, cancel := context.WithTimeout(ctx, 5*time.Second)
		errDial, errServe := dial.WaitFor(limited, "flowing"), serve.WaitFor(limited, "flowing")
		cancel()
		if errDial == nil && errServe == nil {
			return serve, dial
		}
		// A host that has just come may not have its handshake or its process's cgroup yet.
		for _, cmd := range []*netlab.Cmd{serve, dial} {
			_ = cmd.Kill(syscall.SIGKILL)
			_ = cmd.Wait()
		}
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("the flows do not come up: %v; %v\n%.2000s", errDial, errServe, l.client.Proc.Text())
		}
	}
}

// note pairs the two ends of each flow.
func (l *cutLab) note(t *testing.T, cause string, ends map[string][]pulse.Report, live, first time.Time, cut map[string]time.Time) {
	t.Helper()
	m := l.byCause[cause]
	if m == nil {
		m = &latencies{told: map[string][]time.Duration{}, errors: map[string]int{}, firstLast: time.Hour}
		l.byCause[cause], l.order = m, append(l.order, cause)
	}
	last := map[string]time.Time{}
	for end, reports := range ends {
		for _, r := range reports {
			service := r.Local
			if end == "client" {
				service = r.Remote
			}
			key, came := fmt.Sprint(r.Network, " ", service), time.Unix(0, r.Last)
			if came.Before(live.Add(-time.Second / 2)) {
				t.Errorf("%s: a flow was dead before the cut, so it proves nothing: %s at the %s", cause, key, end)
			}
			if came.After(last[key]) {
				last[key] = came
			}
			if r.Ended == 0 {
				t.Errorf("%s: %s: the %s was never told", cause, key, end)
				continue
			}
			m.errors[strings.TrimSpace(r.Errno)]++
			// A socket that sends before it is ended learns from the hook, or from the overlay's unreachable route.
			if !slices.Contains([]string{"ECONNABORTED", "ECONNRESET", "EACCES", "EPERM", "ENETUNREACH"}, r.Errno) {
				t.Errorf("%s: %s: the %s got %q", cause, key, end, r.Err)
			}
			m.told[r.Network+" "+end] = append(m.told[r.Network+" "+end], time.Unix(0, r.Ended).Sub(cut[end]))
		}
	}
	for _, came := range last {
		m.stop = append(m.stop, came.Sub(first))
		m.firstLast = min(m.firstLast, came.Sub(first))
	}
}

// judge prints the table and holds it against the bound.
func (l *cutLab) judge(t *testing.T) {
	t.Helper()
	for _, cause := range l.order {
		m := l.byCause[cause]
		t.Logf("%-16s %3d flows: last packet %s; earliest %v; errors %v", cause, len(m.stop), quantiles(m.stop), m.firstLast.Round(time.Millisecond), m.errors)
		if p99(m.stop) > cutWithin {
			t.Errorf("%s: a packet came %v after the cut", cause, p99(m.stop))
		}
		for _, who := range []string{"tcp client", "tcp server", "udp client", "udp server"} {
			t.Logf("%-16s     %s told %s", "", who, quantiles(m.told[who]))
			if p99(m.told[who]) > cutWithin {
				t.Errorf("%s: %s was told %v after the cut", cause, who, p99(m.told[who]))
			}
		}
	}
}

func p99(all []time.Duration) time.Duration { return quantile(all, 0.99) }

// quantile is the value that at least the share q of all does not exceed, 0 of none.
func quantile(all []time.Duration, q float64) time.Duration {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

func quantiles(all []time.Duration) string {
	ms := func(q float64) time.Duration { return quantile(all, q).Round(time.Millisecond) }
	return fmt.Sprintf("p50 %v p99 %v max %v", ms(0.5), ms(0.99), ms(1))
}

// statusField reads what scenario's status leaves out.
func statusField(ctx context.Context, a *scenario.Agent, into any) error {
	out, err := a.Signet(ctx, "status", "-o", "json")
	start := strings.IndexByte(out, '{')
	if start < 0 {
		return fmt.Errorf("status: %w: %s", err, out)
	}
	// An unhealthy agent's error text follows the document.
	return json.NewDecoder(strings.NewReader(out[start:])).Decode(into)
}

// leaseEnds is when the host's lease, or that of its peer's Binding as this host holds it, ends by itself.
func (l *cutLab) leaseEnds(ctx context.Context, t *testing.T, a *scenario.Agent) time.Time {
	t.Helper()
	var s struct {
		LeaseEnds time.Time `json:"lease_ends"`
	}
	must(t, statusField(ctx, a, &s))
	out, err := a.Signet(ctx, "peers", "-o", "json")
	must(t, err)
	var peers []struct {
		Node     string
		NotAfter time.Time `json:"not_after"`
	}
	must(t, json.Unmarshal([]byte(out), &peers))
	if len(peers) != 1 {
		t.Fatalf("%s has not one peer: %s", a.Host.Name(), out)
	}
	t.Logf("%s: the lease ends at %v, the Binding of %s at %v", a.Host.Name(), s.LeaseEnds.Format("05.000"), peers[0].Node, peers[0].NotAfter.Format("05.000"))
	if peers[0].NotAfter.Before(s.LeaseEnds) {
		return peers[0].NotAfter
	}
	return s.LeaseEnds
}
