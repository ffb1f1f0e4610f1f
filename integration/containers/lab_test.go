package containers

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/scenario"
)

const (
	worker  = "system.slice/worker.service"
	patient = 10 * time.Second // bound of every wait for something that has to happen
	prompt  = 2 * time.Second  // of what the agent promises within one second, on a loaded machine
)

// document is the policy: web is a container by its label, cache one by its device, worker a unit of the same host.
const document = `zones: [{name: app}, {name: data}]
workloads:
  - {id: app/web, selectors: ["container:com.example.app=web"], nodes: [api-1]}
  - {id: app/cache, selectors: ["interface:vcache"], nodes: [api-1]}
  - {id: app/worker, selectors: ["unit:worker.service"], nodes: [api-1]}
  - {id: data/postgres, selectors: ["unit:postgresql.service"], nodes: [db-1]}
rules:
  - {id: web-to-postgres, from: [app/web], to: [data/postgres], allow: [tcp/5432]}
  - {id: postgres-to-web, from: [data/postgres], to: [app/web], allow: [tcp/8080]}
  - {id: postgres-to-cache, from: [data/postgres], to: [app/cache], allow: [tcp/8080]}
  - {id: worker-to-web, from: [app/worker], to: [app/web], allow: [tcp/8080]}
  - {id: web-to-worker, from: [app/web], to: [app/worker], allow: [tcp/8080]}
  - {id: web-to-cache, from: [app/web], to: [app/cache], allow: [tcp/8080]}
  - {id: cache-to-worker, from: [app/cache], to: [app/worker], allow: [tcp/8080]}
`

// pair is a workload's two addresses.
type pair struct{ v4, v6 netip.Addr }

func (p pair) all() []netip.Addr { return []netip.Addr{p.v4, p.v6} }

// lab is the cluster and its containers.
type lab struct {
	*scenario.Demo
	t                      *testing.T
	ctx                    context.Context
	web, cache, nobody     *box
	webAt, cacheAt, workAt pair
	pgAt                   pair
}

// box is a container on the application's host.
type box struct {
	l      *lab
	space  *netlab.Host // whose network namespace it is; its cgroups are not used
	id     string
	cgroup string
	veth   string // on the host
	mac    byte
}

// newLab starts two hosts, the database and the containers.
func newLab(ctx context.Context, t *testing.T) *lab {
	t.Helper()
	scenario.NeedLab(t)
	dir, err := os.MkdirTemp("", "signet-containers-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755)) // the database runs as a user of its own
	bin := filepath.Join(dir, "bin")
	must(t, os.Mkdir(bin, 0o755))
	must(t, scenario.Build(ctx, "../..", bin))
	c, err := scenario.Start(ctx, scenario.Options{Prefix: "containers", Dir: dir, Bin: bin})
	must(t, err)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("tear down: %v", err)
		}
	})
	l := &lab{Demo: &scenario.Demo{Cluster: c}, t: t, ctx: ctx}
	l.App, l.Data = l.host("api-1"), l.host("db-1")
	for a, unit := range map[*scenario.Agent]string{l.App: worker, l.Data: scenario.Postgres} {
		_, err := a.Host.Cgroup(unit)
		must(t, err)
		must(t, a.WaitConnected(ctx))
	}
	must(t, c.ApplyPolicy(ctx, document))
	must(t, l.StartPostgres(ctx))
	l.webAt, l.cacheAt, l.workAt, l.pgAt = l.address(l.App, "web"), l.address(l.App, "cache"), l.address(l.App, "worker"), l.address(l.Data, "postgres")
	l.web, l.cache, l.nobody = l.box("web", 1), l.box("cache", 2), l.box("nobody", 3)
	return l
}

// host is one whose agent reads Docker's state from a folder of the test.
func (l *lab) host(name string) *scenario.Agent {
	l.t.Helper()
	a, err := l.MakeHost(l.ctx, name)
	must(l.t, err)
	f, err := os.OpenFile(a.Config(), os.O_APPEND|os.O_WRONLY, 0)
	must(l.t, err)
	_, err = fmt.Fprintf(f, "container_state: {docker: %s}\n", l.dockerDir())
	must(l.t, err)
	must(l.t, f.Close())
	must(l.t, a.WriteToken(l.ctx))
	must(l.t, a.StartAgent(l.ctx))
	return a
}

func (l *lab) dockerDir() string { return filepath.Join(l.Dir(), "docker") }

func (l *lab) address(a *scenario.Agent, workload string) pair {
	l.t.Helper()
	v4, v6, err := a.Address(l.ctx, workload)
	must(l.t, err)
	return pair{v4, v6}
}

// box makes a container's namespace, with a veth of which the host's end has the gateway's addresses.
func (l *lab) box(name string, mac byte) *box {
	l.t.Helper()
	space, err := l.Lab.Host(l.ctx, "box-"+name)
	must(l.t, err)
	sum := sha256.Sum256([]byte(name))
	b := &box{l: l, space: space, id: hex.EncodeToString(sum[:]), veth: "v" + name, mac: mac}
	b.cgroup = "system.slice/docker-" + b.id + ".scope"
	b.plug()
	return b
}

// plug is what docs/containers.md says to do on the host.
func (b *box) plug() {
	b.host("ip link add %s address 02:53:00:00:01:%02x type veth peer name ovl0 address 02:53:00:00:02:%02x netns %s", b.veth, b.mac, b.mac, filepath.Base(b.space.NetNS()))
	b.host("ip addr add 169.254.1.1/32 dev %s", b.veth)
	b.host("ip addr add fe80::1/64 dev %s nodad", b.veth)
	b.host("ip link set %s up", b.veth)
}

// configure is what docs/containers.md says to do inside, and for IPv6 once more on the host.
func (b *box) configure(at pair) {
	b.inside("ip link set ovl0 mtu 1420 up")
	b.inside("ip addr add %s/32 dev ovl0", at.v4)
	b.inside("ip addr add %s/128 dev ovl0 nodad", at.v6)
	b.inside("ip route add 169.254.1.1 dev ovl0 scope link")
	b.inside("ip route add default via 169.254.1.1 dev ovl0 src %s", at.v4)
	b.inside("ip -6 neigh add fe80::1 lladdr 02:53:00:00:01:%02x dev ovl0 nud permanent", b.mac)
	b.inside("ip -6 route add default via fe80::1 dev ovl0 src %s", at.v6)
	b.host("ip -6 neigh replace %s lladdr 02:53:00:00:02:%02x dev %s nud permanent", at.v6, b.mac, b.veth)
}

func (b *box) host(format string, args ...any) string { return run(b.l, b.l.App.Host, format, args...) }
func (b *box) inside(format string, args ...any) string {
	return run(b.l, b.space, format, args...)
}

func run(l *lab, h *netlab.Host, format string, args ...any) string {
	l.t.Helper()
	words := strings.Fields(fmt.Sprintf(format, args...))
	out, err := h.Command(l.ctx, netlab.Opts{}, words[0], words[1:]...).Output()
	if err != nil {
		l.t.Fatalf("%s: %v\n%s", strings.Join(words, " "), err, out)
	}
	return out
}

// exec runs a program in the container: in its cgroup, below the host's, and its namespace.
func (b *box) exec(ctx context.Context, program string, args ...string) *netlab.Cmd {
	all := append([]string{"--net=" + b.space.NetNS(), "--", program}, args...)
	env := []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "PGCONNECT_TIMEOUT=3"}
	return b.l.App.Host.Command(ctx, netlab.Opts{Cgroup: b.cgroup, Env: env}, "nsenter", all...)
}

func (b *box) probe(ctx context.Context, args ...string) *netlab.Cmd {
	return b.exec(ctx, b.l.Bin("probe"), args...)
}

// docker writes what Docker keeps of a running container.
func (b *box) docker(pid int, labels map[string]string) {
	b.l.t.Helper()
	dir := filepath.Join(b.l.dockerDir(), "containers", b.id)
	must(b.l.t, os.MkdirAll(dir, 0o755))
	data, err := json.Marshal(map[string]any{"ID": b.id, "State": map[string]any{"Running": true, "Pid": pid}, "Config": map[string]any{"Labels": labels}})
	must(b.l.t, err)
	must(b.l.t, os.WriteFile(filepath.Join(dir, "config.v2.json"), data, 0o600))
}

// serve starts a server and waits until it listens.
func serve(l *lab, c *netlab.Cmd) {
	l.t.Helper()
	must(l.t, c.Start())
	ctx, cancel := context.WithTimeout(l.ctx, patient)
	defer cancel()
	must(l.t, c.WaitFor(ctx, "serving"))
}

// workload is what the application's agent says of one of its workloads.
type workload struct {
	ID      string   `json:"id"`
	Matched bool     `json:"matched"`
	Cgroups []string `json:"cgroups"`
	Why     string   `json:"why"`
}

func (l *lab) workload(name string) workload {
	l.t.Helper()
	out, err := l.App.Signet(l.ctx, "workloads", "-o", "json")
	must(l.t, err)
	var all []workload
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		l.t.Fatalf("signet workloads printed %s: %v", out, err)
	}
	for _, w := range all {
		if strings.HasSuffix(w.ID, "/app/"+name) {
			return w
		}
	}
	l.t.Fatalf("no workload %s in %s", name, out)
	return workload{}
}

// await waits until a workload is as it should be, and returns how long that took.
func (l *lab) await(name string, within time.Duration, ok func(workload) bool) time.Duration {
	l.t.Helper()
	began := time.Now()
	for {
		w := l.workload(name)
		if ok(w) {
			return time.Since(began)
		}
		if time.Since(began) > within {
			l.t.Fatalf("after %v %s is %+v\n%s", within, name, w, l.App.Proc.Text())
		}
		select {
		case <-l.ctx.Done():
			l.t.Fatal(l.ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func matched(w workload) bool { return w.Matched }

// denied is how often the host's judge refused for a reason.
func (l *lab) denied(reason string) int {
	l.t.Helper()
	s, err := l.App.Status(l.ctx)
	must(l.t, err)
	return s.Denied(reason)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
