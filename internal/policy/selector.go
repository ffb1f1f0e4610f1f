package policy

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
)

// ErrSelector is wrapped by every refusal of a selector.
var ErrSelector = errors.New("invalid selector")

// SelectorKind names what a selector looks at.
type SelectorKind string

// The selector kinds that this version can match, and those that are known and refused by name.
const (
	SelectCgroup    SelectorKind = "cgroup"    // a path below the agent's cgroup root: that cgroup or any below it
	SelectUnit      SelectorKind = "unit"      // a systemd unit: /system.slice/NAME, owned by root
	SelectUID       SelectorKind = "uid"       // a numeric user
	SelectUser      SelectorKind = "user"      // later
	SelectGID       SelectorKind = "gid"       // later
	SelectPath      SelectorKind = "path"      // later
	SelectSHA256    SelectorKind = "sha256"    // later
	SelectContainer SelectorKind = "container" // later
	SelectInterface SelectorKind = "interface" // later
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
	case SelectUser, SelectGID, SelectPath, SelectSHA256, SelectContainer, SelectInterface:
		return Selector{}, fmt.Errorf("%w %q: selector kind %q is %w", ErrSelector, s, kind, ErrNotBuilt)
	default:
		return Selector{}, fmt.Errorf("%w %q: unknown kind %q; expected unit, cgroup or uid", ErrSelector, s, kind)
	}
	return sel, nil
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
