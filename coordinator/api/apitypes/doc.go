// Package apitypes holds the requests and answers of the web API, as JSON has them, for the server and for clients.
//
// It imports nothing but the standard library, so that a client does not link the server. Fields are added freely;
// none is renamed or removed (contract, section 5). Start at problem.go for how refusals look.
package apitypes
