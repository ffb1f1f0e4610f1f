package coordinator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/coordinator/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func initOptions(t *testing.T) InitOptions {
	return InitOptions{TrustDomain: "settler.example", DataDir: filepath.Join(t.TempDir(), "data"), API: "127.0.0.1:0", Agents: "127.0.0.1:0", IPv4Pool: "203.0.112.0/23"}
}

func TestInitMakesAllOrNothing(t *testing.T) {
	o := initOptions(t)
	made, err := Init(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{o.DataDir: 0o700 | os.ModeDir, made.AdminToken: 0o600, made.Config.KeyFile: 0o600, made.ConfigFile: 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v; expected mode %v", path, info, err, mode)
		}
	}
	before, err := os.ReadFile(made.AdminToken)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Init(t.Context(), o); !errors.Is(err, ErrInitialised) {
		t.Errorf("again: %v", err)
	}
	if after, err := os.ReadFile(made.AdminToken); err != nil || string(after) != string(before) {
		t.Error("the second init changed the admin token")
	}
	cfg, err := ConfigFor(o.DataDir)
	if err != nil || cfg.TrustDomain != "settler.example" || cfg.Overlay.IPv4 != o.IPv4Pool || cfg.KeyFile != o.DataDir+".key" {
		t.Errorf("ConfigFor = %+v, %v", cfg, err)
	}
}

func TestAFailedInitLeavesNothing(t *testing.T) {
	parent := t.TempDir()
	full := filepath.Join(parent, "full")
	if err := os.MkdirAll(filepath.Join(full, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx context.Context
		o   InitOptions
	}{
		"folder in use":  {t.Context(), InitOptions{TrustDomain: "a.example", DataDir: full}},
		"bad domain":     {t.Context(), InitOptions{TrustDomain: "A.example", DataDir: filepath.Join(parent, "a")}},
		"no folder":      {t.Context(), InitOptions{TrustDomain: "a.example"}},
		"key inside":     {t.Context(), InitOptions{TrustDomain: "a.example", DataDir: filepath.Join(parent, "a"), KeyFile: filepath.Join(parent, "a", "k")}},
		"bad pool":       {t.Context(), InitOptions{TrustDomain: "a.example", DataDir: filepath.Join(parent, "a"), IPv4Pool: "127.0.0.0/16"}},
		"api in clear":   {t.Context(), InitOptions{TrustDomain: "a.example", DataDir: filepath.Join(parent, "a"), API: "0.0.0.0:7480"}},
		"stopped midway": {ctx, InitOptions{TrustDomain: "a.example", DataDir: filepath.Join(parent, "a")}},
	} {
		if _, err := Init(c.ctx, c.o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	entries, err := os.ReadDir(parent)
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestServe(t *testing.T) {
	o := initOptions(t)
	made, err := Init(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := ConfigFor(o.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	token, err := os.ReadFile(made.AdminToken)
	if err != nil {
		t.Fatal(err)
	}
	var epoch uint64
	for range 2 { // and once more after a stop
		ctx, cancel := context.WithCancel(t.Context())
		running := make(chan Running, 1)
		done := make(chan error, 1)
		go func() { done <- Serve(ctx, cfg, slog.New(slog.DiscardHandler), func(r Running) { running <- r }) }()
		var r Running
		select {
		case r = <-running:
		case err := <-done:
			t.Fatal(err)
		}
		if r.TrustDomain != "settler.example" || r.Epoch <= epoch {
			t.Errorf("%+v after epoch %d", r, epoch)
		}
		epoch = r.Epoch
		if body := get(t, fmt.Sprintf("http://%s/api/v1/stats", r.API), strings.TrimSpace(string(token))); !strings.Contains(body, "203.0.112.0/23") {
			t.Errorf("stats = %s", body)
		}
		if body := get(t, fmt.Sprintf("http://%s/readyz", r.API), ""); !strings.Contains(body, "ok") {
			t.Errorf("readyz = %s", body)
		}
		if err := Serve(t.Context(), cfg, slog.New(slog.DiscardHandler), nil); !errors.Is(err, store.ErrLocked) {
			t.Errorf("a second coordinator over one folder: %v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func get(t *testing.T, url, token string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("%s: %s %v", url, resp.Status, err)
	}
	return string(body)
}

func TestServeRefusals(t *testing.T) {
	o := initOptions(t)
	if _, err := Init(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	good, err := ConfigFor(o.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"never initialised":  func(c *Config) { c.DataDir = t.TempDir() },
		"no key file":        func(c *Config) { c.KeyFile += ".gone" },
		"another domain":     func(c *Config) { c.TrustDomain = "other.example" },
		"address in use":     func(c *Config) { c.Listen.API = "127.0.0.1:99999" },
		"missing tls files":  func(c *Config) { c.TLS = TLSFiles{Cert: "/none", Key: "/none"} },
		"foreign agent host": func(c *Config) { c.Listen.Agents = "192.0.2.1:7443" },
	} {
		cfg := good
		change(&cfg)
		if err := Serve(t.Context(), cfg, slog.New(slog.DiscardHandler), nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestConfigRefusals(t *testing.T) {
	for text, want := range map[string]string{
		"store: postgres://u@h/db":                "PostgreSQL is not built yet",
		"store: mysql":                            "sqlite",
		"export: [{name: a}]":                     "export",
		"listen: {metrics: \"127.0.0.1:7491\"}":   "metrics are not built yet",
		"listen: {metrics: \"0.0.0.0:7490\"}":     "listen.metrics",
		"overlay: {ipv4: 100.64.0.0/16}":          "Tailscale",
		"listen: {api: \"0.0.0.0:7480\"}":         "tls.cert",
		"listen: {api: \":7480\"}":                "tls.cert",
		"listen: {api: nowhere}":                  "listen.api",
		"tls: {cert: a}":                          "go together",
		"svid: {jwt_ttl: 1m}":                     "JWT-SVIDs are not built yet",
		"svid: {x509_ttl: 1s}":                    "x509_ttl",
		"lease: 1s":                               "lease",
		"lease: 1000h":                            "lease",
		"key_file: /var/lib/signet-coordinator/k": "inside data_dir",
		"trust_domain: Settler.example":           "trust_domain",
		"overlay: {ipv4: 224.0.0.0/8}":            "overlay.ipv4",
		"overlay: {ipv6: \"fe80::/64\"}":          "overlay.ipv6",
		"colour: blue":                            "colour",
		"data_dir: [a]":                           "data_dir",
	} {
		if _, err := ParseConfig("coordinator.yaml", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, expected %q", text, err, want)
		}
	}
}

func TestExampleConfig(t *testing.T) {
	cfg, err := LoadConfig("../deploy/examples/coordinator.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultConfig()
	want.TrustDomain, want.KeyFile, want.Lease = "settler.example", DefaultKeyFile, 24*time.Hour
	want.Overlay = Overlay{IPv4: DefaultPool4, IPv6: ipv6Auto}
	if fmt.Sprint(cfg) != fmt.Sprint(want) {
		t.Errorf("the example says %+v, the defaults are %+v", cfg, want)
	}
}

// The example of the contract, section 1, as it stands there.
const contractExample = `
# /etc/signet/coordinator.yaml
trust_domain: settler.example
data_dir: /var/lib/signet-coordinator
listen:
  agents: 0.0.0.0:7443        # gRPC, TLS 1.3
  api: 127.0.0.1:7480         # web API and UI; TLS when tls.cert is set, refused on a non-loopback address without
  metrics: 127.0.0.1:7490     # Prometheus
store: sqlite                 # or postgres://user@host/db?sslmode=verify-full
overlay: {ipv4: 198.18.0.0/15, ipv6: auto}   # ipv6: a /48 derived from the trust domain. Refused, culprit named, where it overlaps a host's routes,
                                             # addresses or another overlay's filter (Tailscale drops foreign 100.64.0.0/10)
lease: 24h                    # life of Bindings and snapshots; renewed at half-life; never tied to the SVID's life
key_file: /etc/signet/coordinator.key   # encrypts authority keys at rest; outside data_dir, 0600, or a systemd credential, or PKCS#11 (later)
svid: {x509_ttl: 1h, jwt_ttl: 5m}
export: []                    # SIEM sinks, see 6
`

func TestTheContractsExampleParses(t *testing.T) {
	cfg, err := ParseConfig("coordinator.yaml", []byte(contractExample))
	if err != nil {
		t.Fatal(err)
	}
	if cfg.TrustDomain != "settler.example" || cfg.Lease != 24*time.Hour || cfg.KeyFile != DefaultKeyFile || cfg.Overlay != (Overlay{DefaultPool4, ipv6Auto}) {
		t.Errorf("%+v", cfg)
	}
	if got := cfg.notServed(); len(got) != 1 || got[0] != "metrics: not built yet; nothing listens at 127.0.0.1:7490" {
		t.Errorf("reported: %q", got)
	}
	if got := DefaultConfig().notServed(); len(got) != 0 {
		t.Errorf("without the key: %q", got)
	}
}

func TestWhatIsNotServedIsLoggedOnce(t *testing.T) {
	o := initOptions(t)
	if _, err := Init(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	cfg, err := ConfigFor(o.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Listen.Metrics = DefaultMetrics
	ctx, cancel := context.WithCancel(t.Context())
	var log strings.Builder
	if err := Serve(ctx, cfg, slog.New(slog.NewTextHandler(&log, nil)), func(Running) { cancel() }); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(log.String(), "metrics: not built yet; nothing listens at 127.0.0.1:7490"); n != 1 {
		t.Errorf("%d lines:\n%s", n, log.String())
	}
}

func TestRoutes(t *testing.T) {
	for line, want := range map[string]string{
		"Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT": "",
		"eth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0":                                    "0.0.0.0/0 eth0",
		"tun0 000012C6 00000000 0001 0 0 0 0000FEFF 0 0 0":                                    "198.18.0.0/15 tun0",
		"*    0000000A 00000000 0201 0 0 0 000000FF 0 0 0":                                    "",
		"eth0 xyz 0 0 0 0 0 0": "",
	} {
		checkRoute(t, line, want, route4)
	}
	const none = "00000000000000000000000000000000"
	for line, want := range map[string]string{
		"fd000000000000000000000000000000 40 " + none + " 00 " + none + " 00000100 00000001 00000000 00000001 eth0": "fd00::/64 eth0",
		"fd000000000000000000000000000000 08 " + none + " 00 " + none + " 00000100 00000001 00000000 00200200 lo":   "",
		"fd00 40": "",
	} {
		checkRoute(t, line, want, route6)
	}
	if err := addRoutes(map[netip.Prefix]string{}); err != nil { // of this machine
		t.Error(err)
	}
}

func checkRoute(t *testing.T, line, want string, parse func([]string) (netip.Prefix, string, bool)) {
	t.Helper()
	got := ""
	if p, dev, ok := parse(strings.Fields(line)); ok {
		got = p.String() + " " + dev
	}
	if got != want {
		t.Errorf("%s: %q, want %q", line, got, want)
	}
}

func TestPools(t *testing.T) {
	for pool, ok := range map[string]bool{
		"198.18.0.0/15": true, "10.0.0.0/8": true, "100.128.0.0/16": true, "100.64.0.0/24": false, "100.64.0.0/10": false, "100.96.0.0/12": false, "100.0.0.0/8": false,
		"0.0.0.0/0": false, "10.0.0.0/25": false, "127.0.0.0/8": false, "224.0.0.0/8": false, "240.0.0.0/8": false, "169.254.0.0/16": false,
		"10.0.0.1/8": false, "fd00::/48": false, "10.0.0.0": false, "": false, "0.0.0.0/8": false,
	} {
		if _, err := parsePool4(pool); (err == nil) != ok {
			t.Errorf("%q: %v", pool, err)
		}
	}
	networks := map[netip.Prefix]string{netip.MustParsePrefix("10.1.2.0/24"): "eth0"}
	if err := checkOverlap(netip.MustParsePrefix("10.0.0.0/8"), networks); err == nil || !strings.Contains(err.Error(), "eth0") {
		t.Errorf("overlap: %v", err)
	}
	if err := checkOverlap(netip.MustParsePrefix("198.18.0.0/15"), networks); err != nil {
		t.Error(err)
	}
}
