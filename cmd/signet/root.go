package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-overlay/signet/agent/localapi"
)

// Exit codes (contract, head).
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

// environment is everything that a run takes from its process.
type environment struct {
	Args     []string
	In       io.Reader
	Out, Err io.Writer
	Getenv   func(string) string
}

// app is one run of the command.
type app struct {
	env   environment
	flags globalFlags
	// started is set when a command's own work begins: an error before that is wrong usage.
	started bool
	poll    time.Duration // between looks at a rollout
	now     func() time.Time
}

type globalFlags struct {
	api, tokenFile, caFile, context, socket, output string
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, env environment) int {
	return newApp(env).run(ctx)
}

func newApp(env environment) *app {
	return &app{env: env, poll: 500 * time.Millisecond, now: time.Now}
}

func (a *app) run(ctx context.Context) int {
	root := a.root()
	root.SetArgs(a.env.Args)
	root.SetIn(a.env.In)
	root.SetOut(a.env.Out)
	root.SetErr(a.env.Err)
	err := root.ExecuteContext(ctx)
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, new(usageError)) || !a.started:
		a.complain(err)
		return exitUsage
	}
	a.complain(err)
	return exitFailure
}

// usageError is an error of whoever typed the command.
type usageError struct{ error }

// Unwrap gives the cause.
func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

const rootLong = `signet shows and changes what may talk to what.

Commands of this host ask the agent at --socket. The others ask the coordinator's API, which is named by --api and
--token-file, by SIGNET_API and SIGNET_TOKEN_FILE, or by a context in ~/.config/signet/config.yaml:

  context: prod
  contexts:
    prod: {api: "https://coord.settler.example:7480", token_file: /home/ada/.signet/token, ca_file: /etc/ssl/coord.pem}

A token file must not be readable by others. Exit codes: 0 done, 1 failed, 2 wrong usage.`

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "signet",
		Short:         "Show and change what may talk to what",
		Long:          rootLong,
		Example:       "  signet status\n  signet explain --from app/api-server --to data/postgres --port tcp/5432\n  signet policy apply policy.yaml --wait",
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			return a.checkOutput()
		},
	}
	f := root.PersistentFlags()
	f.StringVar(&a.flags.api, "api", "", "address of the coordinator's API (SIGNET_API)")
	f.StringVar(&a.flags.tokenFile, "token-file", "", "file with an API token (SIGNET_TOKEN_FILE)")
	f.StringVar(&a.flags.caFile, "ca-file", "", "PEM certificates to trust instead of the system's, for the API")
	f.StringVar(&a.flags.context, "context", "", "context of ~/.config/signet/config.yaml to use")
	f.StringVar(&a.flags.socket, "socket", localapi.DefaultSocket, "socket of this host's agent")
	f.StringVarP(&a.flags.output, "output", "o", formatTable, "table, json or jsonl")
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see: %s --help", err, c.CommandPath())}
	})
	root.AddGroup(&cobra.Group{ID: groupLocal, Title: "This host:"}, &cobra.Group{ID: groupAdmin, Title: "The mesh:"})
	root.RunE = a.group(root)
	root.AddCommand(a.localCommands()...)
	root.AddCommand(a.nodeCommand(), a.workloadCommand(), a.policyCommand(), a.explainCommand())
	root.AddCommand(a.unbuiltCommands()...)
	root.SetHelpCommandGroupID(groupLocal)
	root.SetCompletionCommandGroupID(groupLocal)
	return root
}

// Groups in --help.
const (
	groupLocal = "local"
	groupAdmin = "admin"
)

// command is one leaf of the tree.
type command struct {
	use, short, long, example string
	group                     string
	args                      cobra.PositionalArgs
	run                       func(ctx context.Context, args []string) error
}

// leaf makes a cobra command whose errors are told apart from wrong usage.
func (a *app) leaf(c command) *cobra.Command {
	if c.args == nil {
		c.args = exactly()
	}
	return &cobra.Command{
		Use: c.use, Short: c.short, Long: c.long, Example: c.example, GroupID: c.group,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := c.args(cmd, args); err != nil {
				return usageError{fmt.Errorf("%w; see: %s --help", err, cmd.CommandPath())}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			a.started = true
			return c.run(cmd.Context(), args)
		},
	}
}

// exactly wants one argument for each name. Its errors do not repeat what was typed: it may be a token in the wrong place.
func exactly(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) > len(names) && len(names) == 0:
			return fmt.Errorf("%s takes no arguments", cmd.CommandPath())
		case len(args) > len(names):
			return fmt.Errorf("%s takes %s and nothing more", cmd.CommandPath(), strings.Join(names, " "))
		case len(args) < len(names):
			return fmt.Errorf("%s needs %s", cmd.CommandPath(), strings.Join(names[len(args):], " "))
		}
		return nil
	}
}

// parent makes a command that only has others below it.
func (a *app) parent(use, short, example, group string, children ...*cobra.Command) *cobra.Command {
	p := &cobra.Command{Use: use, Short: short, Example: example, GroupID: group}
	p.RunE = a.group(p)
	p.AddCommand(children...)
	return p
}

// group answers a command without a verb, or with one that does not exist: wrong usage, where cobra alone would print
// help and succeed.
func (a *app) group(c *cobra.Command) func(*cobra.Command, []string) error {
	c.Args = cobra.ArbitraryArgs
	c.SuggestionsMinimumDistance = 2
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			cmd.SetOut(a.env.Err)
			if err := cmd.Help(); err != nil {
				return fmt.Errorf("print help: %w", err)
			}
			return usagef("%s needs a command", cmd.CommandPath())
		}
		hint := ""
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			hint = fmt.Sprintf("did you mean %q? ", near[0])
		}
		return usagef("%q is not a command of %s; %ssee: %s --help", args[0], cmd.CommandPath(), hint, cmd.CommandPath())
	}
}
