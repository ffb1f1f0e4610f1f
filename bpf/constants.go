package bpf

// Flags and kinds of the structs that the kernel shares with the agent; TestNumbers compares them with the C headers.
const (
	AddrLocal   = 1 // struct addr
	AddrRevoked = 2

	OwnV4 = 1 // struct own
	OwnV6 = 2

	ConnSwapped = 1 // struct conn

	EventStart = 1 // struct event
	EventEnd   = 2
	EventDeny  = 3

	CounterReasons = 32 // map counters
	CounterHooks   = 8
)
