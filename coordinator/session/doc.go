// Package session speaks with agents: it enrols hosts, renews their SVIDs, and keeps each connected agent current over
// one stream. It is the coordinator's one importer of gRPC.
//
// It owns connections and what they report: who is connected, what was applied, where nodes may be reached. What an
// agent should hold is decided in coordinator/publish, who may join in coordinator/registry.
//
// Start at dialogue.go (pure: what to send next on one stream), then stream.go (the one loop around it), enrol.go and
// server.go.
package session
