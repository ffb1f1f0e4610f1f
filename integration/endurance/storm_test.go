package endurance

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/probe/rogue"
	"github.com/signet-overlay/signet/integration/scenario"
)

const (
	// killEvery is the time between the start of the receiver's agent and its next death.
	killEvery = 300 * time.Millisecond
	// tunnelRate, hostRate and clearRate are packets a second, of both families: stormRate in all.
	tunnelRate = 4000
	hostRate   = 2000 // twice: by ordinary sockets and by raw ones
	clearRate  = 2000
	stormRate  = tunnelRate + 2*hostRate + clearRate
	// otherVersion is what the second build calls itself.
	otherVersion = "endurance-b"
)

// stormLength is how long agents are killed, and how often the program is replaced.
func stormLength() (kills time.Duration, swaps int) {
	if nightly() {
		return 60 * time.Second, 20
	}
	return 20 * time.Second, 6
}

// TestKillStorm kills the receiver's agent every 300 ms, and puts another build in its place again and again, while
// 10,000 forbidden packets a second come over the tunnel, from the same host and in clear. None may be delivered.
func TestKillStorm(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	d := start(ctx, t, "killstorm", bastionRule)
	builds := twoBuilds(ctx, t, d)
	witness := d.Probe(ctx, d.Data, scenario.Postgres, "witness", fmt.Sprint(forbiddenPort), "5432")
	must(t, witness.Start())
	must(t, witness.WaitFor(ctx, "witness ready"))
	other := d.Probe(ctx, d.Data, "", "witness", "7999") // the host itself, outside every workload
	must(t, other.Start())
	must(t, other.WaitFor(ctx, "witness ready"))
	before := refusals(ctx, t, d.Data)
	senders := startStorm(ctx, t, d)
	begin := time.Now()
	kills, swaps := killAndSwap(ctx, t, d, builds)
	took := time.Since(begin)
	sent := 0
	for name, s := range senders {
		select {
		case <-s.Done():
			t.Errorf("%s gave up, so the run proves less: %v", name, s.Wait())
		default:
		}
		n, refused := stormSent(s)
		t.Logf("%-22s sent %7d, of which the socket call was refused for %7d (%.0f/s)", name, n, refused, float64(n)/took.Seconds())
		if n == 0 {
			t.Errorf("%s sent nothing", name)
		}
		sent += n
	}
	after := refusals(ctx, t, d.Data)
	judged := 0
	var lines []string
	for reason, n := range after {
		if n -= before[reason]; n > 0 {
			judged += n
			lines = append(lines, fmt.Sprint(reason, " ", n))
		}
	}
	byTunnel := after["NO_RULE"] - before["NO_RULE"] + after["CT_INVALID"] - before["CT_INVALID"]
	t.Logf("%d packets came out of the tunnel while an agent lived long enough for a handshake, and were refused", byTunnel)
	delivered := forbiddenSeen(witness.Text()) + forbiddenSeen(other.Text())
	t.Logf("%d kills and %d swaps in %v; %d packets sent (%.0f/s), %d of them refused by hooks (%s), %d delivered",
		kills, swaps, took.Round(time.Millisecond), sent, float64(sent)/took.Seconds(), judged, strings.Join(lines, ", "), delivered)
	if delivered > 0 {
		t.Errorf("forbidden packets were delivered:\n%.600s\n%.600s", witness.Text(), other.Text())
	}
	// What comes while no agent reads the tunnel is lost before any hook; the rest has to be on the counters.
	if judged < sent/4 || byTunnel < 1000 || after["NO_IDENTITY"] == before["NO_IDENTITY"] || after["NOT_TUNNEL"] == before["NOT_TUNNEL"] {
		t.Errorf("too little of what was sent reached the judge: %v before, %v after", before, after)
	}
	// A fifth may be missing where the machine is loaded; the rate is part of the promise.
	if float64(sent) < 0.8*stormRate*took.Seconds() {
		t.Errorf("%d packets in %v are less than %d a second", sent, took, stormRate)
	}
	witnessWorks(ctx, t, d, witness)
}

// witnessWorks makes sure that the witness tells what it gets: a silent one would prove nothing.
func witnessWorks(ctx context.Context, t *testing.T, d *scenario.Demo, witness *netlab.Cmd) {
	t.Helper()
	must(t, d.Data.WaitConnected(ctx))
	pg, _, err := d.Data.Address(ctx, "data/postgres")
	must(t, err)
	for begin := time.Now(); ; {
		out, err := d.Probe(ctx, d.App, scenario.APIServer, "dial", "tcp", netip.AddrPortFrom(pg, 5432).String()).Output()
		if err == nil {
			break
		}
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("the allowed flow does not come back: %v: %s", err, out)
		}
	}
	if !strings.Contains(witness.Text(), "accepted ") || !strings.Contains(witness.Text(), "saw tcp") {
		t.Errorf("the witness did not see the allowed flow, so its silence proves nothing: %.600s", witness.Text())
	}
}

// forbiddenSeen counts what a witness got of the storm.
func forbiddenSeen(text string) (n int) {
	for line := range strings.Lines(text) {
		for _, sign := range []string{"tok-storm", fmt.Sprintf(":%d", forbiddenPort), ":40000 ", ":40001 "} {
			if strings.HasPrefix(line, "saw ") && strings.Contains(line+" ", sign) || strings.Contains(line, fmt.Sprint("on ", forbiddenPort)) {
				n++
				break
			}
		}
	}
	return n
}

// twoBuilds makes a second agent with another version, and returns both.
func twoBuilds(ctx context.Context, t *testing.T, d *scenario.Demo) [2]string {
	t.Helper()
	first, second := d.Bin("signetd")+".a", d.Bin("signetd")+".b"
	must(t, os.Link(d.Bin("signetd"), first))
	build := exec.CommandContext(ctx, "go", "build", "-ldflags", "-X github.com/signet-overlay/signet/internal/version.Version="+otherVersion, "-o", second, "./cmd/signetd")
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	if err != nil {
		t.Fatalf("build the other agent: %v: %s", err, out)
	}
	return [2]string{first, second}
}

// killAndSwap kills and starts the receiver's agent, and between kills puts the other build in the place of the one that
// ran, over the pins that it left. Only after a swap the agent gets the time to come up, and has to.
func killAndSwap(ctx context.Context, t *testing.T, d *scenario.Demo, builds [2]string) (kills, swaps int) {
	t.Helper()
	length, wanted := stormLength()
	restart := func() {
		must(t, d.Data.KillAgent())
		must(t, d.Data.StartAgent(ctx))
		kills++
	}
	for swaps < wanted {
		for end := time.Now().Add(length / time.Duration(wanted)); time.Now().Before(end); {
			restart()
			select {
			case <-d.Data.Proc.Done():
				t.Fatalf("the agent ended by itself: %v\n%s", d.Data.Proc.Wait(), d.Data.Proc.Text())
			case <-time.After(killEvery):
			}
		}
		swaps++
		// Another inode takes the name, as a package manager does it.
		fresh := d.Bin("signetd") + ".new"
		must(t, os.Link(builds[swaps%2], fresh))
		must(t, os.Rename(fresh, d.Bin("signetd")))
		restart()
		want := "dev"
		if swaps%2 == 1 {
			want = otherVersion
		}
		var said struct {
			Version     string `json:"version"`
			Enforcement struct {
				Healthy bool `json:"healthy"`
			} `json:"enforcement"`
		}
		for begin := time.Now(); !strings.Contains(said.Version, want) || !said.Enforcement.Healthy; {
			err := statusField(ctx, d.Data, &said)
			if time.Since(begin) > 15*time.Second {
				t.Fatalf("swap %d: the agent does not come up as %s: %+v, %v\n%s", swaps, want, said, err, d.Data.Proc.Text())
			}
		}
	}
	return kills, swaps
}

// refusals are the counters of the host's hooks, by reason.
func refusals(ctx context.Context, t *testing.T, a *scenario.Agent) map[string]int {
	t.Helper()
	must(t, a.WaitConnected(ctx))
	s, err := a.Status(ctx)
	must(t, err)
	out := map[string]int{}
	for _, c := range s.Enforcement.Counters {
		out[c.Reason] += c.Packets
	}
	return out
}

// startStorm starts every sender and returns them by name.
func startStorm(ctx context.Context, t *testing.T, d *scenario.Demo) map[string]*netlab.Cmd {
	t.Helper()
	pg, pg6, err := d.Data.Address(ctx, "data/postgres")
	must(t, err)
	api, api6, err := d.App.Address(ctx, "app/api-server")
	must(t, err)
	outsider, err := d.MakeHost(ctx, "outsider")
	must(t, err)
	must(t, outsider.Host.Command(ctx, netlab.Opts{}, "ip", "route", "add", pg.String(), "via", d.Data.Underlay.String()).Run())
	must(t, outsider.Host.Command(ctx, netlab.Opts{}, "ip", "-6", "route", "add", pg6.String(), "via", linkLocal(ctx, t, d.Data), "dev", outsider.If).Run())
	to, to6 := netip.AddrPortFrom(pg, forbiddenPort), netip.AddrPortFrom(pg6, forbiddenPort)
	out := map[string]*netlab.Cmd{
		"tunnel": startRogueAt(ctx, t, d, to, to6, tunnelRate),
		// A stranger of the same host; its raw packets say that they come from a workload that may talk.
		"same host, sockets":     d.Probe(ctx, d.Data, scenario.Stranger, "storm", "socket", fmt.Sprint(hostRate), to.String(), to6.String()),
		"same host, raw":         d.Probe(ctx, d.Data, scenario.Stranger, "storm", "raw", fmt.Sprint(hostRate), api.String(), api6.String(), to.String(), to6.String()),
		"in clear, the underlay": d.Probe(ctx, outsider, "", "storm", "raw", fmt.Sprint(clearRate), api.String(), api6.String(), to.String(), to6.String()),
	}
	for name, cmd := range out {
		if name != "tunnel" {
			must(t, cmd.Start())
		}
		must(t, cmd.WaitFor(ctx, "sent "))
	}
	return out
}

// linkLocal is the IPv6 address of the host's underlay interface.
func linkLocal(ctx context.Context, t *testing.T, a *scenario.Agent) string {
	t.Helper()
	out, err := a.Host.Command(ctx, netlab.Opts{}, "ip", "-j", "-6", "address", "show", "dev", a.If, "scope", "link").Output()
	must(t, err)
	var links []struct {
		AddrInfo []struct{ Local string } `json:"addr_info"`
	}
	must(t, json.Unmarshal([]byte(out), &links))
	for _, l := range links {
		for _, a := range l.AddrInfo {
			return a.Local
		}
	}
	t.Fatalf("%s has no link-local address: %s", a.Host.Name(), out)
	return ""
}

// startRogueAt is startRogue at another rate: it releases the bastion's own judge, stops its agent, and sends with its keys.
func startRogueAt(ctx context.Context, t *testing.T, d *scenario.Demo, to, to6 netip.AddrPort, rate int) *netlab.Cmd {
	t.Helper()
	own, own6, err := d.Edge.Address(ctx, "edge/admin-tools")
	must(t, err)
	stolen, _, err := d.App.Address(ctx, "app/api-server")
	must(t, err)
	peerKey := keyOf(ctx, t, d.Edge, scenario.DataHost)
	_, err = d.Edge.Signet(ctx, "down", "--release")
	must(t, err)
	must(t, d.Edge.StopAgent())
	config, err := json.Marshal(rogue.Config{
		StateDir: d.Edge.StateDir(), KeyFile: filepath.Join(d.Edge.Dir(), "agent.key"), Listen: 51820, PeerKey: peerKey,
		Peer: netip.AddrPortFrom(d.Data.Underlay, 51820), Own: own, Own6: own6, Stolen: stolen, Target: to, Target6: to6, Open: 5432, Rate: rate,
	})
	must(t, err)
	file := filepath.Join(d.Edge.Dir(), "storm.json")
	must(t, os.WriteFile(file, config, 0o600))
	cmd := d.Probe(ctx, d.Edge, "", "rogue", file)
	must(t, cmd.Start())
	return cmd
}

// stormSent reads the last count that a sender printed; packets whose sending was refused are among the first figure.
func stormSent(cmd *netlab.Cmd) (all, refused int) {
	for line := range strings.Lines(cmd.Text()) {
		var sent, no int
		if n, _ := fmt.Sscanf(line, "sent %d refused %d", &sent, &no); n >= 1 {
			all, refused = sent+no, no
		}
	}
	return all, refused
}
