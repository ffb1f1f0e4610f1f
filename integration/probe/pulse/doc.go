// Package pulse keeps many flows busy in both directions at once and tells, when it is asked to end, when each of them last
// delivered and when and how its socket learned that it is over. It measures; what the figures have to be is the caller's.
//
// Times are of the machine's wall clock in nanoseconds, so that two processes on one machine can be compared.
//
// Start at pulse.go; storm.go is the opposite: packets that nobody may get.
package pulse
