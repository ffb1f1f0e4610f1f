package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"github.com/signet-overlay/signet/internal/identity"
)

// Limits of the saved hints; more are not kept.
const (
	maxHintNodes     = 1 << 14
	maxHintsPerNode  = 16
	hintsRemedy      = "remove it; peers are found again when the coordinator is reached"
	switchFileRemedy = "run signet up"
)

// SaveHints keeps where nodes were last reached, best first.
func (d *Dir) SaveHints(hints map[string][]netip.AddrPort) error {
	b, err := json.Marshal(hints)
	if err != nil {
		return fmt.Errorf("encode endpoints: %w", err)
	}
	return d.save(fileHints, b)
}

// LoadHints returns what SaveHints got. Without it, hosts find each other as soon as the coordinator is reached, so a
// Problem here is a warning and the map is empty.
func (d *Dir) LoadHints() (map[string][]netip.AddrPort, error) {
	b, err := d.load(fileHints, hintsRemedy)
	if errors.Is(err, ErrNone) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	hints, err := parseHints(b)
	if err != nil {
		return nil, &Problem{File: d.file(fileHints), Problem: "does not hold endpoints", Remedy: hintsRemedy, cause: err}
	}
	return hints, nil
}

func parseHints(b []byte) (map[string][]netip.AddrPort, error) {
	var hints map[string][]netip.AddrPort
	if err := decodeStrict(b, &hints); err != nil {
		return nil, err
	}
	if len(hints) > maxHintNodes {
		return nil, fmt.Errorf("%d nodes, at most %d", len(hints), maxHintNodes)
	}
	for node, list := range hints {
		if err := identity.ParseName(node); err != nil {
			return nil, fmt.Errorf("node of endpoints: %w", err)
		}
		if len(list) > maxHintsPerNode {
			return nil, fmt.Errorf("%d endpoints of %s, at most %d", len(list), node, maxHintsPerNode)
		}
	}
	return hints, nil
}

// Switch is what the operator said last.
type Switch string

// The positions.
const (
	Up       Switch = "up"
	Down     Switch = "down"     // deny everything
	Released Switch = "released" // and guard nothing: signet down --release
)

// SaveSwitch remembers what the operator said.
func (d *Dir) SaveSwitch(s Switch) error { return d.save(fileSwitch, []byte(s)) }

// LoadSwitch returns what the operator said last. What cannot be read counts as down: only that guess lets nothing
// through and leaves the guards in place.
func (d *Dir) LoadSwitch() (Switch, error) {
	b, err := d.load(fileSwitch, switchFileRemedy)
	if errors.Is(err, ErrNone) {
		return Up, nil
	}
	if err != nil {
		return Down, err
	}
	switch s := Switch(b); s {
	case Up, Down, Released:
		return s, nil
	}
	return Down, &Problem{File: d.file(fileSwitch), Problem: "says neither up nor down", Remedy: switchFileRemedy}
}
