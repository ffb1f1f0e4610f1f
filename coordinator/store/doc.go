// Package store keeps what the coordinator must not forget: nodes, workloads' Numbers and addresses, join tokens,
// policies, revocations, authorities, API tokens, and the two hash-chained logs. One transaction is one store revision.
//
// It owns the tables and their durability, and knows no rule of the domain: who may enrol, where a workload is placed
// and what a certificate says are decided in coordinator/registry and coordinator/authority. It is the one importer of
// the SQL driver and of the migration tool.
//
// Start at store.go (the interface), then sqlite.go (opening) and writer.go (group commit). storetest is the suite that
// every implementation must pass.
package store
