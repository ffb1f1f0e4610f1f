package bpf

// Flags and kinds of the structs that the kernel shares with the agent; TestNumbers compares them with the C headers.
const (
	AddrLocal   = 1 // struct addr
	AddrRevoked = 2

	OwnV4          = 1 // struct own
	OwnV6          = 2
	OwnConfined    = 4
	OwnOverlayOnly = 8

	RulesetRanges = 1 << 31 // number of a ruleset
	SlotLenient   = 1 << 31 // struct slot
	RangeFixed    = 80      // struct range_key

	ConnStep    = 26 // struct conn
	ConnSwapped = 1 << 18
	ConnLocal0  = 1 << 19
	ConnLocal1  = 1 << 20
	ConnPeer0   = 1 << 21
	ConnPeer1   = 1 << 22
	ConnTold    = 1 << 23
	ConnAudited = 1 << 24

	EventStart = 1 // struct event
	EventEnd   = 2
	EventDeny  = 3
	EventAudit = 4

	CounterReasons = 32 // map counters
	CounterHooks   = 16
)

// JudgeObject is the compiled judge, by which one build is told from another.
func JudgeObject() []byte { return _JudgeBytes }
