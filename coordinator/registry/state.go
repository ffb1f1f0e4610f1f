package registry

import (
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// NodeStatus is where a node stands in its life.
type NodeStatus string

// The statuses of a node.
const (
	NodePending NodeStatus = "pending" // enrolled with a claimed name; no workloads until approved
	NodeActive  NodeStatus = "active"
	NodeRevoked NodeStatus = "revoked" // kept as a tombstone, so that its key and name stay refused
)

// Node is one enrolled host.
type Node struct {
	Name     string
	ID       identity.ID
	Number   identity.Number
	Status   NodeStatus
	Key      key.Public // WireGuard
	SPKI     [32]byte   // SHA-256 of the node key's SubjectPublicKeyInfo
	IPv4     netip.Addr
	IPv6     netip.Addr
	Created  time.Time
	Revision uint64 // store revision of the last change that others see: status, WireGuard key or addresses

	// PrevSPKI is the node key before the last renewal. It stays good until the node renews with SPKI, so that a
	// lost reply strands no node. Zero when there is none.
	PrevSPKI  [32]byte
	Ephemeral bool // enrolled with a token made for hosts that come and go
}

// Instance is a workload placed on a node, with its stable addresses. It exists from the moment that a document's
// nodes first match, before any process runs.
type Instance struct {
	Workload identity.ID
	Number   identity.Number
	Node     string
	IPv4     netip.Addr
	IPv6     netip.Addr
	Revoked  bool
	Revision uint64
}

// State is everything that compilation needs, as of one store revision. It is immutable: readers share it.
type State struct {
	Revision       uint64 // store revision
	Incarnation    uint32 // grows when the store is restored
	TrustDomain    identity.TrustDomain
	Overlay4       netip.Prefix
	Overlay6       netip.Prefix
	Lease          time.Duration
	Policy         *policydoc.Document // never nil; empty when none was applied
	PolicyRevision uint64              // 0 when none was applied
	Nodes          map[string]Node
	Instances      []Instance // sorted by workload, then node
	Numbers        map[identity.ID]identity.Number
	RuleNumbers    map[string]uint32
}
