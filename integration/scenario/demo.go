package scenario

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/signet-overlay/signet/integration/netlab"
)

// The demo's hosts and workloads.
const (
	AppHost   = "api-1"
	DataHost  = "db-1"
	EdgeHost  = "bastion-1"
	APIServer = "system.slice/api-server.service"
	Webhook   = "system.slice/webhook.service"
	Postgres  = "system.slice/postgresql.service"
	Bastion   = "system.slice/admin-tools.service"
	Stranger  = "system.slice/stranger.service" // no workload
)

// Workloads is the part of the demo's policy that declares who is who; it grants nothing.
const Workloads = `zones:
  - {name: edge}
  - {name: app}
  - {name: data}
workloads:
  - {id: app/api-server, selectors: ["unit:api-server.service"], nodes: ["api-*"]}
  - {id: app/webhook, selectors: ["unit:webhook.service"], nodes: ["api-*"]}
  - {id: data/postgres, selectors: ["unit:postgresql.service"], nodes: [db-1], serves: [tcp/5432]}
  - {id: edge/admin-tools, selectors: ["unit:admin-tools.service"], nodes: ["bastion-*"]}
`

// Rules is the rest of it.
const Rules = `rules:
  - {id: api-to-postgres, from: [app/api-server], to: [data/postgres], allow: [tcp/5432]}
  - {id: webhook-to-api, from: [app/webhook], to: [app/api-server], allow: [tcp/8080]}
tests:
  - {from: app/api-server, to: data/postgres, port: tcp/5432, expect: allow}
  - {from: app/webhook, to: data/postgres, port: tcp/5432, expect: deny}
`

// Demo is the cluster with the demo's cast.
type Demo struct {
	*Cluster
	App, Data, Edge *Agent
	PG              *netlab.Cmd
}

// StartDemo starts a coordinator and three hosts, and applies the workloads without any rule.
func StartDemo(ctx context.Context, o Options) (*Demo, error) {
	c, err := Start(ctx, o)
	if err != nil {
		return nil, err
	}
	d := &Demo{Cluster: c}
	if err := d.start(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return d, nil
}

func (d *Demo) start(ctx context.Context) (err error) {
	for _, h := range []struct {
		name string
		into **Agent
	}{{AppHost, &d.App}, {DataHost, &d.Data}, {EdgeHost, &d.Edge}} {
		if *h.into, err = d.AddHost(ctx, h.name); err != nil {
			return err
		}
	}
	for _, a := range []*Agent{d.App, d.Data, d.Edge} {
		// Units exist before the policy, as on a host where services run already.
		for _, unit := range []string{APIServer, Webhook, Postgres, Bastion, Stranger} {
			if _, err := a.Host.Cgroup(unit); err != nil {
				return err
			}
		}
		if err := a.WaitConnected(ctx); err != nil {
			return err
		}
	}
	return d.ApplyPolicy(ctx, Workloads)
}

// StartPostgres runs Debian's PostgreSQL as data/postgres, listening on every address.
func (d *Demo) StartPostgres(ctx context.Context) error {
	pg, err := user.Lookup("postgres")
	if err != nil {
		return fmt.Errorf("PostgreSQL is not installed (run deploy/setup.sh): %w", err)
	}
	uid, _ := strconv.Atoi(pg.Uid)
	gid, _ := strconv.Atoi(pg.Gid)
	dir := filepath.Join(d.Data.Dir(), "pg")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make database folder: %w", err)
	}
	if err := os.Chown(dir, uid, gid); err != nil {
		return fmt.Errorf("make database folder: %w", err)
	}
	bin, err := postgresBin()
	if err != nil {
		return err
	}
	opts := netlab.Opts{Cgroup: Postgres, UID: uid, GID: gid, Dir: dir, Env: []string{"LC_ALL=C", "PATH=/usr/bin:/bin"}}
	data := filepath.Join(dir, "data")
	if _, err := d.Data.Host.Command(ctx, opts, filepath.Join(bin, "initdb"), "-D", data, "-A", "trust", "--no-sync").Output(); err != nil {
		return fmt.Errorf("make database: %w", err)
	}
	hba := "local all all trust\nhost all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n"
	if err := os.WriteFile(filepath.Join(data, "pg_hba.conf"), []byte(hba), 0o600); err != nil {
		return fmt.Errorf("configure database: %w", err)
	}
	d.PG = d.Data.Host.Command(context.WithoutCancel(ctx), opts, filepath.Join(bin, "postgres"), "-D", data,
		"-c", "listen_addresses=*", "-c", "unix_socket_directories="+dir, "-c", "fsync=off")
	if err := d.PG.Start(); err != nil {
		return err
	}
	return d.PG.WaitFor(ctx, "ready to accept connections")
}

// postgresBin finds the server's programs: Debian keeps them below a folder of the version.
func postgresBin() (string, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(found) == 0 {
		return "", fmt.Errorf("no PostgreSQL server below /usr/lib/postgresql (run deploy/setup.sh): %w", errors.Join(err, os.ErrNotExist))
	}
	return found[len(found)-1], nil
}

// PSQL runs psql on a host, inside a cgroup, against the database.
func (d *Demo) PSQL(ctx context.Context, a *Agent, cgroup, addr, sql string) *netlab.Cmd {
	return a.Host.Command(ctx, netlab.Opts{Cgroup: cgroup, Env: []string{"LC_ALL=C", "PATH=/usr/bin:/bin", "PGCONNECT_TIMEOUT=5"}},
		"psql", "-h", addr, "-U", "postgres", "-Atc", sql)
}

// Probe runs the test client on a host, inside a cgroup.
func (c *Cluster) Probe(ctx context.Context, a *Agent, cgroup string, args ...string) *netlab.Cmd {
	return a.Host.Command(ctx, netlab.Opts{Cgroup: cgroup}, c.bin("probe"), args...)
}

// Evidence is what both ends of the demo's main flow say, for a failure that has to be understood afterwards.
func (d *Demo) Evidence(ctx context.Context) string {
	var b strings.Builder
	for _, a := range []*Agent{d.App, d.Data} {
		for _, args := range [][]string{{"peers"}, {"status"}, {"flows"}} {
			out, err := a.Signet(ctx, args...)
			fmt.Fprintf(&b, "--- %s: signet %s (%v)\n%s", a.Host.Name(), args[0], err, out)
		}
		fmt.Fprintf(&b, "--- log of %s\n%s", a.Host.Name(), tail(a.Proc.Text(), 4000))
	}
	return b.String()
}
