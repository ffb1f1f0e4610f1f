// Package localapi is how programs on the same host talk to the agent: HTTP and JSON over a unix socket.
//
// It owns the shapes of requests and answers (types.go; contract section 4), the client that the CLI uses (client.go),
// and the server with its check of who is calling (server.go, peercred.go). What the answers say is the agent's
// business: the server asks it through the small interfaces in server.go.
package localapi
