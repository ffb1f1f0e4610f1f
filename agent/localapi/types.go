package localapi

import (
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
)

// DefaultSocket is where packages put the agent's socket.
const DefaultSocket = "/run/signet/agent.sock"

// State is the agent's standing in one word.
type State string

// The states.
const (
	StateNeedsEnrolment State = "needs-enrolment" // no identity; waits for signet up
	StatePending        State = "pending"         // enrolled; an operator has to approve the node
	StateRunning        State = "running"
	StateDegraded       State = "degraded" // something is wrong; Warnings say what. Nothing is let through because of it
	StateDown           State = "down"     // signet down: denies everything
)

// Status is the answer to GET /v1/status.
type Status struct {
	Version     string      `json:"version"`
	State       State       `json:"state"`
	Node        Node        `json:"node"`
	Connected   bool        `json:"connected"`
	Coordinator string      `json:"coordinator"`
	Revision    uint64      `json:"revision"` // policy revision that is enforced
	Epoch       uint64      `json:"epoch"`
	LeaseEnds   time.Time   `json:"lease_ends,omitzero"`
	Tunnel      Tunnel      `json:"tunnel"`
	Enforcement Enforcement `json:"enforcement"`
	Peers       PeerCount   `json:"peers"`
	Workloads   []Workload  `json:"workloads"`
	SVIDs       []SVID      `json:"svids"`
	Warnings    []string    `json:"warnings"`
	Details
}

// Details is the rest of Status; its fields stand beside the others in JSON.
type Details struct {
	Clocks Clocks `json:"clocks"`
	// RefusedSnapshot says why the last snapshot, from disk or from the coordinator, was not accepted.
	RefusedSnapshot string `json:"refused_snapshot,omitempty"`
	// Objects lists what could not be made real.
	Objects []Object `json:"objects,omitempty"`
	// Session is why the coordinator is not connected.
	Session string `json:"session_error,omitempty"`
	// NotServed names configured parts that this version does not have yet.
	NotServed []string `json:"not_served,omitempty"`
}

// Healthy reports whether the agent is connected to its duty: it enforces, and nothing is wrong with that. A lost
// coordinator alone is not unhealthy: the lease covers it.
func (s Status) Healthy() bool { return s.State == StateRunning && s.Enforcement.Healthy }

// Node names the host in the mesh.
type Node struct {
	Name string      `json:"name"`
	ID   identity.ID `json:"id"`
}

// Clocks says for how long what still goes on without the coordinator. Negative means ended.
type Clocks struct {
	LeaseSeconds int64     `json:"lease_seconds"`
	SVIDSeconds  int64     `json:"svid_seconds"`
	SVIDExpires  time.Time `json:"svid_expires,omitzero"`
	SVIDRenewsAt time.Time `json:"svid_renews_at,omitzero"`
	// OnLeaseEnd is what happens when the lease ends.
	OnLeaseEnd string `json:"on_lease_end"`
}

// Tunnel describes the WireGuard device.
type Tunnel struct {
	Kind      string `json:"kind"`
	Interface string `json:"interface"`
	Port      int    `json:"port"`
}

// Enforcement says what judges packets.
type Enforcement struct {
	Mode       string    `json:"mode"` // enforce, down, or none while nothing is attached
	Hooks      []Hook    `json:"hooks"`
	Healthy    bool      `json:"healthy"`
	Counters   []Counter `json:"counters,omitempty"`
	LostEvents uint64    `json:"lost_events"`
}

// Hook is one attachment of the judge.
type Hook struct {
	Name     string `json:"name"`
	Attached bool   `json:"attached"`
	Error    string `json:"error,omitempty"`
}

// Counter counts verdicts by their reason.
type Counter struct {
	Verdict string `json:"verdict"`
	Reason  string `json:"reason"`
	Packets uint64 `json:"packets"`
}

// PeerCount counts WireGuard peers.
type PeerCount struct {
	Total int `json:"total"`
	Up    int `json:"up"`
}

// Workload is one of the host's own workloads.
type Workload struct {
	ID        identity.ID     `json:"id"`
	Number    identity.Number `json:"number"`
	Addresses []netip.Addr    `json:"addresses"`
	Selectors []string        `json:"selectors"`
	// Matched is true when a cgroup of this host has the identity now.
	Matched bool `json:"matched"`
	// Cgroups are the paths below the cgroup root that matched.
	Cgroups []string `json:"cgroups,omitempty"`
	// Interface is the device behind which the workload has a network namespace of its own.
	Interface string `json:"interface,omitempty"`
	// Why says why nothing matches.
	Why string `json:"why,omitempty"`
}

// SVID is one certificate that the agent holds.
type SVID struct {
	ID      identity.ID `json:"id"`
	Serial  string      `json:"serial"` // hex
	Expires time.Time   `json:"expires"`
}

// Object is one thing that should be real and is not.
type Object struct {
	Kind  string    `json:"kind"` // host, policy or peer
	Name  string    `json:"name"`
	Error string    `json:"error"`
	Since time.Time `json:"since"`
	Tries int       `json:"tries"`
}

// Peer is one WireGuard peer, an element of the answer to GET /v1/peers.
type Peer struct {
	Node          string         `json:"node"`
	Key           string         `json:"key"`
	Endpoint      netip.AddrPort `json:"endpoint,omitzero"`
	Up            bool           `json:"up"`
	LastHandshake time.Time      `json:"last_handshake,omitzero"`
	RxBytes       uint64         `json:"rx_bytes"`
	TxBytes       uint64         `json:"tx_bytes"`
	RefusedSource uint64         `json:"refused_source"`
	Addresses     []netip.Addr   `json:"addresses"`
	Identities    []identity.ID  `json:"identities"`
	NotAfter      time.Time      `json:"not_after,omitzero"`
	Error         string         `json:"error,omitempty"`
}

// Resolved is the answer to GET /v1/resolve: where the workload's instances are, as far as this host may know.
type Resolved struct {
	ID        identity.ID `json:"id"`
	Instances []Instance  `json:"instances"`
}

// Instance is one workload on one node.
type Instance struct {
	Node      string       `json:"node"`
	Addresses []netip.Addr `json:"addresses"`
	Local     bool         `json:"local"`
}

// UpRequest asks the agent to join (POST /v1/up), or to allow traffic again after down; then it is empty. It does not
// print its token.
type UpRequest struct {
	Coordinators []string `json:"coordinators,omitempty"` // default: those of the configuration
	Token        string   `json:"token,omitempty"`
	Node         string   `json:"node,omitempty"` // default: that of the configuration
}

// Format redacts the token under every verb.
func (r UpRequest) Format(f fmt.State, _ rune) {
	_, _ = io.WriteString(f, fmt.Sprintf("up node %q at %q", r.Node, r.Coordinators))
}

// UpReply is the answer to POST /v1/up.
type UpReply struct {
	Node  Node  `json:"node"`
	State State `json:"state"`
	// Enrolled is false when the host had an identity already.
	Enrolled bool `json:"enrolled"`
}

// DownRequest is the body of POST /v1/down.
type DownRequest struct {
	// Release also removes the device, its routes and every pin: nothing is guarded any more.
	Release bool `json:"release"`
}

// PingReply is the answer to POST /v1/ping: WireGuard proved the peer anew, which took RTT.
type PingReply struct {
	Target   string         `json:"target"`
	Node     string         `json:"node"`
	Endpoint netip.AddrPort `json:"endpoint,omitzero"`
	RTTMs    float64        `json:"rtt_ms"`
}

// Netcheck is the answer to GET /v1/netcheck.
type Netcheck struct {
	Node       string           `json:"node"`
	Candidates []netip.AddrPort `json:"candidates"`          // this host's own
	SeenAs     []netip.AddrPort `json:"seen_as"`             // what the coordinator saw of this host
	BehindNAT  bool             `json:"behind_nat"`          // none of the candidates is what the coordinator saw
	Keepalive  int              `json:"keepalive_seconds"`   // 0 when none is needed
	Peers      []NetcheckPeer   `json:"peers"`               // with the age of their last handshake
	Notes      []string         `json:"notes"`               // plain sentences
	SeenKnown  bool             `json:"seen_known"`          // false while the coordinator has not said what it saw
	UpdatedAt  time.Time        `json:"updated_at,omitzero"` // of SeenAs
}

// NetcheckPeer is one peer in Netcheck.
type NetcheckPeer struct {
	Node             string         `json:"node"`
	Endpoint         netip.AddrPort `json:"endpoint,omitzero"`
	Up               bool           `json:"up"`
	HandshakeSeconds float64        `json:"handshake_age_seconds"` // -1 when there was none
}

// Error is what the server answers when it cannot do what was asked, and what every method of Client returns for that.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

// Error is the message; commands print the hint below it.
func (e *Error) Error() string { return e.Message }

// Codes of Error that callers tell apart.
const (
	CodeNotRunning = "not_running" // no agent answers at the socket; set by the client
	CodeForbidden  = "forbidden"
	CodeInvalid    = "invalid"
	CodeNotFound   = "not_found"
	CodeNotReady   = "not_ready" // the agent has no identity or no snapshot yet
	CodeRefused    = "refused"   // the coordinator refused
	CodeNoAnswer   = "no_answer" // a peer or coordinator did not answer
	CodeNotBuilt   = "not_built"
	CodeInternal   = "internal"
)
