// Package flowlog turns what the kernel observed into flow records with names, and hands them to readers on this host.
//
// It owns the numbering of records, the recent ones in memory, the readers of signet flows, and the optional file. It
// judges nothing and asks the kernel nothing. How a flow reaches a SIEM, and what is promised on the way, is in
// DESIGN.md; in Go start at Log.Observe.
package flowlog
