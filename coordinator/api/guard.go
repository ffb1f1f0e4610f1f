package api

import (
	"context"
	"fmt"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
)

// Limits of one request.
const (
	requestTimeout    = 30 * time.Second // from the last byte of the headers to the last byte of the answer
	bodyTimeout       = 10 * time.Second // for the body to arrive
	headerTimeout     = 5 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 32 << 10
	maxHeaderFields   = 100
	maxPathBytes      = 2048
	maxConcurrent     = 256 // beyond it: 503, so that slow clients cannot hold all memory
	maxQueryBytes     = 4096
	methodsWithBodies = "POST PUT PATCH"
)

// Server returns an http.Server with the limits that h relies on: New's handler cannot bound how long headers take to
// arrive. The caller sets TLS and serves; Addr is unset.
func Server(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       headerTimeout + bodyTimeout,
		WriteTimeout:      requestTimeout + bodyTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
	}
}

// guard stands before every route, known or not. The order:
//
//  1. Headers that make an answer harmless in a browser.
//  2. A free place; a panic becomes a problem document.
//  3. Host and Origin: no request that a foreign page made a browser send.
//  4. Size and form: nothing of the body is read here, and nothing over the cap is ever read.
//  5. A deadline.
func (s *server) guard(next http.Handler) http.Handler {
	slots := make(chan struct{}, maxConcurrent)
	return http.HandlerFunc(func(raw http.ResponseWriter, r *http.Request) {
		w := &response{ResponseWriter: raw}
		secure(w.Header(), r)
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			w.Header().Set("Retry-After", "1")
			s.refuse(w, problem(http.StatusServiceUnavailable, apitypes.CodeUnavailable, "the coordinator has too many requests at once", "try again"))
			return
		}
		defer s.recovered(w, r)
		if p := s.foreign(r); p != nil {
			s.refuse(w, p)
			return
		}
		if p := oversized(r); p != nil {
			// The rest of the body is not worth reading.
			w.Header().Set("Connection", "close")
			s.refuse(w, p)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		r = r.WithContext(ctx)
		// One more than the routes' own limit, so that these refuse with a problem document.
		r.Body = http.MaxBytesReader(w, r.Body, apitypes.MaxBody+1)
		next.ServeHTTP(w, r)
	})
}

// secure sets the headers of every answer. There is no CORS header: no foreign page may read one.
func secure(h http.Header, r *http.Request) {
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Permissions-Policy", "geolocation=(), camera=(), microphone=()")
	h.Set("Cache-Control", "no-store")
	if r.TLS != nil {
		h.Set("Strict-Transport-Security", "max-age=31536000")
	}
}

// foreign refuses what a browser was made to send by another site: under a host name that is not ours (DNS rebinding),
// or with an origin that is not the page's own. Forwarded headers are never looked at: anyone can send them.
func (s *server) foreign(r *http.Request) *apitypes.Problem {
	if !s.ownHost(r.Host) {
		return problem(http.StatusForbidden, apitypes.CodeForeignOrigin, fmt.Sprintf("the API does not answer under the host name %.100q", r.Host),
			"use its IP address, localhost, or a name of its TLS certificate")
	}
	scheme := "http://"
	if r.TLS != nil {
		scheme = "https://"
	}
	origins := r.Header.Values("Origin")
	foreign := len(origins) > 1 || len(origins) == 1 && !strings.EqualFold(origins[0], scheme+r.Host)
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "same-origin", "none":
	default:
		foreign = true
	}
	if foreign {
		return problem(http.StatusForbidden, apitypes.CodeForeignOrigin, "a page of another site sent this request", "open the API's own address")
	}
	return nil
}

// ownHost accepts addresses, localhost, and the names that the operator gave the API.
func (s *server) ownHost(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	return host == "localhost" || slices.Contains(s.deps.HostNames, host)
}

// oversized refuses by what the headers announce, before anybody is asked who they are.
func oversized(r *http.Request) *apitypes.Problem {
	fields := 0
	for _, values := range r.Header {
		fields += len(values)
	}
	switch {
	case r.ContentLength > apitypes.MaxBody:
		return tooLarge()
	case fields > maxHeaderFields:
		return problem(http.StatusRequestHeaderFieldsTooLarge, apitypes.CodeTooLarge, fmt.Sprintf("the request has %d header fields, at most %d", fields, maxHeaderFields), "")
	case len(r.URL.Path) > maxPathBytes || len(r.URL.RawQuery) > maxQueryBytes:
		return problem(http.StatusRequestURITooLong, apitypes.CodeTooLarge, "the address is too long", "")
	case r.ContentLength == 0:
		return nil
	case !strings.Contains(methodsWithBodies, r.Method):
		return problem(http.StatusBadRequest, apitypes.CodeInvalid, r.Method+" takes no body", "")
	}
	// A compressed body could unpack to more than the cap.
	if enc := r.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return problem(http.StatusUnsupportedMediaType, apitypes.CodeMediaType, fmt.Sprintf("the body is encoded as %.40q", enc), "send it uncompressed")
	}
	// What a form or a script without permission can send is text/plain or form data: neither is read.
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || kind != typeJSON && !isYAML(kind) {
		return problem(http.StatusUnsupportedMediaType, apitypes.CodeMediaType, fmt.Sprintf("the body's type is %.80q", r.Header.Get("Content-Type")),
			"send application/json, or text/yaml for policy documents")
	}
	return nil
}

func tooLarge() *apitypes.Problem {
	return problem(http.StatusRequestEntityTooLarge, apitypes.CodeTooLarge, fmt.Sprintf("the body has more than %d bytes", apitypes.MaxBody), "split it")
}

const typeJSON = "application/json"

func isYAML(kind string) bool {
	return kind == "text/yaml" || kind == "application/yaml" || kind == "application/x-yaml"
}

// recovered turns a bug into an answer: one request must not end the coordinator. The trace goes to the log alone.
func (s *server) recovered(w *response, r *http.Request) {
	v := recover()
	if v == nil {
		return
	}
	if v == http.ErrAbortHandler {
		panic(v)
	}
	s.deps.Log.Error("internal error: API handler panicked", "method", r.Method, "path", r.URL.Path, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
	if w.status == 0 {
		s.refuse(w, internalProblem())
	}
}

// response remembers whether an answer has begun.
type response struct {
	http.ResponseWriter
	status int
}

// WriteHeader sends the status.
func (w *response) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write sends part of the body.
func (w *response) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// Unwrap lets deadlines reach the connection.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }
