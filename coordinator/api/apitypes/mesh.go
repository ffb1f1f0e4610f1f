package apitypes

import (
	"net/netip"
	"time"
)

// Node is one enrolled host.
type Node struct {
	Name           string     `json:"name"`
	ID             string     `json:"id"`
	Number         uint32     `json:"number"`
	Status         string     `json:"status" enum:"pending,active,revoked"`
	Connected      bool       `json:"connected"`
	Key            string     `json:"key,omitempty" doc:"WireGuard public key"`
	IPv4           netip.Addr `json:"ipv4,omitzero"`
	IPv6           netip.Addr `json:"ipv6,omitzero"`
	Created        time.Time  `json:"created,omitzero"`
	LastSeen       time.Time  `json:"last_seen,omitzero"`
	PolicyRevision uint64     `json:"policy_revision" doc:"The revision that the host says it has applied"`
	Workloads      []string   `json:"workloads" doc:"IDs of the workloads placed here"`
}

// NodeList is one page of nodes, by name.
type NodeList struct {
	Nodes      []Node `json:"nodes"`
	NextCursor string `json:"next_cursor,omitempty"`
}

// JoinTokenRequest asks for a join token.
type JoinTokenRequest struct {
	Node      string `json:"node,omitempty" maxLength:"252" doc:"Name or glob that the token binds; without one the node waits for approval"`
	TTL       string `json:"ttl,omitempty" maxLength:"32" doc:"Life of the token, as 1h or 30m; 1h when absent"`
	Uses      int    `json:"uses,omitempty" minimum:"1" maximum:"100000" doc:"How many nodes may join with it; 1 when absent"`
	Ephemeral bool   `json:"ephemeral,omitempty" doc:"Nodes that joined with it are removed when they stay away; not built yet, true is refused"`
	Replace   bool   `json:"replace,omitempty" doc:"A node of an existing name may take its place"`
}

// JoinToken is the one time that the token is shown.
type JoinToken struct {
	Token   string    `json:"token"`
	Node    string    `json:"node"`
	Expires time.Time `json:"expires"`
}

// Instance is a workload on one node.
type Instance struct {
	Node      string       `json:"node"`
	Addresses []netip.Addr `json:"addresses" doc:"One IPv4, one IPv6"`
	Revoked   bool         `json:"revoked"`
}

// Workload is one declared workload with the nodes that it is placed on.
type Workload struct {
	ID        string            `json:"id"`
	Zone      string            `json:"zone"`
	Name      string            `json:"name"`
	Number    uint32            `json:"number"`
	Declared  bool              `json:"declared" doc:"False when the policy in force no longer has it"`
	Selectors []string          `json:"selectors"`
	Nodes     []string          `json:"nodes" doc:"Globs over node names, as declared"`
	Labels    map[string]string `json:"labels,omitempty"`
	Serves    []string          `json:"serves,omitempty"`
	Instances []Instance        `json:"instances"`
}

// WorkloadList is one page of workloads, by ID.
type WorkloadList struct {
	Workloads  []Workload `json:"workloads"`
	NextCursor string     `json:"next_cursor,omitempty"`
}

// RevokeRequest narrows a revocation; without a node it counts everywhere.
type RevokeRequest struct {
	Node string `json:"node,omitempty" maxLength:"63"`
}

// Resolution lists the overlay addresses of a workload.
type Resolution struct {
	ID        string     `json:"id"`
	Number    uint32     `json:"number"`
	Instances []Instance `json:"instances"`
}

// Stats are counts of the whole mesh.
type Stats struct {
	TrustDomain    string         `json:"trust_domain"`
	Version        string         `json:"version"`
	StoreRevision  uint64         `json:"store_revision"`
	PolicyRevision uint64         `json:"policy_revision"`
	Incarnation    uint32         `json:"incarnation"`
	Nodes          map[string]int `json:"nodes" doc:"By status, and connected"`
	Workloads      int            `json:"workloads"`
	Instances      int            `json:"instances"`
	Rules          int            `json:"rules"`
	Overlay4       string         `json:"overlay4"`
	Overlay6       string         `json:"overlay6"`
	Lease          string         `json:"lease"`
}

// Peer is one end of an explanation.
type Peer struct {
	ID     string   `json:"id"`
	Number uint32   `json:"number"`
	Node   string   `json:"node" doc:"The first of nodes"`
	Nodes  []string `json:"nodes,omitempty" doc:"Where it is placed and not revoked"`
}

// ExplainRequest asks whether one workload may reach another.
type ExplainRequest struct {
	From string `json:"from" maxLength:"2048" doc:"zone/workload or a whole SPIFFE ID"`
	To   string `json:"to" maxLength:"2048"`
	Port string `json:"port" maxLength:"32" doc:"tcp/5432, udp/53 or icmp" example:"tcp/5432"`
}

// Near is a rule that almost decided.
type Near struct {
	Rule   string `json:"rule"`
	Action string `json:"action"`
	At     string `json:"at" doc:"file:line:column"`
	Fails  string `json:"fails" doc:"The first clause that does not hold"`
}

// Explanation is the verdict with everything that led to it (contract, section 4).
type Explanation struct {
	Verdict        string   `json:"verdict" enum:"allow,deny,audit"`
	Code           string   `json:"code" doc:"Reason code, as in flow records"`
	Stage          string   `json:"stage" doc:"The step that decided"`
	Rule           string   `json:"rule"`
	PolicyRevision uint64   `json:"policy_revision"`
	From           Peer     `json:"from"`
	To             Peer     `json:"to"`
	Service        string   `json:"service"`
	Observed       string   `json:"observed"`
	Expected       string   `json:"expected"`
	Nearest        []Near   `json:"nearest"`
	Remedy         string   `json:"remedy"`
	Warnings       []string `json:"warnings,omitempty"`
}
