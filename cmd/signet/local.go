package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/internal/version"
)

// localCommands are those that ask this host's agent.
func (a *app) localCommands() []*cobra.Command {
	return []*cobra.Command{
		a.upCommand(), a.downCommand(), a.statusCommand(),
		a.leaf(command{
			use: "peers", short: "List the WireGuard peers of this host", group: groupLocal,
			example: "  signet peers\n  signet peers -o json", run: a.peers,
		}),
		a.leaf(command{
			use: "workloads", short: "List the workloads of this host, and what matches them", group: groupLocal,
			example: "  signet workloads", run: a.localWorkloads,
		}),
		a.resolveCommand(),
		a.leaf(command{
			use: "ping TARGET", short: "Make WireGuard prove a peer anew: a node, a workload or an overlay address", group: groupLocal,
			example: "  signet ping db-1\n  signet ping data/postgres", args: exactly("TARGET"), run: a.ping,
		}),
		a.leaf(command{
			use: "netcheck", short: "Say how this host is reached", group: groupLocal,
			example: "  signet netcheck", run: a.netcheck,
		}),
		a.flowsCommand(),
		a.leaf(command{
			use: "version", short: "Print the version of this command", group: groupLocal, example: "  signet version",
			run: func(context.Context, []string) error {
				return a.done(map[string]string{"version": version.Version}, "signet %s", version.Version)
			},
		}),
	}
}

func (a *app) upCommand() *cobra.Command {
	var coordinators []string
	var joinFile, node string
	c := a.leaf(command{
		use: "up", short: "Join the mesh, or allow traffic again after down", group: groupLocal,
		long:    "Join the mesh with a join token, or, without one, allow traffic again after down.\n\nThe token is read from a file, or from standard input with -; never from the command line, which others can see.",
		example: "  signet up --coordinator coord.settler.example:7443 --join-file /etc/signet/join.token\n  ssh admin signet node token create | signet up --coordinator coord:7443 --join-file -\n  signet up",
		run: func(ctx context.Context, _ []string) error {
			r := localapi.UpRequest{Coordinators: coordinators, Node: node}
			if len(coordinators) > 0 && joinFile == "" {
				return usagef("--coordinator needs --join-file FILE, or - for standard input")
			}
			var err error
			switch joinFile {
			case "":
			case "-":
				r.Token, err = secretFrom(a.env.In, "standard input")
			default:
				r.Token, err = readSecret(joinFile)
			}
			if err != nil {
				return fmt.Errorf("read join token: %w", err)
			}
			return a.up(ctx, r)
		},
	})
	c.Flags().StringSliceVar(&coordinators, "coordinator", nil, "address of a coordinator for agents, host:port; several are tried in order")
	c.Flags().StringVar(&joinFile, "join-file", "", "file with the join token, or - for standard input")
	c.Flags().StringVar(&node, "node", "", "name of this host in the mesh (default: the configuration's, or the host name)")
	return c
}

func (a *app) up(ctx context.Context, r localapi.UpRequest) error {
	reply, err := a.agent().Up(ctx, r)
	if err != nil {
		return err
	}
	return a.print(reply, func(w io.Writer) {
		say(w, "%s is %s", reply.Node.Name, string(reply.State))
		if reply.State == localapi.StatePending {
			say(w, "It has no workloads until somebody runs: signet node approve %s", reply.Node.Name)
		}
	})
}

func (a *app) downCommand() *cobra.Command {
	var release bool
	c := a.leaf(command{
		use: "down", short: "Stop overlay traffic and keep denying; --release stops guarding, too", group: groupLocal,
		example: "  signet down\n  signet down --release",
		run: func(ctx context.Context, _ []string) error {
			if err := a.agent().Down(ctx, release); err != nil {
				return err
			}
			if release {
				return a.done(map[string]bool{"released": true}, "down; nothing of Signet guards this host any more")
			}
			return a.done(map[string]bool{"released": false}, "down; overlay traffic is denied until: signet up")
		},
	})
	c.Flags().BoolVar(&release, "release", false, "also remove the device, its routes and every pinned program")
	return c
}

// Checks of signet status.
const (
	checkLive  = "live"
	checkReady = "ready"
)

// errUnhealthy makes status fail.
var errUnhealthy = errors.New("the agent is not healthy")

func (a *app) statusCommand() *cobra.Command {
	var check string
	c := a.leaf(command{
		use: "status", short: "Show how this host's agent is; fails when it is not running or not healthy", group: groupLocal,
		example: "  signet status\n  signet status -o json\n  signet status --check ready   # for probes: prints nothing more than a word",
		run: func(ctx context.Context, _ []string) error {
			switch check {
			case "", checkLive, checkReady:
			default:
				return usagef("%q is not a check; expected live or ready", check)
			}
			s, err := a.agent().Status(ctx)
			if err != nil {
				return err
			}
			return a.status(s, check)
		},
	})
	c.Flags().StringVar(&check, "check", "", "live: the agent answers; ready: it enforces and nothing is wrong with that")
	return c
}

func (a *app) status(s localapi.Status, check string) error {
	if check == checkLive {
		return a.done(map[string]bool{"live": true}, "live")
	}
	healthy := s.Healthy()
	var err error
	switch {
	case check == checkReady && healthy:
		return a.done(map[string]bool{"ready": true}, "ready")
	case check == checkReady:
		err = a.done(map[string]bool{"ready": false}, "not ready")
	default:
		err = a.print(s, func(w io.Writer) { statusTable(w, s) })
	}
	if err != nil || healthy {
		return err
	}
	return withHint(fmt.Errorf("%w: it is %s", errUnhealthy, s.State), "%s", unhealthyHint(s))
}

func unhealthyHint(s localapi.Status) string {
	switch s.State {
	case localapi.StateNeedsEnrolment:
		return "join with: signet up --coordinator ADDR --join-file FILE"
	case localapi.StatePending:
		return "an operator has to run: signet node approve " + s.Node.Name
	case localapi.StateDown:
		return "allow traffic again with: signet up"
	}
	return "see the warnings of: signet status"
}

func statusTable(w io.Writer, s localapi.Status) {
	row(w, "state:", string(s.State))
	row(w, "node:", fmt.Sprintf("%s  %s", s.Node.Name, s.Node.ID))
	connected := "connected"
	if !s.Connected {
		connected = "not connected"
		if s.Session != "" {
			connected += ": " + s.Session
		}
	}
	row(w, "coordinator:", strings.TrimSpace(s.Coordinator+"  "+connected))
	row(w, "policy revision:", s.Revision)
	row(w, "lease ends:", when(s.LeaseEnds)+left(s.Clocks.LeaseSeconds, s.LeaseEnds))
	row(w, "node SVID ends:", when(s.Clocks.SVIDExpires)+left(s.Clocks.SVIDSeconds, s.Clocks.SVIDExpires))
	row(w, "tunnel:", fmt.Sprintf("%s %s port %d", s.Tunnel.Kind, s.Tunnel.Interface, s.Tunnel.Port))
	attached := 0
	for _, h := range s.Enforcement.Hooks {
		if h.Attached {
			attached++
		}
	}
	row(w, "enforcement:", fmt.Sprintf("%s, %d of %d hooks attached, healthy: %s", s.Enforcement.Mode, attached, len(s.Enforcement.Hooks), yes(s.Enforcement.Healthy)))
	row(w, "peers:", fmt.Sprintf("%d of %d up", s.Peers.Up, s.Peers.Total))
	matched := 0
	for _, wl := range s.Workloads {
		if wl.Matched {
			matched++
		}
	}
	row(w, "workloads:", fmt.Sprintf("%d of %d matched", matched, len(s.Workloads)))
	row(w, "version:", s.Version)
	for _, h := range s.Enforcement.Hooks {
		if !h.Attached {
			row(w, "not attached:", strings.TrimSpace(h.Name+" "+h.Error))
		}
	}
	for _, o := range s.Objects {
		row(w, "not applied:", fmt.Sprintf("%s %s: %s (%d tries)", o.Kind, o.Name, o.Error, o.Tries))
	}
	if s.RefusedSnapshot != "" {
		row(w, "refused snapshot:", s.RefusedSnapshot)
	}
	for _, warning := range s.Warnings {
		if !slices.Contains(s.NotServed, warning) { // the agent says those twice, for readers of either
			row(w, "warning:", warning)
		}
	}
	for _, part := range s.NotServed {
		row(w, "not served:", part)
	}
}

// left is the rest of a clock.
func left(seconds int64, end time.Time) string {
	switch {
	case end.IsZero():
		return ""
	case seconds < 0:
		return "  (ended)"
	}
	return fmt.Sprintf("  (in %v)", time.Duration(seconds)*time.Second)
}

func (a *app) peers(ctx context.Context, _ []string) error {
	peers, err := a.agent().Peers(ctx)
	if err != nil {
		return err
	}
	return a.print(peers, func(w io.Writer) {
		row(w, "NODE", "UP", "ENDPOINT", "LAST HANDSHAKE", "RECEIVED", "SENT", "REFUSED", "IDENTITIES")
		for _, p := range peers {
			ids := make([]string, 0, len(p.Identities))
			for _, id := range p.Identities {
				ids = append(ids, id.Short())
			}
			endpoint := ""
			if p.Endpoint.IsValid() {
				endpoint = p.Endpoint.String()
			}
			row(w, p.Node, yes(p.Up), endpoint, when(p.LastHandshake), p.RxBytes, p.TxBytes, p.RefusedSource, strings.Join(ids, ", "))
		}
	})
}

func (a *app) localWorkloads(ctx context.Context, _ []string) error {
	list, err := a.agent().Workloads(ctx)
	if err != nil {
		return err
	}
	return a.print(list, func(w io.Writer) { localWorkloadTable(w, list) })
}

func localWorkloadTable(w io.Writer, list []localapi.Workload) {
	row(w, "WORKLOAD", "NUMBER", "ADDRESSES", "SELECTORS", "MATCHED", "WHERE OR WHY NOT")
	for _, wl := range list {
		where := wl.Why
		if wl.Matched {
			where = strings.Join(wl.Cgroups, ", ")
			if wl.Interface != "" {
				where = strings.TrimPrefix(where+", behind "+wl.Interface, ", ")
			}
		}
		row(w, wl.ID.Short(), wl.Number, join(wl.Addresses), strings.Join(wl.Selectors, ", "), yes(wl.Matched), where)
	}
}

func (a *app) ping(ctx context.Context, args []string) error {
	reply, err := a.agent().Ping(ctx, args[0])
	if err != nil {
		return err
	}
	return a.print(reply, func(w io.Writer) {
		at := ""
		if reply.Endpoint.IsValid() {
			at = " at " + reply.Endpoint.String()
		}
		say(w, "%s answered on %s%s in %s", reply.Target, reply.Node, at, fmt.Sprintf("%.1f ms", reply.RTTMs))
	})
}

func (a *app) netcheck(ctx context.Context, _ []string) error {
	n, err := a.agent().Netcheck(ctx)
	if err != nil {
		return err
	}
	return a.print(n, func(w io.Writer) {
		row(w, "node:", n.Node)
		row(w, "own addresses:", join(n.Candidates))
		seen := "unknown: the coordinator has not said yet"
		if n.SeenKnown {
			seen = join(n.SeenAs)
		}
		row(w, "seen as:", seen)
		row(w, "behind NAT:", yes(n.BehindNAT))
		if n.Keepalive > 0 {
			row(w, "keepalive:", fmt.Sprintf("every %d s", n.Keepalive))
		}
		for _, p := range n.Peers {
			state := "no handshake yet"
			if p.HandshakeSeconds >= 0 {
				state = fmt.Sprintf("last handshake %.0f s ago", p.HandshakeSeconds)
			}
			at := "no endpoint"
			if p.Endpoint.IsValid() {
				at = p.Endpoint.String()
			}
			row(w, "peer:", fmt.Sprintf("%s, %s, %s", p.Node, at, state))
		}
		for _, note := range n.Notes {
			row(w, "note:", note)
		}
	})
}
