package localapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
)

// Group may read from the socket, besides root.
const Group = "signet"

const (
	maxBody        = 64 << 10
	maxConnections = 64 // one more is turned away
	headerTimeout  = 5 * time.Second
	idleTimeout    = 30 * time.Second
	// writeTimeout is how long a reader may leave one record unread.
	writeTimeout = 30 * time.Second
	// UpTimeout bounds one enrolment that the operator waits for.
	UpTimeout = 2 * time.Minute
	opTimeout = 15 * time.Second
)

// Reader answers questions.
type Reader interface {
	Status() Status
	Peers() ([]Peer, error)
	Workloads() []Workload
	Resolve(id string) (Resolved, error)
	Netcheck() (Netcheck, error)
	Explain(r ExplainRequest) (Explanation, error)
}

// Controller changes what the agent does.
type Controller interface {
	Up(ctx context.Context, r UpRequest) (UpReply, error)
	Down(ctx context.Context, release bool) error
	Ping(ctx context.Context, target string) (PingReply, error)
	// Flows sends the recent records and, with follow, new ones until ctx ends or send fails.
	Flows(ctx context.Context, follow bool, send func(flow.Record) error) error
}

// Server answers at a unix socket.
type Server struct {
	listener *net.UnixListener
	http     *http.Server
	log      *slog.Logger
}

// Listen opens the socket: mode 0660, of root and of group signet where that exists. A socket that a dead agent left is
// replaced; one that answers is not.
func Listen(path string, reader Reader, control Controller, log *slog.Logger) (*Server, error) {
	if err := makeRoom(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, err)
	}
	gid := groupID()
	if err := errors.Join(os.Chown(path, os.Geteuid(), max(gid, 0)), os.Chmod(path, 0o660)); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare socket %s: %w", path, err), l.Close())
	}
	h := &handler{reader: reader, control: control, gid: gid}
	return &Server{listener: l, log: log, http: &http.Server{
		Handler: h.routes(), ReadHeaderTimeout: headerTimeout, ReadTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, callerKey{}, callerOf(c))
		},
	}}, nil
}

// Run answers until ctx ends. Requests that are under way then are cut short.
func (s *Server) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = s.http.Close() })
	defer stop()
	s.http.BaseContext = func(net.Listener) context.Context { return ctx }
	err := s.http.Serve(&limited{Listener: s.listener, slots: make(chan struct{}, maxConnections)})
	if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
		return ctx.Err()
	}
	return fmt.Errorf("local API: %w", err)
}

// Close ends a Server that Run does not run.
func (s *Server) Close() error { return errors.Join(s.http.Close(), s.listener.Close()) }

// makeRoom makes the socket's folder and removes what a dead agent left.
func makeRoom(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make folder of socket: %w", err)
	}
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at socket: %w", err)
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("%s exists and is not a socket: move it away, or set socket to another path", path)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return fmt.Errorf("another agent answers at %s: stop it, or set socket to another path", path)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}

func groupID() int {
	g, err := user.LookupGroup(Group)
	if err != nil {
		return -1
	}
	id, err := strconv.Atoi(g.Gid)
	if err != nil {
		return -1
	}
	return id
}

type handler struct {
	reader  Reader
	control Controller
	gid     int
}

func (h *handler) routes() http.Handler {
	mux := http.NewServeMux()
	read := func(pattern string, f func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, h.guard(false, f))
	}
	write := func(pattern string, f func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, h.guard(true, f))
	}
	read("GET /v1/status", func(*http.Request) (any, error) { return h.reader.Status(), nil })
	read("GET /v1/peers", func(*http.Request) (any, error) { return h.reader.Peers() })
	read("GET /v1/workloads", func(*http.Request) (any, error) { return h.reader.Workloads(), nil })
	read("GET /v1/resolve", func(r *http.Request) (any, error) { return h.reader.Resolve(r.URL.Query().Get("id")) })
	read("GET /v1/netcheck", func(*http.Request) (any, error) { return h.reader.Netcheck() })
	read("POST /v1/ping", h.ping)
	read("POST /v1/explain", h.explain)
	write("POST /v1/up", h.up)
	write("POST /v1/down", h.down)
	mux.HandleFunc("GET /v1/flows", h.flows)
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		refuse(w, http.StatusNotFound, &Error{Code: CodeNotBuilt, Message: "this agent does not know that request", Hint: "compare: signet version"})
	})
	return mux
}

// guard checks the caller, runs f, and writes its answer.
func (h *handler) guard(rootOnly bool, f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !h.admit(w, r, rootOnly) {
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		out, err := f(r)
		if err != nil {
			refuse(w, statusOf(err), err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		// An error means that the caller is gone.
		_ = json.NewEncoder(w).Encode(out)
	}
}

func (h *handler) admit(w http.ResponseWriter, r *http.Request, rootOnly bool) bool {
	who, _ := r.Context().Value(callerKey{}).(caller)
	if who.may(rootOnly, h.gid) {
		return true
	}
	hint := "run this as root or as a member of group " + Group
	if rootOnly {
		hint = "run this as root"
	}
	refuse(w, http.StatusForbidden, &Error{Code: CodeForbidden, Message: "you may not ask the agent for this", Hint: hint})
	return false
}

func (h *handler) up(r *http.Request) (any, error) {
	var req UpRequest
	if err := decode(r.Body, &req); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), UpTimeout)
	defer cancel()
	return h.control.Up(ctx, req)
}

func (h *handler) down(r *http.Request) (any, error) {
	var req DownRequest
	if err := decode(r.Body, &req); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), opTimeout)
	defer cancel()
	return struct{}{}, h.control.Down(ctx, req.Release)
}

func (h *handler) ping(r *http.Request) (any, error) {
	var req struct {
		Target string `json:"target"`
	}
	if err := decode(r.Body, &req); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), opTimeout)
	defer cancel()
	return h.control.Ping(ctx, req.Target)
}

// flows streams one JSON document on each line.
func (h *handler) flows(w http.ResponseWriter, r *http.Request) {
	if !h.admit(w, r, false) {
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc, enc := http.NewResponseController(w), json.NewEncoder(w)
	sent := false
	err := h.control.Flows(r.Context(), r.URL.Query().Get("follow") == "1", func(rec flow.Record) error {
		sent = true
		if err := rc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
			return fmt.Errorf("set deadline: %w", err)
		}
		if err := enc.Encode(rec); err != nil {
			return fmt.Errorf("send record: %w", err)
		}
		return rc.Flush()
	})
	if err != nil && !sent && r.Context().Err() == nil {
		refuse(w, statusOf(err), err)
	}
}

// decode reads one small JSON document with known fields.
func decode(body io.Reader, into any) error {
	dec := json.NewDecoder(body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil && !errors.Is(err, io.EOF) {
		// The decoder's text could repeat a token, so it is left out.
		return &Error{Code: CodeInvalid, Message: "the request is not the JSON that this agent expects", Hint: "compare: signet version"}
	}
	return nil
}

func refuse(w http.ResponseWriter, code int, err error) {
	e := &Error{}
	if !errors.As(err, &e) {
		e = &Error{Code: CodeInternal, Message: err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(e)
}

func statusOf(err error) int {
	var e *Error
	if !errors.As(err, &e) {
		return http.StatusInternalServerError
	}
	switch e.Code {
	case CodeForbidden:
		return http.StatusForbidden
	case CodeInvalid:
		return http.StatusBadRequest
	case CodeNotFound:
		return http.StatusNotFound
	case CodeNotReady, CodeRefused:
		return http.StatusConflict
	case CodeNoAnswer:
		return http.StatusGatewayTimeout
	case CodeNotBuilt:
		return http.StatusNotImplemented
	}
	return http.StatusInternalServerError
}
