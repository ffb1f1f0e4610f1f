// Package coordinator puts the coordinator together: its configuration, the first initialisation of a data folder, and
// the order in which its parts start and stop.
//
// It decides nothing about the mesh. Start at serve.go; init.go makes what serve opens, config.go reads the
// configuration, members.go joins registry and authority for enrolment.
package coordinator
