package scenario

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Fleet is a cluster of equal hosts, each with one workload that may talk with every other.
type Fleet struct {
	*Cluster
	Agents []*Agent
	// Converged is the time from the start of the first agent until every agent was connected and had every peer up.
	Converged time.Duration
}

// FleetPolicy lets the members of a fleet talk with one another on the ports.
func FleetPolicy(ports ...int) string {
	services := make([]string, len(ports))
	for i, p := range ports {
		services[i] = fmt.Sprintf("tcp/%d", p)
	}
	return `zones: [{name: app}]
workloads:
  - {id: app/member, selectors: ["unit:member.service"], nodes: ["host-*"]}
rules:
  - {id: members, from: [app/member], to: [app/member], allow: [` + strings.Join(services, ", ") + `]}
`
}

// StartFleet starts a coordinator and n hosts at once, and waits until the mesh is complete.
func StartFleet(ctx context.Context, o Options, n int) (*Fleet, error) {
	c, err := Start(ctx, o)
	if err != nil {
		return nil, err
	}
	f := &Fleet{Cluster: c}
	if err := f.start(ctx, n); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return f, nil
}

func (f *Fleet) start(ctx context.Context, n int) error {
	if err := f.ApplyPolicy(ctx, FleetPolicy(8000)); err != nil {
		return err
	}
	for i := range n {
		a, err := f.MakeHost(ctx, fmt.Sprintf("host-%d", i+1))
		if err != nil {
			return err
		}
		if _, err := a.Host.Cgroup("system.slice/member.service"); err != nil {
			return err
		}
		if err := a.WriteToken(ctx); err != nil {
			return err
		}
		f.Agents = append(f.Agents, a)
	}
	begin := time.Now()
	for _, a := range f.Agents {
		if err := a.StartAgent(ctx); err != nil {
			return err
		}
	}
	for _, a := range f.Agents {
		if err := a.WaitStatus(ctx, "have every peer up", func(s Status) bool {
			return s.Connected && s.Enforcement.Healthy && s.Peers.Up == n-1
		}); err != nil {
			return err
		}
	}
	f.Converged = time.Since(begin)
	return nil
}
