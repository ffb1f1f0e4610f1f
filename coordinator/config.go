package coordinator

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policydoc"
	"github.com/signet-overlay/signet/proto/codec"
)

// Defaults of the configuration; packages install these paths.
const (
	DefaultConfigFile = "/etc/signet/coordinator.yaml"
	DefaultDataDir    = "/var/lib/signet-coordinator"
	DefaultKeyFile    = "/etc/signet/coordinator.key"
	DefaultAgents     = "0.0.0.0:7443"
	DefaultAPI        = "127.0.0.1:7480"
	DefaultMetrics    = "127.0.0.1:7490"
	DefaultPool4      = "198.18.0.0/15"

	defaultX509TTL = time.Hour
	defaultJWTTTL  = 5 * time.Minute
	storeSQLite    = "sqlite"
	ipv6Auto       = "auto"

	// configName is the file that init leaves in the data folder, for serve --data-dir.
	configName = "coordinator.yaml"
)

// Bounds of what a configuration may ask for.
const (
	minLease   = 10 * time.Second
	maxLease   = codec.MaxLease - 5*time.Minute // agents believe codec.MaxLease, and Bindings begin up to 5 minutes early
	minX509TTL = 10 * time.Second
	maxX509TTL = 24 * time.Hour
	maxConfig  = 1 << 20 // bytes of the file
)

// ErrConfig is wrapped by every refusal of a configuration.
var ErrConfig = errors.New("invalid configuration")

// Config is coordinator.yaml (contract, section 1).
type Config struct {
	TrustDomain string        `yaml:"trust_domain"`
	DataDir     string        `yaml:"data_dir"`
	Listen      Listen        `yaml:"listen"`
	TLS         TLSFiles      `yaml:"tls"`
	Store       string        `yaml:"store"`
	Overlay     Overlay       `yaml:"overlay"`
	Lease       time.Duration `yaml:"lease"`
	KeyFile     string        `yaml:"key_file"`
	SVID        SVID          `yaml:"svid"`
	Export      []struct{}    `yaml:"export,notbuilt"`
}

// Listen is where the coordinator is reached.
type Listen struct {
	Agents  string `yaml:"agents"`
	API     string `yaml:"api"`
	Metrics string `yaml:"metrics"` // not built yet: empty, or DefaultMetrics, where nothing listens
}

// TLSFiles is the certificate of the web API; both or none.
type TLSFiles struct {
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
}

// Overlay is where nodes and workloads get their addresses.
type Overlay struct {
	IPv4 string `yaml:"ipv4"`
	IPv6 string `yaml:"ipv6"`
}

// SVID is the life of certificates and tokens.
type SVID struct {
	X509TTL time.Duration `yaml:"x509_ttl"`
	JWTTTL  time.Duration `yaml:"jwt_ttl"`
}

// DefaultConfig is what a file that mentions nothing means. Overlay and lease stay empty: what the store says holds.
func DefaultConfig() Config {
	return Config{DataDir: DefaultDataDir, Listen: Listen{Agents: DefaultAgents, API: DefaultAPI}, Store: storeSQLite,
		SVID: SVID{X509TTL: defaultX509TTL, JWTTTL: defaultJWTTTL}}
}

// LoadConfig reads and checks a file.
func LoadConfig(path string) (Config, error) {
	info, err := os.Stat(path)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	if info.Size() > maxConfig {
		return Config{}, fmt.Errorf("%w: %s has %d bytes, at most %d", ErrConfig, path, info.Size(), maxConfig)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	return ParseConfig(path, text)
}

// ParseConfig reads and checks the text of a file; name is what errors call it.
func ParseConfig(name string, text []byte) (Config, error) {
	cfg := DefaultConfig()
	if err := policydoc.DecodeStrict(name, text, &cfg); err != nil {
		return Config{}, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if cfg.KeyFile == "" {
		cfg.KeyFile = KeyFileFor(cfg.DataDir)
	}
	if err := cfg.Check(); err != nil {
		return Config{}, fmt.Errorf("%s: %w", name, err)
	}
	return cfg, nil
}

// ConfigFor is the configuration of a data folder alone: what init left there, or every default.
func ConfigFor(dataDir string) (Config, error) {
	path := filepath.Join(dataDir, configName)
	cfg, err := LoadConfig(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		cfg = DefaultConfig()
	case err != nil:
		return Config{}, err
	}
	cfg.DataDir = dataDir // the folder may have been moved since
	if err != nil || cfg.KeyFile == "" {
		cfg.KeyFile = KeyFileFor(dataDir)
	}
	return cfg, cfg.Check()
}

// KeyFileFor is where the key of a data folder is kept when nobody says otherwise: never inside of it, because a copy
// of the folder must not open itself.
func KeyFileFor(dataDir string) string {
	if filepath.Clean(dataDir) == DefaultDataDir {
		return DefaultKeyFile
	}
	return filepath.Clean(dataDir) + ".key"
}

// Check refuses what cannot work and what is not built yet, each by name.
func (c Config) Check() error {
	if c.Store != storeSQLite {
		if strings.HasPrefix(c.Store, "postgres://") || strings.HasPrefix(c.Store, "postgresql://") {
			return fmt.Errorf("%w: store: PostgreSQL is not built yet; use %q", ErrConfig, storeSQLite)
		}
		return fmt.Errorf("%w: store %.70q, expected %q", ErrConfig, c.Store, storeSQLite)
	}
	if c.TrustDomain != "" {
		if _, err := identity.ParseTrustDomain(c.TrustDomain); err != nil {
			return fmt.Errorf("%w: trust_domain: %w", ErrConfig, err)
		}
	}
	if c.DataDir == "" || c.KeyFile == "" {
		return fmt.Errorf("%w: data_dir and key_file must be set", ErrConfig)
	}
	if inside(c.KeyFile, c.DataDir) {
		return fmt.Errorf("%w: key_file %s lies inside data_dir %s: a copy of the data could then be opened; keep it elsewhere", ErrConfig, c.KeyFile, c.DataDir)
	}
	if _, _, err := c.Overlay.prefixes(); err != nil {
		return err
	}
	return errors.Join(c.checkListen(), c.checkTimes())
}

func (c Config) checkTimes() error {
	switch {
	case c.Lease != 0 && (c.Lease < minLease || c.Lease > maxLease):
		return fmt.Errorf("%w: lease %v, expected %v to %v", ErrConfig, c.Lease, minLease, maxLease)
	case c.SVID.X509TTL < minX509TTL || c.SVID.X509TTL > maxX509TTL:
		return fmt.Errorf("%w: svid.x509_ttl %v, expected %v to %v", ErrConfig, c.SVID.X509TTL, minX509TTL, maxX509TTL)
	case c.SVID.JWTTTL != defaultJWTTTL:
		return fmt.Errorf("%w: svid.jwt_ttl: JWT-SVIDs are not built yet; leave it at %v", ErrConfig, defaultJWTTTL)
	}
	return nil
}

// notServed names what the configuration says, as the contract's example does, and this version does not have.
func (c Config) notServed() []string {
	if c.Listen.Metrics == "" {
		return nil
	}
	return []string{"metrics: not built yet; nothing listens at " + c.Listen.Metrics}
}

// checkListen keeps the API's tokens off the network in clear.
func (c Config) checkListen() error {
	if c.Listen.Metrics != "" && c.Listen.Metrics != DefaultMetrics {
		return fmt.Errorf("%w: listen.metrics %.100q: metrics are not built yet; leave it at %s or remove the key", ErrConfig, c.Listen.Metrics, DefaultMetrics)
	}
	if (c.TLS.Cert == "") != (c.TLS.Key == "") {
		return fmt.Errorf("%w: tls.cert and tls.key go together", ErrConfig)
	}
	for key, addr := range map[string]string{"listen.agents": c.Listen.Agents, "listen.api": c.Listen.API} {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return fmt.Errorf("%w: %s %.100q, expected address:port", ErrConfig, key, addr)
		}
	}
	if c.TLS.Cert == "" && !isLoopback(c.Listen.API) {
		return fmt.Errorf("%w: listen.api %s is not a loopback address, and tls.cert is not set: tokens would cross the network in clear; set tls.cert and tls.key, or listen on %s",
			ErrConfig, c.Listen.API, DefaultAPI)
	}
	return nil
}

func isLoopback(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		return false
	}
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.Unmap().IsLoopback()
}

func inside(path, dir string) bool {
	p, err1 := filepath.Abs(path)
	d, err2 := filepath.Abs(dir)
	if err1 != nil || err2 != nil {
		return true // cannot tell: refuse
	}
	rel, err := filepath.Rel(d, p)
	return err != nil || rel == "." || rel != ".." && !strings.HasPrefix(rel, "../")
}

// prefixes returns the ranges; one that is not set, or automatic, is the zero Prefix.
func (o Overlay) prefixes() (p4, p6 netip.Prefix, err error) {
	if o.IPv4 != "" {
		if p4, err = parsePool4(o.IPv4); err != nil {
			return p4, p6, fmt.Errorf("%w: overlay.ipv4: %w", ErrConfig, err)
		}
	}
	if o.IPv6 != "" && o.IPv6 != ipv6Auto {
		if p6, err = parsePool6(o.IPv6); err != nil {
			return p4, p6, fmt.Errorf("%w: overlay.ipv6: %w", ErrConfig, err)
		}
	}
	return p4, p6, nil
}
