// Package session speaks with the coordinator: it enrols the host, renews its certificate, and keeps one stream over
// which snapshots come and acknowledgements go.
//
// It owns the connection and nothing that outlives it: what is held, saved and made real is the Host's. It is the only
// package of the agent that knows gRPC. Start at Client.Run (sync.go); first contact is enrol.go.
package session
