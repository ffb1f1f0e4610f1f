package endurance

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/probe/rogue"
	"github.com/signet-overlay/signet/integration/scenario"
)

const (
	// killFor is how long the receiver's agent is killed again and again.
	killFor = 60 * time.Second
	// backWithin is how soon the allowed flow has to deliver again in each cycle.
	backWithin = 4 * time.Second
	// rogueRate is in packets a second.
	rogueRate = 1000

	forbiddenPort = 7777
	// bastionRule makes the bastion a peer of the database's host, for another port than the one that is forbidden.
	bastionRule = "  - {id: bastion-metrics, from: [edge/admin-tools], to: [data/postgres], allow: [tcp/5433]}\n"
)

// start builds the programs and starts the demo's cluster with the rules.
func start(ctx context.Context, t *testing.T, prefix, moreRules string) *scenario.Demo {
	t.Helper()
	dir, bin := built(ctx, t, prefix)
	d, err := scenario.StartDemo(ctx, scenario.Options{Prefix: prefix, Dir: dir, Bin: bin})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("tear down: %v", err)
		}
	})
	policy := scenario.Workloads + strings.Replace(scenario.Rules, "tests:", moreRules+"tests:", 1)
	if err := d.ApplyPolicy(ctx, policy); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestKillLoop kills the receiver's agent for a minute while a rogue with valid keys, a stranger on the same host and an
// outsider in clear keep sending what is forbidden. None of it may be delivered or leave in clear, and the allowed flow
// has to come back in each cycle.
func TestKillLoop(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Minute)
	defer cancel()
	d := start(ctx, t, "killloop", bastionRule)
	if err := d.StartPostgres(ctx); err != nil {
		t.Fatal(err)
	}
	pg, pg6, err := d.Data.Address(ctx, "data/postgres")
	if err != nil {
		t.Fatal(err)
	}
	forbidden := netip.AddrPortFrom(pg, forbiddenPort)
	forbidden6 := netip.AddrPortFrom(pg6, forbiddenPort)
	var victims []*netlab.Cmd
	for _, at := range []netip.AddrPort{forbidden, forbidden6} {
		victims = append(victims, listen(ctx, t, d, "udp", at), listen(ctx, t, d, "tcp", at))
	}
	captures := map[string]*netlab.Capture{}
	for _, a := range []*scenario.Agent{d.Data, d.App, d.Edge} {
		if captures[a.Host.Name()], err = a.Host.Capture(ctx, a.If); err != nil {
			t.Fatal(err)
		}
	}
	senders := []*netlab.Cmd{startRogue(ctx, t, d, forbidden, forbidden6), startFlood(ctx, t, d, d.Data, scenario.Stranger, forbidden),
		startFlood(ctx, t, d, d.App, scenario.APIServer, forbidden),
		startFlood(ctx, t, d, d.Data, scenario.Stranger, forbidden6), startFlood(ctx, t, d, d.App, scenario.Webhook, forbidden6), startOutsider(ctx, t, d, forbidden)}
	outsider := d.Agent("outsider").Underlay

	cycles := cycle(ctx, t, d, pg)
	for _, s := range senders {
		select {
		case <-s.Done():
			t.Errorf("a forbidden sender gave up, so the run proves less: %v\n%.500s", s.Wait(), s.Text())
		default:
		}
	}
	for _, v := range victims {
		if strings.Contains(v.Text(), "got") || strings.Contains(v.Text(), "accepted") {
			t.Errorf("forbidden traffic was delivered: %.300s", v.Text())
		}
	}
	for name, capture := range captures {
		for f, n := range capture.Stop().Flows {
			// What the outsider sends in clear arrives at the device; nothing else may carry an overlay address there.
			if (overlay(f.Src) || overlay(f.Dst)) && f.Src != outsider {
				t.Errorf("%s: %d packets in clear: %v", name, n, f)
			}
		}
	}
	sent := rogueSent(senders[0])
	status, err := d.Data.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	// Only what came out of the tunnel is refused for want of a rule here: the other senders are refused elsewhere or
	// for other reasons. So this is what reached the judge of the rogue's.
	judged := status.Denied("NO_RULE") + status.Denied("CT_INVALID")
	t.Logf("%d kills in %v; the rogue sent %d packets, %d of them reached the judge; none was delivered", cycles, killFor, sent, judged)
	if judged < sent/20 || status.Denied("NO_IDENTITY") == 0 || status.Denied("NOT_TUNNEL") == 0 {
		t.Errorf("too little of what was sent reached the judge: %+v", status.Enforcement.Counters)
	}
	// A fifth may be missing where the machine is loaded; the rate is part of the promise.
	if cycles < 10 || sent < rogueRate*int(killFor.Seconds())*8/10 {
		t.Errorf("%d cycles and %d rogue packets are too few to prove anything", cycles, sent)
	}
}

// overlay reports whether an address lies in the default overlay ranges.
func overlay(a netip.Addr) bool {
	return netip.MustParsePrefix("198.18.0.0/15").Contains(a) || a.Is6() && a.IsPrivate()
}

// cycle kills and restarts the receiver's agent until the time is over, and returns how often.
func cycle(ctx context.Context, t *testing.T, d *scenario.Demo, pg netip.Addr) int {
	t.Helper()
	n := 0
	for begin := time.Now(); time.Since(begin) < killFor; n++ {
		if err := d.Data.KillAgent(); err != nil {
			t.Fatal(err)
		}
		if err := d.Data.StartAgent(ctx); err != nil {
			t.Fatal(err)
		}
		started, back := time.Now(), false
		for !back && time.Since(started) < backWithin {
			limited, cancel := context.WithTimeout(ctx, time.Second)
			_, err := d.PSQL(limited, d.App, scenario.APIServer, pg.String(), "select 1").Output()
			cancel()
			back = err == nil
		}
		if !back {
			t.Fatalf("cycle %d: the allowed flow did not deliver within %v\n%s", n, backWithin, d.Data.Proc.Text())
		}
	}
	return n
}

func listen(ctx context.Context, t *testing.T, d *scenario.Demo, network string, at netip.AddrPort) *netlab.Cmd {
	t.Helper()
	cmd := d.Probe(ctx, d.Data, scenario.Postgres, "serve", network, at.String())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.WaitFor(ctx, "serving"); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// startFlood sends datagrams that the policy forbids; where the hooks refuse the send itself, it tries again at once.
func startFlood(ctx context.Context, t *testing.T, d *scenario.Demo, a *scenario.Agent, cgroup string, to netip.AddrPort) *netlab.Cmd {
	t.Helper()
	cmd := d.Probe(ctx, a, cgroup, "flood", "udp", to.String(), "1ms")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// startOutsider sends in clear from a host of the underlay that is not in the mesh.
func startOutsider(ctx context.Context, t *testing.T, d *scenario.Demo, to netip.AddrPort) *netlab.Cmd {
	t.Helper()
	outsider, err := d.MakeHost(ctx, "outsider")
	if err != nil {
		t.Fatal(err)
	}
	route := outsider.Host.Command(ctx, netlab.Opts{}, "ip", "route", "add", to.Addr().String(), "via", d.Data.Underlay.String())
	if err := route.Run(); err != nil {
		t.Fatal(err)
	}
	return startFlood(ctx, t, d, outsider, "", to)
}

// startRogue releases the bastion's own judge, stops its agent, and sends with its keys.
func startRogue(ctx context.Context, t *testing.T, d *scenario.Demo, forbidden, forbidden6 netip.AddrPort) *netlab.Cmd {
	t.Helper()
	own, own6, err := d.Edge.Address(ctx, "edge/admin-tools")
	if err != nil {
		t.Fatal(err)
	}
	stolen, _, err := d.App.Address(ctx, "app/api-server")
	if err != nil {
		t.Fatal(err)
	}
	peerKey := keyOf(ctx, t, d.Edge, scenario.DataHost)
	if out, err := d.Edge.Signet(ctx, "down", "--release"); err != nil {
		t.Fatalf("release the bastion: %v: %s", err, out)
	}
	if err := d.Edge.StopAgent(); err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(rogue.Config{
		StateDir: d.Edge.StateDir(), KeyFile: filepath.Join(d.Edge.Dir(), "agent.key"), Listen: 51820, PeerKey: peerKey,
		Peer: netip.AddrPortFrom(d.Data.Underlay, 51820), Own: own, Own6: own6, Stolen: stolen,
		Target: forbidden, Target6: forbidden6, Open: 5432, Rate: rogueRate,
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(d.Edge.Dir(), "rogue.json")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := d.Probe(ctx, d.Edge, "", "rogue", file)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.WaitFor(ctx, "rogue as"); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// keyOf is the WireGuard key of a peer, in hex, as the agent knows it.
func keyOf(ctx context.Context, t *testing.T, a *scenario.Agent, node string) string {
	t.Helper()
	out, err := a.Signet(ctx, "peers", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var peers []struct{ Node, Key string }
	if err := json.Unmarshal([]byte(out), &peers); err != nil {
		var wrapped struct {
			Peers []struct{ Node, Key string } `json:"peers"`
		}
		if err := json.Unmarshal([]byte(out), &wrapped); err != nil {
			t.Fatalf("peers: %v: %s", err, out)
		}
		peers = wrapped.Peers
	}
	for _, p := range peers {
		if p.Node == node {
			raw, err := base64.StdEncoding.DecodeString(p.Key)
			if err != nil {
				t.Fatal(err)
			}
			return fmt.Sprintf("%x", raw)
		}
	}
	t.Fatalf("%s has no peer %s: %s", a.Host.Name(), node, out)
	return ""
}

func rogueSent(cmd *netlab.Cmd) int {
	n := 0
	for line := range strings.Lines(cmd.Text()) {
		_, _ = fmt.Sscanf(line, "sent %d", &n)
	}
	return n
}
