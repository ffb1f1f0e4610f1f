// Package matrix holds the spoofing matrix of the whole system: every way in which a hostile process could reach what it
// may not, or pass for somebody else, tried against real agents, with the hook that refused it and the reason recorded.
//
// It has no code of its own, only tests. One lab serves all rows; each row is tried by integration/probe/attack, first by
// the rightful workload where that is possible, which shows that the attack as such would arrive, and then by the
// attacker. docs/spoofing.md is the outcome, written by: go test ./integration/matrix -update
//
// Start at matrix_test.go; rows stand in the *_rows_test.go files.
package matrix
