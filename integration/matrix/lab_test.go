package matrix

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/probe/attack"
	"github.com/signet-overlay/signet/integration/scenario"
)

// Cgroups that the demo does not have, and the rights of the attackers.
const (
	batch   = "system.slice/batch.service"  // a workload of the application's host that no rule names
	backup  = "system.slice/backup.service" // a workload of the database's host that no rule names
	uidBody = 65534                         // nobody
	tunnel  = "signet0"                     // the tunnel's device
	tableID = "51"                          // routing table that marked packets use
	mark    = 0x51                          // of those packets
	patient = 5 * time.Second               // bound of every wait for something that has to happen
)

// Ports. What is allowed on the first is allowed on all but the last, which differ in who listens there.
const (
	portRemote   = 5432 // of the database, for app/api-server
	portEdge     = 5433 // of the database, for the rogue
	portClosed   = 5434 // of the database, for app/api-server; nobody listens
	portTaken    = 5435 // of both; an attacker listens
	portShared   = 5436 // of both; an attacker shares it
	portLocal    = 8080 // of app/api-server, for app/webhook
	portUnlisted = 7777 // no rule names it
)

// document is the policy: what each lane needs, and nothing for batch, backup and strangers.
func document() string {
	ports := func(first ...int) string {
		var out []string
		for _, p := range append(first, portClosed, portTaken, portShared) {
			out = append(out, fmt.Sprintf("tcp/%d, udp/%d", p, p))
		}
		return strings.Join(append(out, "icmp"), ", ")
	}
	more := "  - {id: app/batch, selectors: [\"unit:batch.service\"], nodes: [\"api-*\"]}\n" +
		"  - {id: data/backup, selectors: [\"unit:backup.service\"], nodes: [db-1]}\n"
	return scenario.Workloads + more + "rules:\n" +
		"  - {id: api-to-postgres, from: [app/api-server], to: [data/postgres], allow: [" + ports(portRemote) + "]}\n" +
		"  - {id: webhook-to-api, from: [app/webhook], to: [app/api-server], allow: [" + ports(portLocal) + "]}\n" +
		fmt.Sprintf("  - {id: edge-to-postgres, from: [edge/admin-tools], to: [data/postgres], allow: [tcp/%d, udp/%d, icmp]}\n", portEdge, portEdge)
}

// pair is a workload's two addresses.
type pair struct{ v4, v6 netip.Addr }

func (p pair) of(family string) netip.Addr {
	if family == "v6" {
		return p.v6
	}
	return p.v4
}

// lab is the cluster with its witnesses and records.
type lab struct {
	*scenario.Demo
	ctx                                       context.Context
	api, hook, batch, pg, backup, edge, under pair                   // under is the database host's underlay
	sees                                      map[string]*netlab.Cmd // witnesses by cgroup
	tallies                                   map[string]*tally      // by host
	records                                   map[string]*journal
	outsider                                  *scenario.Agent
	hands                                     map[string]*hand
	script                                    *rogueHost
	dataMAC                                   []byte
	captures                                  map[string]*netlab.Capture
}

func startLab(ctx context.Context, t *testing.T) *lab {
	t.Helper()
	scenario.NeedLab(t)
	dir, err := os.MkdirTemp("", "signet-matrix-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bin := filepath.Join(dir, "bin")
	// Attackers without rights run the programs, too.
	must(t, os.Chmod(dir, 0o755))
	must(t, os.Mkdir(bin, 0o755))
	must(t, scenario.Build(ctx, "../..", bin))
	d, err := scenario.StartDemo(ctx, scenario.Options{Prefix: "matrix", Dir: dir, Bin: bin})
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{Demo: d, ctx: ctx, sees: map[string]*netlab.Cmd{}, tallies: map[string]*tally{}, records: map[string]*journal{},
		captures: map[string]*netlab.Capture{}, hands: map[string]*hand{}}
	t.Cleanup(func() {
		for _, h := range l.hands {
			h.lines.Close() // ends the process
		}
		if t.Failed() {
			t.Logf("%.6000s", d.Evidence(context.WithoutCancel(ctx)))
		}
		if err := d.Close(); err != nil {
			t.Errorf("tear down: %v", err)
		}
	})
	l.prepare(t)
	return l
}

// prepare makes the hosts as careless as hosts are: they forward, they accept what claims to be local, and marked
// packets have a route of their own to the underlay.
func (l *lab) prepare(t *testing.T) {
	t.Helper()
	for _, unit := range []string{batch, backup} {
		for _, a := range []*scenario.Agent{l.App, l.Data} {
			_, err := a.Host.Cgroup(unit)
			must(t, err)
		}
	}
	must(t, l.ApplyPolicy(l.ctx, document()))
	l.learn(t)
	for _, a := range []*scenario.Agent{l.App, l.Data} {
		for _, s := range []string{"net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf." + a.If + ".rp_filter=0",
			"net.ipv4.ping_group_range=0 2147483647",
			"net.ipv4.conf.all.accept_local=1", "net.ipv4.conf.lo.accept_local=1", "net.ipv4.conf.all.route_localnet=1",
			"net.ipv4.conf.all.accept_source_route=1", "net.ipv4.conf." + a.If + ".accept_source_route=1", "net.ipv4.conf." + tunnel + ".accept_source_route=1",
			"net.ipv6.conf.all.seg6_enabled=1", "net.ipv6.conf." + a.If + ".seg6_enabled=1", "net.ipv6.conf." + tunnel + ".seg6_enabled=1", "net.ipv6.conf.lo.seg6_enabled=1"} {
			l.must(t, a, "sysctl", "-qw", s)
		}
		l.tallies[a.Host.Name()] = openTally(t, a)
		l.records[a.Host.Name()] = l.follow(t, a)
	}
	for _, family := range []string{"-4", "-6"} {
		prefix := map[string]string{"-4": "198.18.0.0/15", "-6": netip.PrefixFrom(l.api.v6, 48).Masked().String()}[family]
		l.must(t, l.App, "ip", family, "rule", "add", "fwmark", fmt.Sprint(mark), "lookup", tableID)
		l.must(t, l.App, "ip", family, "route", "add", prefix, "dev", l.App.If, "table", tableID)
	}
	l.must(t, l.App, "ip", "-6", "route", "add", "default", "dev", l.App.If, "metric", "5000")
	var err error
	l.outsider, err = l.MakeHost(l.ctx, "outsider")
	must(t, err)
	l.watch(t, l.App, scenario.APIServer, portLocal)
	l.watch(t, l.Data, scenario.Postgres, portRemote, portEdge)
	l.watch(t, l.Data, backup, portUnlisted)
	l.script = startScript(t, l)
	for _, a := range []*scenario.Agent{l.App, l.Data} {
		l.captures[a.Host.Name()], err = a.Host.Capture(l.ctx, a.If)
		must(t, err)
	}
}

// learn asks for the addresses.
func (l *lab) learn(t *testing.T) {
	t.Helper()
	for _, w := range []struct {
		a    *scenario.Agent
		id   string
		into *pair
	}{{l.App, "app/api-server", &l.api}, {l.App, "app/webhook", &l.hook}, {l.App, "app/batch", &l.batch},
		{l.Data, "data/postgres", &l.pg}, {l.Data, "data/backup", &l.backup}, {l.Edge, "edge/admin-tools", &l.edge}} {
		var err error
		w.into.v4, w.into.v6, err = w.a.Address(l.ctx, w.id)
		must(t, err)
	}
	l.under.v4 = l.Data.Underlay
	out, err := l.Data.Host.Command(l.ctx, netlab.Opts{}, "ip", "-j", "address", "show", "dev", l.Data.If).Output()
	must(t, err)
	var links []struct {
		Address  string
		AddrInfo []struct{ Family, Local string } `json:"addr_info"`
	}
	must(t, json.Unmarshal([]byte(out), &links))
	for _, part := range strings.Split(links[0].Address, ":") {
		var b byte
		_, err := fmt.Sscanf(part, "%02x", &b)
		must(t, err)
		l.dataMAC = append(l.dataMAC, b)
	}
	for _, a := range links[0].AddrInfo {
		if a.Family == "inet6" {
			l.under.v6 = netip.MustParseAddr(a.Local)
		}
	}
}

// must runs a command as the host itself.
func (l *lab) must(t *testing.T, a *scenario.Agent, name string, args ...string) {
	t.Helper()
	_, err := a.Host.Command(l.ctx, netlab.Opts{}, name, args...).Output()
	must(t, err)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// watch starts a witness in a workload.
func (l *lab) watch(t *testing.T, a *scenario.Agent, cgroup string, ports ...int) {
	t.Helper()
	args := []string{"witness"}
	for _, p := range ports {
		args = append(args, fmt.Sprint(p))
	}
	cmd := l.Probe(l.ctx, a, cgroup, args...)
	must(t, cmd.Start())
	must(t, cmd.WaitFor(l.ctx, "witness ready"))
	l.sees[cgroup] = cmd
}

// hand is a process that runs attacks one after the other.
type hand struct {
	cmd   *netlab.Cmd
	lines io.WriteCloser
}

// attack runs one attack to its end and returns what it told. Whoever is the same attacker uses the same process.
func (l *lab) attack(t *testing.T, a *scenario.Agent, o netlab.Opts, s attack.Spec) string {
	t.Helper()
	who := fmt.Sprint(a.Host.Name(), " ", o.Cgroup, " ", o.UID)
	if l.hands[who] == nil {
		in, lines := io.Pipe()
		o.Stdin, o.GID = in, o.UID
		h := &hand{cmd: a.Host.Command(l.ctx, o, l.Bin("probe"), "attack", "-"), lines: lines}
		must(t, h.cmd.Start())
		l.hands[who] = h
	}
	return l.hands[who].run(t, s)
}

// run hands over one attack and waits for its end.
func (h *hand) run(t *testing.T, s attack.Spec) string {
	t.Helper()
	text, err := json.Marshal(s)
	must(t, err)
	begin := len(h.cmd.Text())
	_, err = fmt.Fprintf(h.lines, "%s\n", text)
	must(t, err)
	said := ""
	if !until(patient, func() bool { said = h.cmd.Text()[begin:]; return strings.HasSuffix(said, "end\n") }) || strings.Contains(said, "failed ") {
		t.Errorf("the attack could not be tried: %s", said)
	}
	return said
}

func (l *lab) prepareAttack(t *testing.T, a *scenario.Agent, o netlab.Opts, s attack.Spec) *netlab.Cmd {
	t.Helper()
	text, err := json.Marshal(s)
	must(t, err)
	o.GID = o.UID
	return a.Host.Command(l.ctx, o, l.Bin("probe"), "attack", string(text))
}

// journal is what a host records, as it comes.
type journal struct {
	mu  sync.Mutex
	all []record
	buf bytes.Buffer
}

// record is what a row needs of a flow record.
type record struct {
	Time     time.Time
	Verdict  string
	Reason   string
	Src, Dst struct {
		ID   string
		IP   netip.Addr
		Port uint16
	}
	Proto string
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.buf.Write(b)
	for {
		line, err := j.buf.ReadBytes('\n')
		if err != nil {
			j.buf.Write(line) // the rest of it comes with the next write
			return len(b), nil
		}
		var r record
		if json.Unmarshal(line, &r) == nil {
			j.all = append(j.all, r)
		}
	}
}

// list is what was recorded so far.
func (j *journal) list() []record {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.all[:len(j.all):len(j.all)]
}

// follow reads a host's denials as people do.
func (l *lab) follow(t *testing.T, a *scenario.Agent) *journal {
	t.Helper()
	j := &journal{}
	cmd := a.Host.Command(l.ctx, netlab.Opts{Stdout: j}, l.Bin("signet"), "--socket", a.Socket(), "flows", "-f", "--verdict", "deny", "-o", "jsonl")
	must(t, cmd.Start())
	return j
}

// until polls: what the kernel and the programs under test do cannot be waited for otherwise.
func until(limit time.Duration, ok func() bool) bool {
	deadline := time.Now().Add(limit)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			return false
		}
		<-tick.C
	}
	return true
}
