package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf16"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/api/client"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// Formats of output.
const (
	formatTable = "table"
	formatJSON  = "json"
	formatJSONL = "jsonl"
)

func (a *app) checkOutput() error {
	switch a.flags.output {
	case formatTable, formatJSON, formatJSONL:
		return nil
	}
	return usagef("%q is not an output format; expected table, json or jsonl", a.flags.output)
}

// print writes v for machines, or calls table for people.
func (a *app) print(v any, table func(w io.Writer)) error {
	var err error
	switch a.flags.output {
	case formatTable:
		tw := tabwriter.NewWriter(a.env.Out, 0, 4, 2, ' ', 0)
		table(tw)
		err = tw.Flush()
	case formatJSON:
		err = encode(a.env.Out, v, "  ")
	default:
		err = encode(a.env.Out, v, "")
	}
	if err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// encode writes one JSON value and a line end. Signs that a terminal would act on are written as escapes, which is the
// same JSON.
func encode(w io.Writer, v any, indent string) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetIndent("", indent)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return err
	}
	var out strings.Builder
	for _, c := range b.String() {
		switch {
		case c == '\n' || unicode.IsPrint(c):
			out.WriteRune(c)
		case c < 0x10000:
			fmt.Fprintf(&out, `\u%04x`, c)
		default:
			high, low := utf16.EncodeRune(c)
			fmt.Fprintf(&out, `\u%04x\u%04x`, high, low)
		}
	}
	_, err := io.WriteString(w, out.String())
	return err
}

// done prints one line for people, or v for machines.
func (a *app) done(v any, format string, args ...any) error {
	return a.print(v, func(w io.Writer) { say(w, format, args...) })
}

// row writes one line of a table; every cell is escaped.
func row(w io.Writer, cells ...any) {
	text := make([]string, 0, len(cells))
	for _, c := range cells {
		s := safe(fmt.Sprint(c))
		if s == "" {
			s = "-"
		}
		text = append(text, s)
	}
	// An output that cannot be written shows when the table is flushed.
	_, _ = fmt.Fprintln(w, strings.Join(text, "\t"))
}

// say writes one line in which every text argument is escaped.
func say(w io.Writer, format string, args ...any) {
	for i, arg := range args {
		switch v := arg.(type) {
		case string:
			args[i] = safe(v)
		case error:
			args[i] = safe(v.Error())
		case fmt.Stringer:
			args[i] = safe(v.String())
		}
	}
	_, _ = fmt.Fprintf(w, format+"\n", args...)
}

// safe makes text from outside harmless for a terminal: control signs, invisible ones and those that change the
// direction of writing are written as their codes, and so are line ends, which could forge a line.
func safe(s string) string {
	clean := true
	for _, c := range s {
		if !unicode.IsPrint(c) || c == unicode.ReplacementChar {
			clean = false
			break
		}
	}
	if clean {
		return s
	}
	var b strings.Builder
	for _, c := range s {
		switch {
		case unicode.IsPrint(c) && c != unicode.ReplacementChar:
			b.WriteRune(c)
		case c < 0x100:
			fmt.Fprintf(&b, `\x%02x`, c)
		case c < 0x10000:
			fmt.Fprintf(&b, `\u%04x`, c)
		default:
			fmt.Fprintf(&b, `\U%08x`, c)
		}
	}
	return b.String()
}

// safeText is safe for text of several lines.
func safeText(s string) string {
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		fields := strings.Split(line, "\t")
		for j := range fields {
			fields[j] = safe(fields[j])
		}
		lines[i] = strings.Join(fields, "\t")
	}
	return strings.Join(lines, "\n")
}

// isTerminal reports whether w is one: then text from outside is escaped even where it is a document.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// hinted is an error with advice.
type hinted struct {
	error
	hint string
}

// Unwrap gives the cause.
func (h hinted) Unwrap() error { return h.error }

func withHint(err error, format string, args ...any) error {
	return hinted{err, fmt.Sprintf(format, args...)}
}

// complain writes an error as one plain sentence and a hint below it.
func (a *app) complain(err error) {
	text, hint := err.Error(), ""
	var h hinted
	var agent *localapi.Error
	var p *apitypes.Problem
	var faults policydoc.Errors
	switch {
	case errors.As(err, &h):
		hint = h.hint
	case errors.As(err, &agent):
		hint = agent.Hint
	case errors.As(err, &p):
		text, hint = p.Detail, p.Hint
		for _, issue := range p.Errors {
			say(a.env.Err, "%s", issue.Text)
		}
		if p.Code == apitypes.CodeUnauthorized {
			text, hint = "the API refused the token", "give another with --token-file or SIGNET_TOKEN_FILE"
		}
	case errors.As(err, &faults):
		for _, fault := range faults {
			say(a.env.Err, "%s", fault.Error())
		}
		text, hint = "the configuration has errors", "correct them, then try again"
	case errors.Is(err, client.ErrUnreachable):
		hint = "is the coordinator running, and is --api right?"
	}
	switch {
	case text == "":
		text = "signet: the command failed"
	case !strings.HasPrefix(text, "signet "): // most name another culprit than the command itself
		text = "signet: " + text
	}
	say(a.env.Err, "%s", text)
	if hint != "" {
		say(a.env.Err, "hint: %s", hint)
	}
}

// when is a time as people read it.
func when(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}

func join[T any](list []T) string {
	out := make([]string, 0, len(list))
	for _, v := range list {
		out = append(out, fmt.Sprint(v))
	}
	return strings.Join(out, ", ")
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
