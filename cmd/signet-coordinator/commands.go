package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/signet-overlay/signet/coordinator"
	"github.com/signet-overlay/signet/internal/version"
)

// Exit codes (contract, head).
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

// process is everything that a run takes from outside.
type process struct {
	args     []string
	out, err io.Writer
	getenv   func(string) string
	hup      <-chan os.Signal
}

// app is one run.
type app struct {
	process
	output  string // -o
	started bool   // a command's own work has begun: an error before that is wrong usage
}

// errUsage is wrong usage that is found only after the flags were read.
var errUsage = errors.New("wrong usage")

func run(ctx context.Context, p process) int {
	a := &app{process: p}
	root := a.root()
	root.SetArgs(p.args)
	root.SetOut(p.out)
	root.SetErr(p.err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(p.err, "signet-coordinator:", err)
	if !a.started || errors.Is(err, errUsage) {
		fmt.Fprintln(p.err, "Run signet-coordinator --help for usage.")
		return exitUsage
	}
	return exitFailure
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "signet-coordinator",
		Short: "Certificate authority, registry and policy authority of a Signet mesh",
		Long: `signet-coordinator gives each host of a mesh exactly the keys, identities and rules that it needs. It is not in the
path of packets: with it gone, permitted flows go on for at least half the lease.

  signet-coordinator init --trust-domain settler.example --data-dir /var/lib/signet-coordinator
  signet-coordinator serve --config /etc/signet/coordinator.yaml`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			_ = c.Usage() // to standard error; the exit code says the rest
			return fmt.Errorf("%w: name a command", errUsage)
		},
	}
	root.PersistentFlags().StringVarP(&a.output, "output", "o", "text", "output: text or json")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if a.output != "text" && a.output != "json" {
			return fmt.Errorf("%w: --output %q, expected text or json", errUsage, a.output)
		}
		a.started = true
		return nil
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(a.initCommand(), a.serveCommand(), a.versionCommand())
	return root
}

func (a *app) initCommand() *cobra.Command {
	var o coordinator.InitOptions
	c := &cobra.Command{
		Use:   "init --trust-domain TD --data-dir DIR",
		Short: "Make the trust root, the store and the first admin API token",
		Long: `init makes a data folder: the trust root and signing keys (sealed with the key file), the store, a configuration
and the first admin API token. It overwrites nothing, and when it fails it leaves nothing behind.

Keep a copy of the key file apart from copies of the data folder: together they are the trust root.`,
		Example: "  signet-coordinator init --trust-domain settler.example --data-dir /var/lib/signet-coordinator",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.TrustDomain == "" || o.DataDir == "" {
				return fmt.Errorf("%w: init needs --trust-domain and --data-dir", errUsage)
			}
			made, err := coordinator.Init(c.Context(), o)
			if err != nil {
				return err
			}
			return a.showInit(made)
		},
	}
	f := c.Flags()
	f.StringVar(&o.TrustDomain, "trust-domain", "", "name of the trust domain, such as settler.example; it cannot be changed later")
	f.StringVar(&o.DataDir, "data-dir", "", "folder to make; it must not exist or be empty")
	f.StringVar(&o.API, "api", "", "address of the web API (default "+coordinator.DefaultAPI+")")
	f.StringVar(&o.Agents, "agents", "", "address that agents connect to (default "+coordinator.DefaultAgents+")")
	f.StringVar(&o.IPv4Pool, "ipv4-pool", "", "overlay IPv4 range, /8 to /24 (default "+coordinator.DefaultPool4+")")
	f.StringVar(&o.KeyFile, "key-file", "", "key that seals the signing keys; made when it does not exist (default DIR.key, or "+coordinator.DefaultKeyFile+" for "+coordinator.DefaultDataDir+")")
	return c
}

func (a *app) showInit(made coordinator.Initialised) error {
	if a.output == "json" {
		return json.NewEncoder(a.out).Encode(map[string]string{
			"trust_domain": made.Config.TrustDomain, "data_dir": made.Config.DataDir, "key_file": made.Config.KeyFile, "config": made.ConfigFile,
			"admin_token_file": made.AdminToken, "root_pin": hex.EncodeToString(made.Pin[:]),
			"overlay_ipv4": made.Overlay4.String(), "overlay_ipv6": made.Overlay6.String(),
		})
	}
	_, err := fmt.Fprintf(a.out, `Made the coordinator of %s.
  data         %s
  key file     %s (keep a copy elsewhere)
  admin token  %s
  overlay      %s, %s
  root pin     %s
Next: signet-coordinator serve --config %s
`, made.Config.TrustDomain, made.Config.DataDir, made.Config.KeyFile, made.AdminToken, made.Overlay4, made.Overlay6, hex.EncodeToString(made.Pin[:]), made.ConfigFile)
	return err
}

func (a *app) serveCommand() *cobra.Command {
	var file, dir, level string
	c := &cobra.Command{
		Use:   "serve (--config FILE | --data-dir DIR)",
		Short: "Run the coordinator",
		Long: `serve runs until it gets SIGTERM or SIGINT. With --data-dir alone it uses the configuration that init has left there.

SIGHUP changes nothing yet: restart to apply another configuration. Agents keep their traffic meanwhile.`,
		Example: "  signet-coordinator serve --config " + coordinator.DefaultConfigFile,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if (file == "") == (dir == "") {
				return fmt.Errorf("%w: serve needs either --config or --data-dir", errUsage)
			}
			var lvl slog.Level
			if err := lvl.UnmarshalText([]byte(level)); err != nil {
				return fmt.Errorf("%w: --log-level %q, expected debug, info, warn or error", errUsage, level)
			}
			cfg, err := readConfig(file, dir)
			if err != nil {
				return err
			}
			return a.serve(c.Context(), cfg, lvl)
		},
	}
	f := c.Flags()
	f.StringVar(&file, "config", "", "configuration file")
	f.StringVar(&dir, "data-dir", "", "data folder that init has made")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	return c
}

func readConfig(file, dir string) (coordinator.Config, error) {
	if file != "" {
		return coordinator.LoadConfig(file)
	}
	return coordinator.ConfigFor(dir)
}

func (a *app) serve(ctx context.Context, cfg coordinator.Config, level slog.Level) error {
	log := slog.New(a.handler(level))
	done := make(chan struct{})
	watched := make(chan struct{})
	go func() { // ends with serve
		defer close(watched)
		for {
			select {
			case <-a.hup:
				log.Warn("SIGHUP changes nothing yet: restart to apply another configuration")
			case <-done:
				return
			}
		}
	}()
	defer func() { close(done); <-watched }()
	err := coordinator.Serve(ctx, cfg, log, func(r coordinator.Running) {
		log.Info("coordinator runs", "trust_domain", r.TrustDomain, "agents", r.Agents.String(), "api", r.API.String(), "epoch", r.Epoch,
			"nodes", r.Nodes, "version", version.Version)
		if err := notify(a.getenv("NOTIFY_SOCKET"), "READY=1"); err != nil {
			log.Warn("cannot tell systemd that it runs", "err", err)
		}
	})
	if err == nil {
		log.Info("coordinator stopped")
	}
	return err
}

func (a *app) handler(level slog.Level) slog.Handler {
	o := &slog.HandlerOptions{Level: level}
	if a.output == "json" {
		return slog.NewJSONHandler(a.err, o)
	}
	return slog.NewTextHandler(a.err, o)
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Say which build this is",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if a.output == "json" {
				return json.NewEncoder(a.out).Encode(map[string]string{"version": version.Version})
			}
			_, err := fmt.Fprintln(a.out, "signet-coordinator", version.Version)
			return err
		},
	}
}

// notify speaks sd_notify(3); without a socket there is nobody to tell.
func notify(socket, text string) error {
	if socket == "" {
		return nil
	}
	if strings.HasPrefix(socket, "@") {
		socket = "\x00" + socket[1:]
	}
	c, err := net.Dial("unixgram", socket)
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	_, werr := c.Write([]byte(text))
	if err := errors.Join(werr, c.Close()); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}
