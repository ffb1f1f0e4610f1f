package policydoc

import (
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// Document is one policy: zones, workloads, rules and tests, in the order of the source. A Document that exists is
// consistent: names are unique, and everything that is named is declared.
type Document struct {
	Zones     []Zone
	Workloads []Workload
	Rules     []Rule
	Tests     []Test
}

// Zone declares a group of workloads.
type Zone struct {
	Name identity.Zone
	// Confined is internet: deny: its workloads reach nothing outside the overlay and loopback.
	Confined bool
	At       Position
}

// Workload declares who a process is and on which nodes it may run.
type Workload struct {
	ID        identity.ID
	Selectors []policy.Selector // at least one; all must hold (policy.CheckSelectors)
	Nodes     []string          // globs over node names (path.Match without slashes); at least one
	Labels    map[string]string
	Serves    []policy.Service // never grants; a rule outside it warns
	// OverlayOnly is listen: overlay: what is addressed to neither its overlay addresses nor loopback opens nothing.
	OverlayOnly bool
	At          Position
}

// Rule is what a person wrote: it allows or denies, from and to patterns of identities.
type Rule struct {
	ID       string
	From, To []Pattern
	Action   policy.Action
	Services []policy.Service
	Expires  time.Time // zero: never
	// Audit is mode: audit. A deny rule denies nothing, and what it would have denied is recorded; an allow rule's
	// conditions withhold nothing, and what they would have withheld is recorded.
	Audit bool
	At    Position
}

// Pattern selects identities: exactly one of its fields is set.
type Pattern struct {
	ID     identity.ID
	Zone   identity.Zone // zone/*
	Labels map[string]string
}

// Test is one expectation that must hold before a document is committed.
type Test struct {
	From, To identity.ID
	Service  policy.Service // one protocol, one port (or none for icmp)
	Expect   flow.Verdict
	At       Position
}

// Position points into the source; lines and columns count from 1.
type Position struct {
	File         string
	Line, Column int
}
