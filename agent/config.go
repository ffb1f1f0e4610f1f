package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/signet-overlay/signet/agent/attest"
	"github.com/signet-overlay/signet/agent/reconcile"
	"github.com/signet-overlay/signet/dataplane"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// DefaultConfigFile is where packages put the configuration.
const DefaultConfigFile = "/etc/signet/agent.yaml"

// auto lets the agent choose.
const auto = "auto"

// Values of keys whose part is not built yet: they are accepted, because packages install them, and nothing is served.
const (
	defaultWorkloadAPI = "unix:///run/signet/workload.sock"
	defaultMetrics     = "127.0.0.1:7491"
	defaultSpool       = policydoc.Bytes(1 << 30)
)

// Config is the agent's configuration file: one field for each key of the contract, section 2, which is why there are
// more than 15.
type Config struct {
	Coordinator   policydoc.Strings `yaml:"coordinator"`
	JoinTokenFile string            `yaml:"join_token_file"`
	Node          string            `yaml:"node"`
	StateDir      string            `yaml:"state_dir"`
	Socket        string            `yaml:"socket"`
	WorkloadAPI   string            `yaml:"workload_api"`
	Interface     string            `yaml:"interface"`
	ListenPort    int               `yaml:"listen_port"`
	Endpoints     []string          `yaml:"endpoints"`
	CgroupRoot    string            `yaml:"cgroup_root"`
	BPFFS         string            `yaml:"bpffs"`
	Tunnel        string            `yaml:"tunnel"`
	AcceptGaps    []string          `yaml:"accept_gaps"`
	Handshakes    HandshakeGuard    `yaml:"handshake_guard"`
	Containers    ContainerState    `yaml:"container_state"`
	OnLeaseEnd    string            `yaml:"on_lease_end"`
	KeyFile       string            `yaml:"key_file"`
	Metrics       string            `yaml:"metrics"`
	FlowLog       FlowLog           `yaml:"flow_log"`
}

// FlowLog is the key flow_log.
type FlowLog struct {
	File       string          `yaml:"file"`
	SpoolBytes policydoc.Bytes `yaml:"spool_bytes"`
	Sinks      []any           `yaml:"sinks,notbuilt"`
}

// ContainerState is the key container_state: where container runtimes keep their state, for selectors container:.
type ContainerState struct {
	Docker     string `yaml:"docker"`
	Containerd string `yaml:"containerd"`
	PodmanRun  string `yaml:"podman_run"` // of CRI-O too
	PodmanLib  string `yaml:"podman_lib"`
}

// attestHost is where attest looks.
func (c *Config) attestHost(cgroups string) attest.Host {
	return attest.Host{Root: cgroups, Tunnel: c.Interface, Runtimes: attest.Runtimes(c.Containers)}
}

// DefaultConfig is what an empty file means.
func DefaultConfig() Config {
	return Config{
		StateDir: "/var/lib/signet", Socket: "/run/signet/agent.sock", WorkloadAPI: defaultWorkloadAPI,
		Interface: "signet0", ListenPort: 51820, CgroupRoot: auto, BPFFS: "/sys/fs/bpf/signet", Tunnel: auto,
		Containers: ContainerState(attest.DefaultRuntimes()),
		OnLeaseEnd: string(reconcile.DenyAll), KeyFile: "/etc/signet/agent.key", Metrics: defaultMetrics,
		FlowLog: FlowLog{SpoolBytes: defaultSpool}, Handshakes: HandshakeGuard{Mode: "off", Interfaces: []string{}},
	}
}

// LoadConfig reads and checks a configuration file.
func LoadConfig(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	return ParseConfig(path, data)
}

// ParseConfig reads and checks a configuration; name stands in errors.
func ParseConfig(name string, data []byte) (Config, error) {
	cfg := DefaultConfig()
	if err := policydoc.DecodeStrict(name, data, &cfg); err != nil {
		return Config{}, err //nolint:wrapcheck // it names file, line and column already
	}
	if cfg.Node == "" {
		host, err := os.Hostname()
		if err != nil {
			return Config{}, fmt.Errorf("%s: find host name: %w", name, err)
		}
		cfg.Node = host
	}
	if err := cfg.check(); err != nil {
		return Config{}, fmt.Errorf("%s: %w", name, err)
	}
	return cfg, nil
}

// HandshakeGuard is the key handshake_guard.
type HandshakeGuard struct {
	Mode       string   `yaml:"mode"`       // off, auto, native, generic or tc
	Interfaces []string `yaml:"interfaces"` // empty means every device with an underlay address
}

// check refuses what could not work, by the name of the key.
func (c *Config) check() error {
	if err := identity.ParseName(c.Node); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	for _, addr := range c.Coordinator {
		if err := checkAddress(addr); err != nil {
			return fmt.Errorf("coordinator: %w", err)
		}
	}
	for key, path := range map[string]string{"state_dir": c.StateDir, "socket": c.Socket, "bpffs": c.BPFFS, "key_file": c.KeyFile,
		"container_state.docker": c.Containers.Docker, "container_state.containerd": c.Containers.Containerd,
		"container_state.podman_run": c.Containers.PodmanRun, "container_state.podman_lib": c.Containers.PodmanLib} {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("%s: %q is not an absolute path", key, path)
		}
	}
	if len(c.Socket) > 100 {
		return fmt.Errorf("socket: %q is longer than a unix socket's path may be", c.Socket)
	}
	if c.CgroupRoot != auto && !filepath.IsAbs(c.CgroupRoot) {
		return fmt.Errorf("cgroup_root: %q is neither %q nor an absolute path", c.CgroupRoot, auto)
	}
	if rel, err := filepath.Rel(c.StateDir, c.KeyFile); err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
		return fmt.Errorf("key_file: %s lies inside state_dir, where a copy of the state would take its key along", c.KeyFile)
	}
	if c.ListenPort < 1 || c.ListenPort > 65535 {
		return fmt.Errorf("listen_port: %d is not a port from 1 to 65535", c.ListenPort)
	}
	if n := len(c.Interface); n == 0 || n > 15 || strings.ContainsAny(c.Interface, "/: \t\n") || c.Interface[0] == '.' {
		return fmt.Errorf("interface: %q is not a device name of 1 to 15 letters", c.Interface)
	}
	if _, err := c.endpoints(); err != nil {
		return err
	}
	switch reconcile.OnLeaseEnd(c.OnLeaseEnd) {
	case reconcile.DenyAll, reconcile.DenyNew, reconcile.Static:
	default:
		return fmt.Errorf("on_lease_end: %q is none of deny-all, deny-new, static", c.OnLeaseEnd)
	}
	if err := dataplane.CheckGaps(c.AcceptGaps); err != nil {
		return fmt.Errorf("accept_gaps: %w", err)
	}
	if err := dataplane.HandshakeGuard(c.Handshakes).Check(); err != nil {
		return fmt.Errorf("handshake_guard: %w", err)
	}
	return c.checkBuilt()
}

// checkBuilt refuses by name what is known and not built yet.
func (c *Config) checkBuilt() error {
	switch c.Tunnel {
	case dataplane.TunnelAuto, dataplane.TunnelUserspace, dataplane.TunnelKernel:
	default:
		return fmt.Errorf("tunnel: %q is none of auto, userspace, kernel", c.Tunnel)
	}
	if c.WorkloadAPI != "" && c.WorkloadAPI != defaultWorkloadAPI {
		return fmt.Errorf("workload_api: serving the Workload API is %w; remove the key", policy.ErrNotBuilt)
	}
	if c.Metrics != "" && c.Metrics != defaultMetrics {
		return fmt.Errorf("metrics: serving metrics is %w; remove the key", policy.ErrNotBuilt)
	}
	if c.FlowLog.SpoolBytes != defaultSpool {
		return fmt.Errorf("flow_log.spool_bytes: the spool is %w; remove the key", policy.ErrNotBuilt)
	}
	if c.FlowLog.File != "" && !filepath.IsAbs(c.FlowLog.File) {
		return fmt.Errorf("flow_log.file: %q is not an absolute path", c.FlowLog.File)
	}
	return nil
}

// notServed names what the configuration asks for and this version does not have.
func (c *Config) notServed() []string {
	var out []string
	if c.WorkloadAPI != "" {
		out = append(out, "workload_api: the Workload API is not built yet; nothing listens at "+c.WorkloadAPI)
	}
	if c.Metrics != "" {
		out = append(out, "metrics: not built yet; nothing listens at "+c.Metrics)
	}
	return out
}

// endpoints reads the key endpoints: ip or ip:port, the latter for a forwarded port.
func (c *Config) endpoints() ([]netip.AddrPort, error) {
	var out []netip.AddrPort
	for _, s := range c.Endpoints {
		ap, err := netip.ParseAddrPort(s)
		if err != nil {
			a, aerr := netip.ParseAddr(s)
			if aerr != nil {
				return nil, fmt.Errorf("endpoints: %q is neither an IP address nor IP:PORT", s)
			}
			ap = netip.AddrPortFrom(a, uint16(c.ListenPort))
		}
		if ap.Port() == 0 || !ap.Addr().IsGlobalUnicast() {
			return nil, fmt.Errorf("endpoints: %q is not an address that other hosts can reach", s)
		}
		out = append(out, netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()))
	}
	return out, nil
}

var errAddress = errors.New("expected HOST:PORT")

func checkAddress(addr string) error {
	i := strings.LastIndexByte(addr, ':')
	if i <= 0 {
		return fmt.Errorf("%q: %w", addr, errAddress)
	}
	if n, err := strconv.ParseUint(addr[i+1:], 10, 16); err != nil || n == 0 || strings.ContainsAny(addr, " \t\n/") {
		return fmt.Errorf("%q: %w", addr, errAddress)
	}
	return nil
}
