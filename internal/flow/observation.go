package flow

import (
	"time"

	"github.com/signet-overlay/signet/internal/identity"
)

// Observation is what the kernel reports of a flow, in numbers; the agent turns it into a Record with names.
type Observation struct {
	Event   Event
	At      time.Time
	FlowID  uint64 // 0 where no connection is tracked
	Hook    string // the program that saw it
	Tuple   Tuple  // as the first packet of the flow had it
	Verdict Verdict
	Reason  Reason
	Rule    uint32
	Src     identity.Number
	Dst     identity.Number
	// Local is the direction seen from this host: "src" where the flow was opened here, "dst" where it was opened
	// elsewhere, "local" where both ends are here.
	Local  string
	Cgroup uint64 // of the local socket; 0 if unknown
	UID    uint32
	PID    uint32 // of the process that called; 0 for packets, whose sender the kernel does not tell
	// Counters of the whole flow so far: Out is from source to destination.
	PacketsOut, PacketsIn uint64
	BytesOut, BytesIn     uint64
	Start                 time.Time
	EndReason             string
	Lost                  uint64 // observations lost in the kernel since the last one
}
