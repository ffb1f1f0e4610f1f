package identity

import "strconv"

// Number is the 32-bit form of an ID that the kernel compares. The coordinator gives each ID one Number, once, and
// never gives it to another ID.
type Number uint32

// Reserved Numbers. Nothing below FirstNumber is ever allocated.
const (
	NumberUnknown Number = 0 // no identity; never allowed anything
	NumberHost    Number = 1 // a process of this host without a workload
	NumberWorld   Number = 2 // outside the overlay

	FirstNumber Number = 256
)

// String is the decimal form.
func (n Number) String() string { return strconv.FormatUint(uint64(n), 10) }

// Allocated reports whether n may belong to an ID.
func (n Number) Allocated() bool { return n >= FirstNumber }
