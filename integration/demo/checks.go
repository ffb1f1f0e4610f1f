package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/scenario"
)

// lastSlice is the last slice of the first mesh.
const lastSlice = 6

// slices names what each slice promises as a whole.
var slices = map[int]string{
	1: "wire and judge", 2: "coordinator", 3: "processes", 4: "policy", 5: "endurance", 6: "proof",
}

// promise is one outcome that the demo asserts.
type promise struct {
	slice int
	says  string
	check func(*checker, context.Context) error
}

// checker is the running demo with what checks learn on the way.
type checker struct {
	d          *scenario.Demo
	pg4, pg6   netip.Addr // data/postgres
	api4, api6 netip.Addr // app/api-server
	hook4      netip.Addr // app/webhook
}

// promises are run in this order; later ones rely on what earlier ones left.
var promises = []promise{
	{1, "every host has addresses for its workloads, an enforcing judge and no peer before a rule needs one", (*checker).bare},
	{1, "with no rule nothing passes between hosts, IPv4 and IPv6", (*checker).nothingPasses},
	{2, "a policy reaches every host and is acknowledged", (*checker).policyReaches},
	{2, "a used, a truncated and an unknown join token are each refused in one plain sentence", (*checker).badTokens},
	{3, "psql as app/api-server works", (*checker).psqlWorks},
	{3, "psql as app/webhook, on the same host, is refused in under 100 ms", (*checker).psqlRefused},
	{3, "a process without an identity is refused with NO_IDENTITY", (*checker).noIdentity},
	{3, "flows between two workloads of one host are judged like any other", (*checker).sameHost},
	{3, "plaintext to an overlay address on the underlay is not delivered", (*checker).plaintext},
	{4, "explain names the missing rule", (*checker).explain},
	{4, "a document whose test fails, or with an unknown key, is refused and changes nothing", (*checker).badDocuments},
	{4, "history lists the revisions and rollback makes a new one", (*checker).rollback},
	{4, "removing the rule stops a live psql in both directions within 1 s", (*checker).ruleRemoved},
	{4, "revoking a workload stops it within 1 s and is named", (*checker).revoke},
	{5, "with the coordinator killed traffic goes on, and a restarted agent is back within 2 s", (*checker).coordinatorAway},
	{5, "a hand-edited snapshot in the agent's state is refused and nothing passes", (*checker).tampered},
	{5, "kill -9 of the receiver's agent lets no forbidden packet through, and the allowed flow comes back", (*checker).killed},
	{6, "a capture on the underlay shows no canary, and nothing but WireGuard and the coordinator's TLS", (*checker).canary},
}

func runChecks(ctx context.Context, c *checker, upto int) error {
	passed, failed := 0, 0
	begin := time.Now()
	for _, p := range promises {
		if p.slice > upto {
			continue
		}
		start := time.Now()
		err := p.check(c, ctx)
		took := time.Since(start).Seconds()
		if err != nil {
			failed++
			fmt.Printf("S%d FAIL %s (%.1f s)\n        %v\n", p.slice, p.says, took, err)
			continue
		}
		passed++
		fmt.Printf("S%d ok   %s (%.1f s)\n", p.slice, p.says, took)
	}
	for s := upto + 1; s <= lastSlice; s++ {
		fmt.Printf("S%d not asserted: %s\n", s, slices[s])
	}
	fmt.Printf("demo-check: %d passed, %d failed (%.0f s)\n", passed, failed, time.Since(begin).Seconds())
	if failed > 0 {
		return fmt.Errorf("%d of %d promises do not hold", failed, failed+passed)
	}
	return nil
}

// dial is one exchange from a cgroup; the duration is that of the attempt.
func (c *checker) dial(ctx context.Context, a *scenario.Agent, cgroup, network string, to netip.AddrPort) (string, error) {
	out, err := c.d.Probe(ctx, a, cgroup, "dial", network, to.String()).Output()
	return strings.TrimSpace(out), err
}

// serve starts an echo server in a cgroup and waits until it listens.
func (c *checker) serve(ctx context.Context, a *scenario.Agent, cgroup, network string, at netip.AddrPort) (*netlab.Cmd, error) {
	cmd := c.d.Probe(ctx, a, cgroup, "serve", network, at.String())
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return cmd, cmd.WaitFor(ctx, "serving")
}

func stop(cmds ...*netlab.Cmd) {
	for _, cmd := range cmds {
		if cmd != nil {
			_ = cmd.Kill(9) // one that ended already is as good
			<-cmd.Done()
		}
	}
}

// eventually polls, because what it waits for is the outcome of other processes.
func eventually(ctx context.Context, limit time.Duration, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %v: %w", limit, err)
		case <-tick.C:
		}
	}
}

func (c *checker) bare(ctx context.Context) (err error) {
	if c.pg4, c.pg6, err = c.d.Data.Address(ctx, "data/postgres"); err != nil {
		return err
	}
	if c.api4, c.api6, err = c.d.App.Address(ctx, "app/api-server"); err != nil {
		return err
	}
	if c.hook4, _, err = c.d.App.Address(ctx, "app/webhook"); err != nil {
		return err
	}
	for _, a := range []*scenario.Agent{c.d.App, c.d.Data, c.d.Edge} {
		s, err := a.Status(ctx)
		if err != nil {
			return err
		}
		if !s.Enforcement.Healthy || s.Enforcement.Mode != "enforce" || s.Peers.Total != 0 {
			return fmt.Errorf("%s: %+v", a.Host.Name(), s)
		}
	}
	return nil
}

func (c *checker) nothingPasses(ctx context.Context) error {
	server, err := c.serve(ctx, c.d.Data, scenario.Postgres, "tcp", netip.AddrPortFrom(c.pg4, 5432))
	if err != nil {
		return err
	}
	defer stop(server)
	server6, err := c.serve(ctx, c.d.Data, scenario.Postgres, "tcp", netip.AddrPortFrom(c.pg6, 5432))
	if err != nil {
		return err
	}
	defer stop(server6)
	for _, to := range []netip.Addr{c.pg4, c.pg6} {
		if out, err := c.dial(ctx, c.d.App, scenario.APIServer, "tcp", netip.AddrPortFrom(to, 5432)); err == nil {
			return fmt.Errorf("%v answered without a rule: %s", to, out)
		}
	}
	if got := server.Text() + server6.Text(); strings.Contains(got, "accepted") {
		return fmt.Errorf("the server accepted a connection: %s", got)
	}
	return nil
}

func (c *checker) policyReaches(ctx context.Context) error {
	if err := c.d.ApplyPolicy(ctx, scenario.Workloads+scenario.Rules); err != nil {
		return err
	}
	for _, a := range []*scenario.Agent{c.d.App, c.d.Data, c.d.Edge} {
		s, err := a.Status(ctx)
		if err != nil {
			return err
		}
		if s.Revision != 2 {
			return fmt.Errorf("%s is at policy revision %d, expected 2", a.Host.Name(), s.Revision)
		}
	}
	return c.d.App.WaitStatus(ctx, "have its peer up", func(s scenario.Status) bool { return s.Peers.Total == 1 && s.Peers.Up == 1 })
}

func (c *checker) psqlWorks(ctx context.Context) error {
	if err := c.d.StartPostgres(ctx); err != nil {
		return err
	}
	for _, addr := range []netip.Addr{c.pg4, c.pg6} {
		out, err := c.d.PSQL(ctx, c.d.App, scenario.APIServer, addr.String(), "select 6*7").Output()
		if err != nil {
			return fmt.Errorf("%w\n%s", err, c.d.Evidence(ctx))
		}
		if strings.TrimSpace(out) != "42" {
			return fmt.Errorf("psql over %v printed %q", addr, out)
		}
	}
	return nil
}

// refused asserts that a program ended at once, with an error of its own.
func refused(ctx context.Context, cmd *netlab.Cmd, limit time.Duration) (string, error) {
	start := time.Now()
	out, err := cmd.Output()
	took := time.Since(start)
	switch {
	case err == nil:
		return out, fmt.Errorf("it was let through: %s", out)
	case ctx.Err() != nil:
		return out, ctx.Err()
	case took > limit:
		return out, fmt.Errorf("refused only after %v: %s", took, out)
	}
	return out, nil
}

func (c *checker) psqlRefused(ctx context.Context) error {
	// A first run takes the program into the page cache; the limit is for the refusal, not for the disk.
	for _, limit := range []time.Duration{5 * time.Second, 100 * time.Millisecond} {
		for _, addr := range []netip.Addr{c.pg4, c.pg6} {
			if out, err := refused(ctx, c.d.PSQL(ctx, c.d.App, scenario.Webhook, addr.String(), "select 1"), limit); err != nil {
				return fmt.Errorf("psql to %v: %w", addr, err)
			} else if !strings.Contains(out, "Permission denied") {
				return fmt.Errorf("psql to %v does not say that it was refused: %s", addr, out)
			}
		}
	}
	return c.flowSays(ctx, c.d.App, "NO_RULE", "app/webhook")
}

func (c *checker) noIdentity(ctx context.Context) error {
	if _, err := refused(ctx, c.d.PSQL(ctx, c.d.App, scenario.Stranger, c.pg4.String(), "select 1"), 5*time.Second); err != nil {
		return err
	}
	return c.flowSays(ctx, c.d.App, "NO_IDENTITY", "")
}

// flowSays waits for a denied flow with the reason, and with a source if one is named.
func (c *checker) flowSays(ctx context.Context, a *scenario.Agent, reason, source string) error {
	return eventually(ctx, 5*time.Second, func() error {
		out, err := a.Signet(ctx, "flows", "--verdict", "deny", "-o", "jsonl")
		if err != nil {
			return err
		}
		for _, line := range strings.Split(out, "\n") {
			if strings.Contains(line, `"`+reason+`"`) && strings.Contains(line, source) {
				return nil
			}
		}
		return fmt.Errorf("no denied flow of %q with reason %s in:\n%s", source, reason, out)
	})
}

func (c *checker) sameHost(ctx context.Context) error {
	api, err := c.serve(ctx, c.d.App, scenario.APIServer, "tcp", netip.AddrPortFrom(c.api4, 8080))
	if err != nil {
		return err
	}
	defer stop(api)
	hook, err := c.serve(ctx, c.d.App, scenario.Webhook, "tcp", netip.AddrPortFrom(c.hook4, 8080))
	if err != nil {
		return err
	}
	defer stop(hook)
	allowed, denied := netip.AddrPortFrom(c.api4, 8080), netip.AddrPortFrom(c.hook4, 8080)
	if out, err := c.dial(ctx, c.d.App, scenario.Webhook, "tcp", allowed); err != nil {
		return fmt.Errorf("webhook to api-server, which a rule allows: %w", err)
	} else if !strings.Contains(out, "from "+c.hook4.String()) {
		return fmt.Errorf("the source is not the workload's own address: %s", out)
	}
	for _, who := range []string{scenario.APIServer, scenario.Stranger} {
		if out, err := c.dial(ctx, c.d.App, who, "tcp", denied); err == nil {
			return fmt.Errorf("%s reached the webhook without a rule: %s", who, out)
		}
	}
	if strings.Contains(hook.Text(), "accepted") {
		return errors.New("the webhook accepted a connection")
	}
	return nil
}

// plaintext sends to the overlay address from a machine on the same underlay that is not in the mesh.
func (c *checker) plaintext(ctx context.Context) error {
	outsider, err := c.d.MakeHost(ctx, "outsider")
	if err != nil {
		return err
	}
	server, err := c.serve(ctx, c.d.Data, scenario.Postgres, "udp", netip.AddrPortFrom(c.pg4, 9999))
	if err != nil {
		return err
	}
	defer stop(server)
	route := outsider.Host.Command(ctx, netlab.Opts{}, "ip", "route", "add", c.pg4.String(), "via", c.d.Data.Underlay.String())
	if err := route.Run(); err != nil {
		return err
	}
	capture, err := c.d.Data.Host.Capture(ctx, c.d.Data.If, []byte("plain"))
	if err != nil {
		return err
	}
	// The same exchange, to the underlay's own address, proves that the outsider's packets do arrive.
	open, err := c.serve(ctx, c.d.Data, scenario.Postgres, "udp", netip.AddrPortFrom(c.d.Data.Underlay, 9998))
	if err != nil {
		return err
	}
	defer stop(open)
	if out, err := c.dial(ctx, outsider, "", "udp", netip.AddrPortFrom(c.d.Data.Underlay, 9998)); err != nil {
		return fmt.Errorf("the underlay itself does not work: %s: %w", out, err)
	}
	if out, err := c.dial(ctx, outsider, "", "udp", netip.AddrPortFrom(c.pg4, 9999)); err == nil {
		return fmt.Errorf("an overlay address answered in clear: %s", out)
	}
	rec := capture.Stop()
	arrived := false
	for f := range rec.Flows {
		arrived = arrived || f.HasPort(17, 9999)
	}
	if !arrived {
		return errors.New("the plaintext never reached the host, so this proves nothing")
	}
	if strings.Contains(server.Text(), "got") {
		return fmt.Errorf("delivered: %s", server.Text())
	}
	return c.flowSays(ctx, c.d.Data, "NOT_TUNNEL", "")
}
