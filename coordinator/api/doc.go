// Package api is the coordinator's web API: JSON over HTTP under /api/v1, and the health routes beside it.
//
// It owns what stands between a socket and a decision: who asks (bearer tokens), what their role permits, how large and
// how slow a request may be, whether a browser was tricked into sending it, and how refusals look (RFC 9457). It
// decides nothing about the mesh: that is coordinator/registry and coordinator/compile, reached through the small
// interfaces of deps.go. It is the one importer of huma, which checks requests against the OpenAPI document that it
// also serves. Requests and answers are in apitypes; a client is in client.
//
// Every route is one line of routes.go and declares its permission there; a route without one cannot be reached.
// Start at routes.go, then guard.go (before the route is known) and auth.go (after).
package api
