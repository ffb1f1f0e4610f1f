package flow

import (
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/internal/identity"
)

// Schema names the form of Record; it changes only with the meaning of a field.
const Schema = "signet.flow/1"

// Event says what a record reports.
type Event string

// The events (contract, section 6).
const (
	EventStart Event = "start"
	EventEnd   Event = "end"
	EventDeny  Event = "deny"
	EventAudit Event = "audit" // a rule in mode audit would have denied the flow
	EventState Event = "state"
	EventLoss  Event = "loss"
)

// Observer is the host that saw the flow, and on which side of it it stands.
type Observer struct {
	Node string `json:"node"`
	Side string `json:"side,omitempty"` // src, dst, or local for a flow inside one host
}

// End is one end of a flow. Fields that the observer does not know stay empty.
type End struct {
	ID   identity.ID `json:"id,omitzero"`
	Zone string      `json:"zone,omitempty"`
	Node string      `json:"node,omitempty"`
	IP   netip.Addr  `json:"ip,omitzero"`
	Port uint16      `json:"port,omitempty"`
	Unit string      `json:"unit,omitempty"`
	PID  uint32      `json:"pid,omitempty"`
	Exe  string      `json:"exe,omitempty"`
}

// Record is the canonical flow record; every other encoding is derived from it.
type Record struct {
	Schema         string    `json:"schema"`
	Event          Event     `json:"event"`
	FlowID         string    `json:"flow_id,omitempty"`
	Seq            uint64    `json:"seq"`
	Time           time.Time `json:"time"`
	Observer       Observer  `json:"observer"`
	Src            End       `json:"src"`
	Dst            End       `json:"dst"`
	Proto          string    `json:"proto,omitempty"`
	CommunityID    string    `json:"community_id,omitempty"` // Community ID v1: the same on both hosts and in other tools
	Count          uint64    `json:"count"`
	Verdict        Verdict   `json:"verdict"`
	Reason         Reason    `json:"reason"`
	Rule           string    `json:"rule,omitempty"`
	PolicyRevision uint64    `json:"policy_revision"`
	BytesOut       uint64    `json:"bytes_out"`
	BytesIn        uint64    `json:"bytes_in"`
	PacketsOut     uint64    `json:"packets_out"`
	PacketsIn      uint64    `json:"packets_in"`
	Start          time.Time `json:"start,omitzero"`
	End            time.Time `json:"end,omitzero"`
	EndReason      string    `json:"end_reason,omitempty"`
	LostBefore     uint64    `json:"lost_before"` // records lost in the kernel since the last one
}
