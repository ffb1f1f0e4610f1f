// Package scenario runs the real programs of Signet on hosts made of namespaces: a coordinator, agents, and the client
// and server programs of the demo. Tests, benchmarks and the demo share it.
//
// It owns the processes, their configuration files and the underlay addresses; the hosts are integration/netlab's. It
// talks to Signet only the way people do: through the command line and its JSON.
//
// Start at cluster.go; the demo's own cast is in demo.go.
package scenario

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
)

const (
	// TrustDomain of every cluster.
	TrustDomain = "settler.example"
	agentsPort  = 7443
	apiAddress  = "127.0.0.1:7480"
	// coordinatorIP and the hosts' addresses lie in TEST-NET-1 (RFC 5737) inside namespaces; no packet leaves them.
	underlay = "192.0.2.0/24"
	// startWait bounds how long a program may take to become ready on a loaded machine.
	startWait = 60 * time.Second
)

// Options says what a cluster is called and where its programs and files are.
type Options struct {
	Prefix string // of the lab; unique on the machine
	Dir    string // an existing folder that other users may enter
	Bin    string // folder with signetd, signet-coordinator and signet
	// CoordinatorConfig is added to the coordinator's configuration, for example "lease: 1h".
	CoordinatorConfig string
}

// Cluster is a coordinator and its hosts.
type Cluster struct {
	Lab         *netlab.Lab
	Coordinator *netlab.Host
	Bridge      *netlab.Bridge
	o           Options
	serve       *netlab.Cmd
	agents      map[string]*Agent
	next        netip.Addr
}

// Agent is one host with its agent.
type Agent struct {
	Host     *netlab.Host
	Underlay netip.Addr
	If       string // the underlay's interface
	Proc     *netlab.Cmd
	c        *Cluster
	dir      string
}

// Start makes the lab, initialises a coordinator and starts it.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	lab, err := netlab.New(ctx, netlab.Options{Prefix: o.Prefix, Dir: o.Dir})
	if err != nil {
		return nil, fmt.Errorf("make lab: %w", err)
	}
	c := &Cluster{Lab: lab, o: o, agents: map[string]*Agent{}, next: netip.MustParsePrefix(underlay).Addr().Next()}
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(err, lab.Close())
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context) (err error) {
	if c.Bridge, err = c.Lab.Bridge(ctx, "underlay"); err != nil {
		return fmt.Errorf("make underlay: %w", err)
	}
	if c.Coordinator, err = c.Lab.Host(ctx, "coord"); err != nil {
		return fmt.Errorf("make coordinator's host: %w", err)
	}
	addr := c.address()
	if _, err = c.Lab.Connect(ctx, c.Coordinator, c.Bridge, netip.PrefixFrom(addr, 24)); err != nil {
		return fmt.Errorf("connect coordinator: %w", err)
	}
	dir := c.dir("coord")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make coordinator's folder: %w", err)
	}
	init := c.Coordinator.Command(ctx, netlab.Opts{}, c.bin("signet-coordinator"), "init", "--trust-domain", TrustDomain,
		"--data-dir", c.dataDir(), "--key-file", filepath.Join(dir, "coordinator.key"),
		"--api", apiAddress, "--agents", netip.AddrPortFrom(addr, agentsPort).String())
	if _, err := init.Output(); err != nil {
		return fmt.Errorf("initialise coordinator: %w", err)
	}
	config := fmt.Sprintf("trust_domain: %s\ndata_dir: %s\nkey_file: %s\nlisten:\n  agents: %v\n  api: %s\n%s\n",
		TrustDomain, c.dataDir(), filepath.Join(dir, "coordinator.key"), netip.AddrPortFrom(addr, agentsPort), apiAddress, c.o.CoordinatorConfig)
	if err := os.WriteFile(filepath.Join(dir, "coordinator.yaml"), []byte(config), 0o600); err != nil {
		return fmt.Errorf("write coordinator's configuration: %w", err)
	}
	return c.ServeCoordinator(ctx)
}

// ServeCoordinator starts the coordinator on what init or an earlier run left, and waits until its API answers.
func (c *Cluster) ServeCoordinator(ctx context.Context) error {
	c.serve = c.Coordinator.Command(context.WithoutCancel(ctx), netlab.Opts{Cgroup: "system.slice/signet-coordinator.service"},
		c.bin("signet-coordinator"), "serve", "--config", filepath.Join(c.dir("coord"), "coordinator.yaml"))
	if err := c.serve.Start(); err != nil {
		return err
	}
	return c.until(ctx, "coordinator to serve", c.serve, func() error {
		conn, err := c.Coordinator.DialContext(ctx, "tcp", apiAddress)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// KillCoordinator ends the coordinator without warning.
func (c *Cluster) KillCoordinator() error {
	if err := c.serve.Kill(syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill coordinator: %w", err)
	}
	<-c.serve.Done()
	return nil
}

// CoordinatorPID is the process id of the running coordinator.
func (c *Cluster) CoordinatorPID() int { return c.serve.PID() }

// CoordinatorLog is what the coordinator wrote so far.
func (c *Cluster) CoordinatorLog() string { return c.serve.Text() }

// CoordinatorAddr is where agents reach the coordinator.
func (c *Cluster) CoordinatorAddr() netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParsePrefix(underlay).Addr().Next(), agentsPort)
}

// Close ends every process and gives back everything, or says what is left.
func (c *Cluster) Close() error { return c.Lab.Close() }

// Dir is the folder of the cluster's files.
func (c *Cluster) Dir() string { return c.o.Dir }

// Bin is the path of one of the built programs.
func (c *Cluster) Bin(name string) string { return c.bin(name) }

func (c *Cluster) dir(host string) string { return filepath.Join(c.o.Dir, "files", host) }
func (c *Cluster) dataDir() string        { return filepath.Join(c.dir("coord"), "data") }
func (c *Cluster) bin(name string) string { return filepath.Join(c.o.Bin, name) }

// Agent is the host of that name, nil if there is none.
func (c *Cluster) Agent(name string) *Agent { return c.agents[name] }
func (c *Cluster) address() (a netip.Addr)  { a = c.next; c.next = a.Next(); return a }

// Admin runs the CLI with the first admin token and returns its output.
func (c *Cluster) Admin(ctx context.Context, args ...string) (string, error) {
	all := append([]string{"--api", "http://" + apiAddress, "--token-file", filepath.Join(c.dataDir(), "admin.token")}, args...)
	return c.Coordinator.Command(ctx, netlab.Opts{}, c.bin("signet"), all...).Output()
}

// AdminCommand is the same command for a person to paste.
func (c *Cluster) AdminCommand(args ...string) string {
	all := append([]string{c.bin("signet"), "--api", "http://" + apiAddress, "--token-file", filepath.Join(c.dataDir(), "admin.token")}, args...)
	return c.Coordinator.Enter("", all...)
}

// API is a client of the web API, from the coordinator's own host.
func (c *Cluster) API() *http.Client {
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DialContext: c.Coordinator.DialContext, MaxIdleConnsPerHost: 4}}
}

// APIRequest is a request with the first admin token.
func (c *Cluster) APIRequest(ctx context.Context, method, path string, body io.Reader) (*http.Request, error) {
	token, err := os.ReadFile(filepath.Join(c.dataDir(), "admin.token"))
	if err != nil {
		return nil, fmt.Errorf("read admin token: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+apiAddress+"/api/v1/"+path, body)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	req.Header.Set("Content-Type", "application/json")
	return req, nil
}

// AdminJSON runs the CLI with -o json and decodes what it printed.
func (c *Cluster) AdminJSON(ctx context.Context, into any, args ...string) error {
	out, err := c.Admin(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		return fmt.Errorf("signet %s printed no JSON: %w", strings.Join(args, " "), err)
	}
	return nil
}

// ApplyPolicy writes the document and applies it, waiting until every connected host has it.
func (c *Cluster) ApplyPolicy(ctx context.Context, document string) error {
	file := filepath.Join(c.dir("coord"), "policy.yaml")
	if err := os.WriteFile(file, []byte(document), 0o600); err != nil {
		return fmt.Errorf("write policy: %w", err)
	}
	_, err := c.Admin(ctx, "policy", "apply", file, "--wait")
	return err
}

// Token creates a join token for a node.
func (c *Cluster) Token(ctx context.Context, node string, more ...string) (string, error) {
	out, err := c.Admin(ctx, append([]string{"node", "token", "create", "--node", node}, more...)...)
	return strings.TrimSpace(out), err
}

// AddHost makes a host on the underlay, writes its agent's configuration and a join token, and starts the agent.
func (c *Cluster) AddHost(ctx context.Context, name string) (*Agent, error) {
	a, err := c.MakeHost(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := a.WriteToken(ctx); err != nil {
		return nil, err
	}
	return a, a.StartAgent(ctx)
}

// WriteToken creates a join token for the host and puts it where the agent looks.
func (a *Agent) WriteToken(ctx context.Context) error {
	token, err := a.c.Token(ctx, a.Host.Name())
	if err != nil {
		return fmt.Errorf("create join token for %s: %w", a.Host.Name(), err)
	}
	if err := os.WriteFile(filepath.Join(a.dir, "join.token"), []byte(token+"\n"), 0o600); err != nil {
		return fmt.Errorf("write join token: %w", err)
	}
	return nil
}

// MakeHost makes a host on the underlay with its agent's configuration, and starts nothing.
func (c *Cluster) MakeHost(ctx context.Context, name string) (*Agent, error) {
	h, err := c.Lab.Host(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("make host %s: %w", name, err)
	}
	a := &Agent{Host: h, Underlay: c.address(), c: c, dir: c.dir(name)}
	if a.If, err = c.Lab.Connect(ctx, h, c.Bridge, netip.PrefixFrom(a.Underlay, 24)); err != nil {
		return nil, fmt.Errorf("connect %s: %w", name, err)
	}
	if err := os.MkdirAll(a.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make folder of %s: %w", name, err)
	}
	if err := os.WriteFile(a.Config(), []byte(a.config()), 0o600); err != nil {
		return nil, fmt.Errorf("write configuration of %s: %w", name, err)
	}
	c.agents[name] = a
	return a, nil
}

func (a *Agent) config() string {
	return fmt.Sprintf(`coordinator: %v
join_token_file: %s
node: %s
state_dir: %s
key_file: %s
socket: %s
cgroup_root: %s
bpffs: %s
`, a.c.CoordinatorAddr(), filepath.Join(a.dir, "join.token"), a.Host.Name(), filepath.Join(a.dir, "state"),
		filepath.Join(a.dir, "agent.key"), a.Socket(), a.Host.CgroupRoot(), filepath.Join(a.Host.BPFFS(), "signet"))
}

// Config is the agent's configuration file.
func (a *Agent) Config() string { return filepath.Join(a.dir, "agent.yaml") }

// Socket is the agent's local API.
func (a *Agent) Socket() string { return filepath.Join(a.dir, "agent.sock") }

// StateDir is where the agent keeps its sealed state.
func (a *Agent) StateDir() string { return filepath.Join(a.dir, "state") }

// Dir is the folder of the host's files.
func (a *Agent) Dir() string { return a.dir }

// StartAgent starts the agent; it does not wait.
func (a *Agent) StartAgent(ctx context.Context) error {
	a.Proc = a.Host.Command(context.WithoutCancel(ctx), netlab.Opts{Cgroup: "system.slice/signetd.service"}, a.c.bin("signetd"), "--config", a.Config())
	return a.Proc.Start()
}

// KillAgent ends the agent without warning.
func (a *Agent) KillAgent() error {
	if err := a.Proc.Kill(syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill agent of %s: %w", a.Host.Name(), err)
	}
	<-a.Proc.Done()
	return nil
}

// StopAgent asks the agent to end and waits.
func (a *Agent) StopAgent() error {
	if err := a.Proc.Kill(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop agent of %s: %w", a.Host.Name(), err)
	}
	<-a.Proc.Done()
	return nil
}

// Signet runs the CLI against the host's agent.
func (a *Agent) Signet(ctx context.Context, args ...string) (string, error) {
	all := append([]string{"--socket", a.Socket()}, args...)
	return a.Host.Command(ctx, netlab.Opts{}, a.c.bin("signet"), all...).Output()
}

// SignetCommand is a CLI call against a host's agent, for a person to paste.
func (c *Cluster) SignetCommand(a *Agent, args ...string) string {
	return a.Host.Enter("", append([]string{c.bin("signet"), "--socket", a.Socket()}, args...)...)
}

// Status is what scenario reads of "signet status -o json".
type Status struct {
	Connected bool   `json:"connected"`
	State     string `json:"state"`
	Revision  uint64 `json:"revision"`
	Peers     struct {
		Total int `json:"total"`
		Up    int `json:"up"`
	} `json:"peers"`
	Enforcement struct {
		Mode     string `json:"mode"`
		Healthy  bool   `json:"healthy"`
		Counters []struct {
			Reason  string `json:"reason"`
			Packets int    `json:"packets"`
		} `json:"counters"`
	} `json:"enforcement"`
	Workloads []struct {
		ID        string          `json:"id"`
		Addresses []netip.Addr    `json:"addresses"`
		Matched   json.RawMessage `json:"matched"`
	} `json:"workloads"`
	SVIDs []struct {
		Expires time.Time `json:"expires"`
	} `json:"svids"`
	Warnings []string `json:"warnings"`
}

// Denied is how many packets and calls the host's judge refused for a reason, since its maps were made.
func (s Status) Denied(reason string) int {
	for _, c := range s.Enforcement.Counters {
		if c.Reason == reason {
			return c.Packets
		}
	}
	return 0
}

// Status asks the agent. An unhealthy agent is not an error here.
func (a *Agent) Status(ctx context.Context) (Status, error) {
	var s Status
	out, err := a.Signet(ctx, "status", "-o", "json")
	start := strings.IndexByte(out, '{')
	if start < 0 {
		return s, fmt.Errorf("status of %s: %w: %s", a.Host.Name(), err, out)
	}
	// The decoder stops after the document, because the error text of an unhealthy agent follows it.
	if err := json.NewDecoder(strings.NewReader(out[start:])).Decode(&s); err != nil {
		return s, fmt.Errorf("status of %s: %w", a.Host.Name(), err)
	}
	return s, nil
}

// WaitConnected waits until the agent is connected and enforces.
func (a *Agent) WaitConnected(ctx context.Context) error {
	return a.WaitStatus(ctx, "be connected", func(s Status) bool { return s.Connected && s.Enforcement.Healthy })
}

// WaitStatus waits until the status satisfies ok.
func (a *Agent) WaitStatus(ctx context.Context, what string, ok func(Status) bool) error {
	return a.c.until(ctx, "agent of "+a.Host.Name()+" to "+what, a.Proc, func() error {
		s, err := a.Status(ctx)
		if err != nil {
			return err
		}
		if !ok(s) {
			return fmt.Errorf("it says %+v", s)
		}
		return nil
	})
}

// Address is the overlay IPv4 of a workload on this host, from the agent itself.
func (a *Agent) Address(ctx context.Context, id string) (v4, v6 netip.Addr, err error) {
	s, err := a.Status(ctx)
	if err != nil {
		return v4, v6, err
	}
	for _, w := range s.Workloads {
		if strings.HasSuffix(w.ID, "/"+id) && len(w.Addresses) == 2 {
			return w.Addresses[0], w.Addresses[1], nil
		}
	}
	return v4, v6, fmt.Errorf("host %s has no workload %s: %+v", a.Host.Name(), id, s.Workloads)
}

// until polls check until it succeeds, proc ends or time runs out. Programs under test report nothing by themselves,
// so there is nothing else to wait on.
func (c *Cluster) until(ctx context.Context, what string, proc *netlab.Cmd, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		if last = check(); last == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-proc.Done():
			return fmt.Errorf("wait for %s: the program ended: %w\n%s", what, proc.Wait(), proc.Text())
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w; last: %w\n%s", what, ctx.Err(), last, tail(proc.Text(), 4000))
		}
	}
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}
