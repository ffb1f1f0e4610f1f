// Package endurance holds the long tests of the whole system: what is promised must hold while parts of it are killed.
// It has no code of its own; integration/scenario runs the cluster.
package endurance
