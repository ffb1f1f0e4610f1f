package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"
)

// errNotBuilt is wrapped by the refusal of everything that the contract names and this version lacks.
var errNotBuilt = errors.New("is not built yet")

func notBuilt(what string) error { return fmt.Errorf("%s %w", what, errNotBuilt) }

// unbuiltCommands stand in the tree so that they are refused by name, and not taken for a typing error.
func (a *app) unbuiltCommands() []*cobra.Command {
	return []*cobra.Command{
		a.parent("svid", "Certificates and tokens of workloads (not built yet)", "  signet svid x509", groupLocal,
			a.unbuilt("x509", "Fetch this process's X.509-SVID"), a.unbuilt("jwt", "Fetch a JWT-SVID")),
		a.grouped(groupLocal, a.unbuilt("bugreport", "Collect what is needed to look into a fault")),
		a.parent("audit", "The audit log (not built yet)", "  signet audit list", groupAdmin,
			a.unbuilt("list", "List the audit log"), a.unbuilt("verify", "Check the audit log's hash chain")),
		a.parent("ca", "Authorities (not built yet)", "  signet ca show", groupAdmin,
			a.unbuilt("show", "Show the authorities"), a.unbuilt("rotate", "Prepare, activate or retire an authority")),
		a.parent("token", "API tokens (not built yet)", "  signet token list", groupAdmin,
			a.unbuilt("create", "Make an API token"), a.unbuilt("list", "List API tokens"), a.unbuilt("revoke", "Revoke an API token")),
		a.grouped(groupAdmin, a.unbuilt("report", "Evidence for soc2, pci-dss or gdpr")),
	}
}

func (a *app) grouped(group string, c *cobra.Command) *cobra.Command {
	c.GroupID = group
	return c
}

// unbuilt takes any flags and arguments, so that the refusal names the verb and not a flag.
func (a *app) unbuilt(use, short string) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short + " (not built yet)", Long: short + ".\n\nThis version does not have it yet.", DisableFlagParsing: true, Args: cobra.ArbitraryArgs}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		a.started = true
		if slices.Contains(args, "--help") || slices.Contains(args, "-h") {
			return cmd.Help()
		}
		return notBuilt(cmd.CommandPath())
	}
	c.PersistentPreRunE = func(*cobra.Command, []string) error { return nil }
	c.Example = "  (not built yet)"
	return c
}

// refuseFlags refuses flags of the contract that are not built yet.
func refuseFlags(cmd *cobra.Command, names ...string) error {
	for _, name := range names {
		if cmd.Flags().Changed(name) {
			return notBuilt(cmd.CommandPath() + " --" + name)
		}
	}
	return nil
}
