package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/scenario"
)

func (c *checker) explain(ctx context.Context) error {
	var got struct {
		Verdict, Code, Remedy string
		Nearest               []struct{ Rule string }
	}
	out, err := c.d.Admin(ctx, "explain", "--from", "app/webhook", "--to", "data/postgres", "--port", "tcp/5432")
	if err != nil || !strings.Contains(out, "DENY") || !strings.Contains(out, "NO_RULE") || !strings.Contains(out, "api-to-postgres") {
		return fmt.Errorf("explain ended with %w and says: %s", err, out)
	}
	if err := c.d.AdminJSON(ctx, &got, "explain", "--from", "app/api-server", "--to", "data/postgres", "--port", "tcp/5432"); err != nil {
		return err
	}
	if got.Verdict != "allow" || got.Code != "POLICY_ALLOW" {
		return fmt.Errorf("explain of the allowed flow says %+v", got)
	}
	return nil
}

func (c *checker) badDocuments(ctx context.Context) error {
	before, err := c.revision(ctx)
	if err != nil {
		return err
	}
	for want, doc := range map[string]string{
		"expect":        strings.Replace(scenario.Workloads+scenario.Rules, "app/webhook, to: data/postgres, port: tcp/5432, expect: deny", "app/webhook, to: data/postgres, port: tcp/5432, expect: allow", 1),
		"seleectors":    strings.Replace(scenario.Workloads, "selectors", "seleectors", 1),
		"app/nobody":    scenario.Workloads + "rules:\n  - {id: r, from: [app/nobody], to: [data/postgres], allow: [any]}\n",
		"not built yet": scenario.Workloads + "rules:\n  - {id: r, from: [app/webhook], to: [data/postgres], allow: [any], when: 'true'}\n",
	} {
		file := filepath.Join(c.d.Dir(), "bad.yaml")
		if err := os.WriteFile(file, []byte(doc), 0o600); err != nil {
			return fmt.Errorf("write document: %w", err)
		}
		out, err := c.d.Admin(ctx, "policy", "apply", file)
		if err == nil || !strings.Contains(out, want) {
			return fmt.Errorf("a document with a bad %q was answered with %w: %s", want, err, out)
		}
	}
	after, err := c.revision(ctx)
	if err != nil {
		return err
	}
	if before != after {
		return fmt.Errorf("the policy revision went from %d to %d", before, after)
	}
	return nil
}

// revision is what the app host has applied.
func (c *checker) revision(ctx context.Context) (uint64, error) {
	s, err := c.d.App.Status(ctx)
	return s.Revision, err
}

func (c *checker) rollback(ctx context.Context) error {
	before, err := c.revision(ctx)
	if err != nil {
		return err
	}
	if _, err := c.d.Admin(ctx, "policy", "rollback", "1", "--wait"); err != nil {
		return err
	}
	if after, err := c.revision(ctx); err != nil || after != before+1 {
		return fmt.Errorf("revision %d after %d, %w", after, before, err)
	}
	if out, err := c.dial(ctx, c.d.App, scenario.APIServer, "tcp", netip.AddrPortFrom(c.pg4, 5432)); err == nil {
		return fmt.Errorf("the rolled-back policy has no rule, and yet: %s", out)
	}
	if err := c.allowAgain(ctx); err != nil {
		return err
	}
	out, err := c.d.Admin(ctx, "policy", "history")
	if err != nil {
		return err
	}
	if n := strings.Count(strings.TrimSpace(out), "\n"); n < int(before)+2 {
		return fmt.Errorf("history has %d lines: %s", n, out)
	}
	return nil
}

// allowAgain applies the demo's rules and makes sure that they work.
func (c *checker) allowAgain(ctx context.Context) error {
	if err := c.d.ApplyPolicy(ctx, scenario.Workloads+scenario.Rules); err != nil {
		return err
	}
	return eventually(ctx, 5*time.Second, func() error {
		_, err := c.d.PSQL(ctx, c.d.App, scenario.APIServer, c.pg4.String(), "select 1").Output()
		return err
	})
}

// watchPSQL is a psql session that asks the time twenty times a second.
func (c *checker) watchPSQL(ctx context.Context) (*netlab.Cmd, error) {
	cmd := c.d.App.Host.Command(ctx, netlab.Opts{Cgroup: scenario.APIServer, Env: []string{"LC_ALL=C", "PATH=/usr/bin:/bin"},
		Stdin: strings.NewReader("select 'tick' \\watch 0.05\n")}, "psql", "-h", c.pg4.String(), "-U", "postgres", "-At")
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return cmd, cmd.WaitFor(ctx, "tick")
}

// streamPSQL is a session in which the server goes on sending by itself, so that its own host has to stop it.
func (c *checker) streamPSQL(ctx context.Context) (*netlab.Cmd, error) {
	cmd := c.d.App.Host.Command(ctx, netlab.Opts{Cgroup: scenario.APIServer, Env: []string{"LC_ALL=C", "PATH=/usr/bin:/bin"}}, "psql", "-h", c.pg4.String(),
		"-U", "postgres", "-Atc", "copy (select repeat('tick', 500), pg_sleep(0.01) from generate_series(1, 6000)) to stdout")
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return cmd, cmd.WaitFor(ctx, "tick")
}

// within is how soon a decision that is taken back has to count, from the moment that the operator gives it.
const within = time.Second

// silentAfter changes something and asserts that live sessions, one driven by the client and one by the server, then have
// no packet on either tunnel device in either direction. The clock starts before the command that makes the change.
func (c *checker) silentAfter(ctx context.Context, change func() error) error {
	session, err := c.watchPSQL(ctx)
	if err != nil {
		return err
	}
	defer stop(session)
	pushed, err := c.streamPSQL(ctx)
	if err != nil {
		return err
	}
	defer stop(pushed)
	captures := map[string]*netlab.Capture{}
	for _, a := range []*scenario.Agent{c.d.App, c.d.Data} {
		if captures[a.Host.Name()], err = a.Host.Capture(ctx, "signet0"); err != nil {
			return err
		}
	}
	// Some traffic first: silence proves nothing where nobody spoke.
	if err := pause(ctx, 300*time.Millisecond); err != nil {
		return err
	}
	start := time.Now()
	if err := change(); err != nil {
		return err
	}
	// Sockets go on retransmitting; what of it passes a judge is on record.
	if err := pause(ctx, time.Until(start.Add(within+2*time.Second))); err != nil {
		return err
	}
	for name, capture := range captures {
		if err := silent(capture.Stop(), start); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// silent looks for packets of the database's flows after the limit, in both directions.
func silent(rec *netlab.Recording, start time.Time) error {
	var before [2]int
	for _, p := range rec.Packets {
		if !p.Flow.HasPort(6, 5432) {
			continue
		}
		toServer := 0
		if p.Flow.DstPort == 5432 {
			toServer = 1
		}
		if p.Time.Before(start) {
			before[toServer]++
		}
		if late := p.Time.Sub(start); late > within {
			return fmt.Errorf("a packet %v after the change: %v", late, p.Flow)
		}
	}
	if before[0] == 0 || before[1] == 0 || rec.Unkept > 0 || rec.Lost > 0 {
		return fmt.Errorf("%d packets from and %d to the server before the change, %d not kept, %d lost: this proves nothing", before[0], before[1], rec.Unkept, rec.Lost)
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *checker) ruleRemoved(ctx context.Context) error {
	without := strings.Replace(scenario.Workloads+scenario.Rules, "  - {id: api-to-postgres, from: [app/api-server], to: [data/postgres], allow: [tcp/5432]}\n", "", 1)
	without = without[:strings.Index(without, "tests:")]
	if err := c.silentAfter(ctx, func() error { return c.d.ApplyPolicy(ctx, without) }); err != nil {
		return err
	}
	return c.allowAgain(ctx)
}

func (c *checker) revoke(ctx context.Context) error {
	change := func() error {
		_, err := c.d.Admin(ctx, "workload", "revoke", "app/api-server", "--node", scenario.AppHost)
		return err
	}
	if err := c.silentAfter(ctx, change); err != nil {
		return err
	}
	if _, err := refused(ctx, c.d.PSQL(ctx, c.d.App, scenario.APIServer, c.pg4.String(), "select 1"), 5*time.Second); err != nil {
		return err
	}
	out, err := c.d.Admin(ctx, "workload", "list")
	if err != nil || !strings.Contains(out, "revoked") {
		return fmt.Errorf("workload list does not show the revocation: %w: %s", err, out)
	}
	// A revocation is undone by taking the workload out of the policy and placing it anew.
	withoutAPI := "zones: [{name: data}]\nworkloads:\n  - {id: data/postgres, selectors: [\"unit:postgresql.service\"], nodes: [db-1]}\n"
	if err := c.d.ApplyPolicy(ctx, withoutAPI); err != nil {
		return err
	}
	if err := c.d.ApplyPolicy(ctx, scenario.Workloads+scenario.Rules); err != nil {
		return err
	}
	if c.api4, c.api6, err = c.d.App.Address(ctx, "app/api-server"); err != nil {
		return err
	}
	if c.hook4, _, err = c.d.App.Address(ctx, "app/webhook"); err != nil {
		return err
	}
	return c.allowAgain(ctx)
}

func (c *checker) badTokens(ctx context.Context) error {
	h, err := c.d.MakeHost(ctx, "newcomer")
	if err != nil {
		return err
	}
	good, err := c.d.Token(ctx, "other-name")
	if err != nil {
		return err
	}
	used, err := os.ReadFile(filepath.Join(c.d.App.Dir(), "join.token"))
	if err != nil {
		return fmt.Errorf("read used token: %w", err)
	}
	for name, token := range map[string]string{
		"used": strings.TrimSpace(string(used)), "truncated": good[:len(good)-7], "foreign": "tskey-auth-abcdef", "made for another name": good,
	} {
		if err := os.WriteFile(filepath.Join(h.Dir(), "join.token"), []byte(token+"\n"), 0o600); err != nil {
			return fmt.Errorf("write token: %w", err)
		}
		if err := h.StartAgent(ctx); err != nil {
			return err
		}
		select {
		case <-h.Proc.Done():
		case <-time.After(20 * time.Second):
			return fmt.Errorf("the agent goes on with a token that is %s: %s", name, h.Proc.Text())
		}
		if h.Proc.Wait() == nil || strings.Contains(h.Proc.Text(), token) || !strings.Contains(h.Proc.Text(), "token") {
			return fmt.Errorf("a token that is %s ended with %w: %s", name, h.Proc.Wait(), h.Proc.Text())
		}
	}
	return nil
}
