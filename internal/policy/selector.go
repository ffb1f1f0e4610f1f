package policy

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// ErrSelector is wrapped by every refusal of a selector.
var ErrSelector = errors.New("invalid selector")

// SelectorKind names what a selector looks at.
type SelectorKind string

// The selector kinds that a workload may name, and those that are known and refused by name.
const (
	SelectCgroup    SelectorKind = "cgroup"    // a path below the agent's cgroup root: that cgroup or any below it
	SelectUnit      SelectorKind = "unit"      // a systemd unit: /system.slice/NAME, owned by root
	SelectUID       SelectorKind = "uid"       // a numeric user
	SelectUser      SelectorKind = "user"      // later
	SelectGID       SelectorKind = "gid"       // later
	SelectPath      SelectorKind = "path"      // later
	SelectSHA256    SelectorKind = "sha256"    // later
	SelectContainer SelectorKind = "container" // KEY=VALUE: a label that the container runtime reports
	SelectInterface SelectorKind = "interface" // a network device of the host: what arrives from it and leaves by it
)

// Limits of a selector's value, in bytes.
const (
	maxInterface = 15 // the kernel's IFNAMSIZ, less the byte that ends a name
	maxLabel     = 512
)

// ErrNotBuilt is wrapped where a name of the contract is known and not built yet.
var ErrNotBuilt = errors.New("not built yet")

// Selector is one condition on a process. All selectors of a workload must hold.
type Selector struct {
	Kind  SelectorKind
	Value string
}

// ParseSelector reads kind:value.
func ParseSelector(s string) (Selector, error) {
	kind, value, ok := strings.Cut(s, ":")
	if !ok || value == "" {
		return Selector{}, fmt.Errorf("%w %q: expected kind:value, for example unit:api.service", ErrSelector, s)
	}
	sel := Selector{SelectorKind(kind), value}
	switch sel.Kind {
	case SelectCgroup:
		// One spelling for each cgroup, nothing above the root, and never the root itself: that would be every process.
		if !strings.HasPrefix(value, "/") || path.Clean(value) != value || value == "/" || strings.ContainsAny(value, "\x00\n") {
			return Selector{}, fmt.Errorf("%w %q: expected cgroup:/path below the cgroup root, without dots or doubled slashes", ErrSelector, s)
		}
	case SelectUnit:
		if strings.ContainsAny(value, "/\x00\n") || len(value) > 255 || strings.HasPrefix(value, ".") || !strings.Contains(value, ".") {
			return Selector{}, fmt.Errorf("%w %q: expected a unit's full name, for example unit:api.service", ErrSelector, s)
		}
	case SelectUID:
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil || uint32(n) == AnyUID || strconv.FormatUint(n, 10) != value {
			return Selector{}, fmt.Errorf("%w %q: expected uid:NUMBER", ErrSelector, s)
		}
	case SelectContainer:
		if !validLabel(value) {
			return Selector{}, fmt.Errorf("%w %q: expected container:KEY=VALUE, at most %d letters, none of them a control character", ErrSelector, s, maxLabel)
		}
	case SelectInterface:
		if !validInterface(value) {
			return Selector{}, fmt.Errorf("%w %q: expected interface:NAME, the name of a network device of the host, 1 to %d letters; loopback is none, every process has it",
				ErrSelector, s, maxInterface)
		}
	case SelectUser, SelectGID, SelectPath, SelectSHA256:
		return Selector{}, fmt.Errorf("%w %q: selector kind %q is %w", ErrSelector, s, kind, ErrNotBuilt)
	default:
		return Selector{}, fmt.Errorf("%w %q: unknown kind %q; expected unit, cgroup, uid, container or interface", ErrSelector, s, kind)
	}
	return sel, nil
}

// validLabel splits at the first sign =, as container runtimes do; both sides say something.
func validLabel(s string) bool {
	key, value, ok := strings.Cut(s, "=")
	return ok && key != "" && value != "" && len(s) <= maxLabel && utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// validInterface keeps the kernel's rule for names of network devices (dev_valid_name), in ASCII.
func validInterface(s string) bool {
	if len(s) > maxInterface || s == "." || s == ".." || s == "lo" {
		return false
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f || s[i] == '/' || s[i] == ':' || s[i] == '%' {
			return false
		}
	}
	return true
}

// CheckSelectors refuses a workload's selectors that cannot stand together: none at all, and a network device beside
// anything else. What arrives from a device comes out of another network namespace, whose sockets this host cannot see.
func CheckSelectors(list []Selector) error {
	if len(list) == 0 {
		return fmt.Errorf("%w: there is none", ErrSelector)
	}
	for _, s := range list {
		if s.Kind == SelectInterface && len(list) > 1 {
			return fmt.Errorf("%w %q: a network device cannot be combined with other selectors", ErrSelector, s.String())
		}
	}
	return nil
}

// String is the form that ParseSelector reads.
func (s Selector) String() string { return string(s.Kind) + ":" + s.Value }

// MarshalText writes the form that ParseSelector reads.
func (s Selector) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is ParseSelector.
func (s *Selector) UnmarshalText(b []byte) (err error) {
	*s, err = ParseSelector(string(b))
	return err
}
