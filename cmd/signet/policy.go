package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/api/client"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policydoc"
)

func (a *app) policyCommand() *cobra.Command {
	return a.parent("policy", "The document that says what may talk to what", "  signet policy get\n  signet policy apply policy.yaml --wait", groupAdmin,
		a.policyGetCommand(), a.policyCheckCommand(), a.policyTestCommand(), a.policyApplyCommand(),
		a.leaf(command{use: "history", short: "List the policy's revisions, newest first", example: "  signet policy history", run: a.policyHistory}),
		a.policyRollbackCommand(),
		a.unbuilt("plan", "Show what recorded flows a document would change"),
		a.unbuilt("suggest", "Propose least-privilege rules from recorded flows"),
	)
}

func (a *app) policyGetCommand() *cobra.Command {
	var revision uint64
	var dir string
	c := a.leaf(command{
		use: "get", short: "Print the document in force, or that of a revision",
		example: "  signet policy get > policy.yaml\n  signet policy get --revision 16\n  signet policy get --dir policies/",
		run: func(ctx context.Context, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			p, err := getPolicy(ctx, c, revision)
			if err != nil {
				return err
			}
			if dir != "" {
				return a.savePolicy(p, dir)
			}
			if a.flags.output != formatTable {
				return a.print(p, nil)
			}
			return a.printPolicy(p)
		},
	})
	c.Flags().Uint64Var(&revision, "revision", 0, "revision to print instead of the one in force")
	c.Flags().StringVar(&dir, "dir", "", "write the files into this new directory instead")
	return c
}

func getPolicy(ctx context.Context, c *client.Client, revision uint64) (apitypes.Policy, error) {
	if revision != 0 {
		return c.PolicyAt(ctx, revision)
	}
	p, err := c.Policy(ctx)
	if err == nil && p.Revision == 0 {
		return p, withHint(errors.New("no policy was applied yet, so everything is denied"), "apply one with: signet policy apply FILE")
	}
	return p, err
}

func (a *app) printPolicy(p apitypes.Policy) error {
	for _, f := range p.Files {
		text := f.Data
		if isTerminal(a.env.Out) {
			text = safeText(text)
		}
		if len(p.Files) > 1 {
			text = fmt.Sprintf("# %s\n%s", safe(f.Name), text)
		}
		if _, err := io.WriteString(a.env.Out, text); err != nil {
			return fmt.Errorf("write output: %w", err)
		}
	}
	if len(p.Files) > 1 {
		say(a.env.Err, "note: the policy has %d files; write them with --dir", len(p.Files))
	}
	return nil
}

// savePolicy writes into a directory that it makes. os.Root keeps names that the API gave from leading elsewhere.
func (a *app) savePolicy(p apitypes.Policy, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("write policy: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("write policy: %w", err)
	}
	defer func() { _ = root.Close() }()
	for _, f := range p.Files {
		if err := root.MkdirAll(filepath.Dir(f.Name), 0o755); err != nil {
			return fmt.Errorf("write policy: %w", err)
		}
		if err := root.WriteFile(f.Name, []byte(f.Data), 0o644); err != nil {
			return fmt.Errorf("write policy: %w", err)
		}
	}
	return a.done(p, "revision %d: %d files written to %s", p.Revision, len(p.Files), dir)
}

func (a *app) policyHistory(ctx context.Context, _ []string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	list, err := c.History(ctx)
	if err != nil {
		return err
	}
	return a.print(apitypes.RevisionList{Revisions: list}, func(w io.Writer) {
		row(w, "REVISION", "TIME", "BY", "NOTE", "STATE")
		for _, r := range list {
			current := ""
			if r.Current {
				current = "in force"
			}
			row(w, r.Revision, when(r.Time), r.By, r.Note, current)
		}
	})
}

const fileHelp = "FILE is a document, a directory of them (read as one), or - for standard input.\n\n"

func (a *app) policyCheckCommand() *cobra.Command {
	var td string
	c := a.leaf(command{
		use: "check FILE", short: "Say what is wrong with a document", args: exactly("FILE"),
		long:    fileHelp + "With an API the coordinator checks it and runs its tests. Without one it is read here, as for --trust-domain; tests are not run.",
		example: "  signet policy check policy.yaml\n  signet policy check policies/ --trust-domain settler.example",
		run: func(ctx context.Context, args []string) error {
			check, tested, err := a.check(ctx, args[0], td)
			if err != nil {
				return err
			}
			return a.reportCheck(check, tested)
		},
	})
	c.Flags().StringVar(&td, "trust-domain", "", "trust domain to read the document for, where no API is named")
	return c
}

func (a *app) policyTestCommand() *cobra.Command {
	var td string
	c := a.leaf(command{
		use: "test FILE", short: "Run a document's tests, and show each", args: exactly("FILE"),
		long:    fileHelp + "The coordinator runs the tests: an API must be named. Without one the document is only read, and the command fails.",
		example: "  signet policy test policy.yaml\n  signet policy test policy.yaml -o json",
		run: func(ctx context.Context, args []string) error {
			check, tested, err := a.check(ctx, args[0], td)
			if err != nil {
				return err
			}
			if !tested && len(check.Errors) == 0 {
				return withHint(errors.New("the document is valid, but its tests were not run: the coordinator runs them"), "give --api URL and --token-file FILE")
			}
			return a.reportTests(check)
		},
	})
	c.Flags().StringVar(&td, "trust-domain", "", "trust domain to read the document for, where no API is named")
	return c
}

// check asks the API, or reads the document here; tested is false in the second case.
func (a *app) check(ctx context.Context, path, td string) (check apitypes.PolicyCheck, tested bool, err error) {
	d, err := a.readDocument(path)
	if err != nil {
		return check, false, err
	}
	has, err := a.hasAPI()
	if err != nil {
		return check, false, err
	}
	if !has {
		check, err = checkHere(d, td)
		return check, false, err
	}
	c, err := a.client()
	if err != nil {
		return check, false, err
	}
	if check, err = c.CheckPolicy(ctx, d.files); err != nil {
		return check, false, d.localised(err)
	}
	check.Errors = d.issues(check.Errors)
	for i := range check.Warnings {
		check.Warnings[i] = d.show(check.Warnings[i])
	}
	for i := range check.Tests {
		check.Tests[i].At, check.Tests[i].Text = d.show(check.Tests[i].At), d.show(check.Tests[i].Text)
	}
	return check, true, nil
}

func checkHere(d document, name string) (apitypes.PolicyCheck, error) {
	check := apitypes.PolicyCheck{Errors: []apitypes.Issue{}, Warnings: []string{}, Tests: []apitypes.TestResult{}}
	if name == "" {
		return check, usagef("no API is named, so the document must be read here: give --trust-domain")
	}
	td, err := identity.ParseTrustDomain(name)
	if err != nil {
		return check, usageError{err}
	}
	_, warnings, err := policydoc.Parse(td, d.sources())
	for _, w := range warnings {
		check.Warnings = append(check.Warnings, d.show(w.String()))
	}
	var list policydoc.Errors
	if err != nil && !errors.As(err, &list) {
		return check, err
	}
	for _, e := range list {
		check.Errors = append(check.Errors, apitypes.Issue{File: d.local[e.Pos.File], Line: e.Pos.Line, Column: e.Pos.Column, Text: d.show(e.Error())})
	}
	check.OK = err == nil
	return check, nil
}

// reportCheck prints warnings and faults where people look for them, and fails where there are faults.
func (a *app) reportCheck(check apitypes.PolicyCheck, tested bool) error {
	err := a.print(check, func(w io.Writer) {
		for _, warning := range check.Warnings {
			say(a.env.Err, "%s", warning)
		}
		if check.OK && tested {
			say(w, "ok: no errors, %d tests pass", len(check.Tests))
		} else if check.OK {
			say(w, "ok: no errors; tests were not run, because no API is named")
		}
		for _, t := range check.Tests {
			if !t.OK {
				say(a.env.Err, "%s", t.Text)
			}
		}
	})
	if err != nil {
		return err
	}
	return verdict(check)
}

// verdict is the error of a document that is not well.
func verdict(check apitypes.PolicyCheck) error {
	if check.OK {
		return nil
	}
	failed := 0
	for _, t := range check.Tests {
		if !t.OK {
			failed++
		}
	}
	p := &apitypes.Problem{Code: apitypes.CodePolicyInvalid, Detail: "the policy document has errors", Hint: "correct them, then check it again", Errors: check.Errors}
	if len(check.Errors) == 0 {
		p = &apitypes.Problem{Code: apitypes.CodePolicyTests, Detail: fmt.Sprintf("%d of %d tests of the policy document fail", failed, len(check.Tests)), Hint: "correct the rules or the tests"}
	}
	return p
}

func (a *app) reportTests(check apitypes.PolicyCheck) error {
	err := a.print(check, func(w io.Writer) {
		if len(check.Errors) > 0 {
			return
		}
		row(w, "RESULT", "FROM", "TO", "PORT", "EXPECTED", "GOT", "WHY", "AT")
		for _, t := range check.Tests {
			result, why := "ok", t.Code
			if !t.OK {
				result = "FAILS"
			}
			if t.Rule != "" {
				why += " (" + t.Rule + ")"
			}
			row(w, result, t.From, t.To, t.Port, t.Expect, t.Got, why, t.At)
		}
	})
	if err != nil {
		return err
	}
	return verdict(check)
}

func (a *app) policyApplyCommand() *cobra.Command {
	var wait waitOptions
	var base uint64
	var c *cobra.Command
	c = a.leaf(command{
		use: "apply FILE", short: "Check, test and commit a document; prints its revision", args: exactly("FILE"),
		long:    fileHelp + "A document with errors or failing tests is refused, and nothing changes. With --wait the command ends when every connected host has it.",
		example: "  signet policy apply policy.yaml\n  signet policy apply policies/ --wait --timeout 2m\n  signet policy apply policy.yaml --base 17   # only if nobody else changed it",
		run: func(ctx context.Context, args []string) error {
			d, err := a.readDocument(args[0])
			if err != nil {
				return err
			}
			api, err := a.client()
			if err != nil {
				return err
			}
			var only *uint64
			if c.Flags().Changed("base") {
				only = &base
			}
			applied, err := api.ApplyPolicy(ctx, d.files, only)
			if err != nil {
				return d.localised(err)
			}
			for i, w := range applied.Warnings {
				applied.Warnings[i] = d.show(w)
				say(a.env.Err, "%s", applied.Warnings[i])
			}
			return a.applied(ctx, api, applied, wait)
		},
	})
	wait.register(c)
	c.Flags().Uint64Var(&base, "base", 0, "commit only while this revision is in force (0: none)")
	return c
}

func (a *app) policyRollbackCommand() *cobra.Command {
	var wait waitOptions
	c := a.leaf(command{
		use: "rollback [REV]", short: "Bring an earlier document into force again, as a new revision", args: cobra.MaximumNArgs(1),
		example: "  signet policy rollback          # to the revision before\n  signet policy rollback 12 --wait",
		run: func(ctx context.Context, args []string) error {
			var revision uint64
			if len(args) > 0 {
				n, err := strconv.ParseUint(args[0], 10, 64)
				if err != nil || n == 0 {
					return usagef("%q is not a policy revision; see: signet policy history", args[0])
				}
				revision = n
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			applied, err := c.Rollback(ctx, revision)
			if err != nil {
				return err
			}
			return a.applied(ctx, c, applied, wait)
		},
	})
	wait.register(c)
	return c
}
