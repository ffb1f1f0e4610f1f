package api

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
)

// plainRoutes are those that are not huma's: health, the OpenAPI document, what is not built outside of the prefix, and
// everything unknown. All of them are public and read nothing of the request.
func (s *server) plainRoutes() {
	document, err := json.Marshal(s.api.OpenAPI())
	if err != nil {
		panic("internal error: api: write the OpenAPI document: " + err.Error())
	}
	s.mux.HandleFunc("GET "+Prefix+"/openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/openapi+json")
		s.write(w, document)
	})
	s.mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		s.write(w, []byte("ok\n"))
	})
	s.mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if s.deps.Ready != nil {
			if err := s.deps.Ready(r.Context()); err != nil {
				// The reason may name paths and hosts; whoever may read the log may know it.
				s.deps.Log.Warn("not ready", "error", err)
				s.refuse(w, problem(http.StatusServiceUnavailable, apitypes.CodeUnavailable, "the coordinator is not ready", "its log has the reason"))
				return
			}
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		s.write(w, []byte("ok\n"))
	})
	for path, what := range map[string]string{
		"/.well-known/openid-configuration": "OpenID configuration", "/keys": "the JWT key set", "/bundle": "the SPIFFE bundle", "/{$}": "the web UI",
	} {
		s.mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) { s.refuse(w, notBuilt(what)) })
	}
	s.mux.HandleFunc("/", s.unknown)
}

func (s *server) write(w http.ResponseWriter, b []byte) {
	if _, err := w.Write(b); err != nil {
		s.deps.Log.Debug("write answer", "error", err)
	}
}

// unknown answers what no route takes, and says so when only the method is wrong.
func (s *server) unknown(w http.ResponseWriter, r *http.Request) {
	var allowed []string
	for _, method := range []string{"GET", "POST", "PUT", "DELETE"} {
		probe := r.Clone(r.Context())
		probe.Method = method
		if _, pattern := s.mux.Handler(probe); pattern != "/" && pattern != "" {
			allowed = append(allowed, method)
		}
	}
	if len(allowed) > 0 {
		w.Header().Set("Allow", strings.Join(allowed, ", "))
		s.refuse(w, problem(http.StatusMethodNotAllowed, apitypes.CodeMethod, fmt.Sprintf("%.20q is not a method of this route", r.Method), "use "+strings.Join(allowed, " or ")))
		return
	}
	s.refuse(w, problem(http.StatusNotFound, apitypes.CodeNotFound, "there is no such route", "see "+Prefix+"/openapi.json"))
}
