package localapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/internal/flow"
)

// TestMain lets the test binary be a caller of another user: it then asks once and prints the code of the answer.
func TestMain(m *testing.M) {
	if socket := os.Getenv("LOCALAPI_TEST_SOCKET"); socket != "" {
		c := &Client{Socket: socket}
		_, err := c.Status(context.Background())
		fmt.Println("status", codeOf(err))
		fmt.Println("down", codeOf(c.Down(context.Background(), false)))
		os.Exit(0)
	}
	// The HTTP server lingers for 500 ms over a connection whose request was too large.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*conn).closeWriteAndWait"))
}

func codeOf(err error) string {
	var e *Error
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &e):
		return e.Code
	}
	return err.Error()
}

type fakeAgent struct {
	downs []bool
	ups   []UpRequest
	err   error
}

func (f *fakeAgent) Status() Status         { return Status{Version: "test", State: StateRunning} }
func (f *fakeAgent) Peers() ([]Peer, error) { return []Peer{{Node: "db-1"}}, f.err }
func (f *fakeAgent) Workloads() []Workload  { return []Workload{{Number: 300}} }
func (f *fakeAgent) Resolve(id string) (Resolved, error) {
	return Resolved{Instances: []Instance{{Node: id}}}, f.err
}
func (f *fakeAgent) Explain(r ExplainRequest) (Explanation, error) {
	return Explanation{Code: flow.NoRule, Service: r.Port, Observed: r.From + " to " + r.To}, f.err
}
func (f *fakeAgent) Netcheck() (Netcheck, error) { return Netcheck{Node: "api-1"}, nil }
func (f *fakeAgent) Up(_ context.Context, r UpRequest) (UpReply, error) {
	f.ups = append(f.ups, r)
	return UpReply{Enrolled: true}, f.err
}
func (f *fakeAgent) Down(_ context.Context, release bool) error {
	f.downs = append(f.downs, release)
	return f.err
}
func (f *fakeAgent) Ping(_ context.Context, target string) (PingReply, error) {
	return PingReply{Target: target}, f.err
}
func (f *fakeAgent) Flows(ctx context.Context, follow bool, send func(flow.Record) error) error {
	for seq := range uint64(3) {
		if err := send(flow.Record{Seq: seq + 1}); err != nil {
			return err
		}
	}
	if follow {
		<-ctx.Done()
	}
	return f.err
}

func serve(t *testing.T, f *fakeAgent) *Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "signet-localapi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "agent.sock")
	s, err := Listen(path, f, f, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return &Client{Socket: path}
}

func TestEveryRequest(t *testing.T) {
	f := &fakeAgent{}
	c := serve(t, f)
	ctx := t.Context()
	if s, err := c.Status(ctx); err != nil || s.Version != "test" {
		t.Errorf("Status: %+v, %v", s, err)
	}
	if p, err := c.Peers(ctx); err != nil || p[0].Node != "db-1" {
		t.Errorf("Peers: %+v, %v", p, err)
	}
	if w, err := c.Workloads(ctx); err != nil || w[0].Number != 300 {
		t.Errorf("Workloads: %+v, %v", w, err)
	}
	if r, err := c.Resolve(ctx, "data/postgres & more"); err != nil || r.Instances[0].Node != "data/postgres & more" {
		t.Errorf("Resolve: %+v, %v", r, err)
	}
	if n, err := c.Netcheck(ctx); err != nil || n.Node != "api-1" {
		t.Errorf("Netcheck: %+v, %v", n, err)
	}
	if r, err := c.Ping(ctx, "db-1"); err != nil || r.Target != "db-1" {
		t.Errorf("Ping: %+v, %v", r, err)
	}
	if r, err := c.Up(ctx, UpRequest{Token: "sgt1_x", Node: "api-1"}); err != nil || !r.Enrolled || f.ups[0].Token != "sgt1_x" {
		t.Errorf("Up: %+v, %v", r, err)
	}
	if err := c.Down(ctx, true); err != nil || len(f.downs) != 1 || !f.downs[0] {
		t.Errorf("Down: %v, %v", f.downs, err)
	}
	var seqs []uint64
	if err := c.Flows(ctx, false, func(r flow.Record) error { seqs = append(seqs, r.Seq); return nil }); err != nil || len(seqs) != 3 {
		t.Errorf("Flows: %v, %v", seqs, err)
	}
}

func TestFollowEndsWithTheCaller(t *testing.T) {
	c := serve(t, &fakeAgent{})
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	n := 0
	err := c.Flows(ctx, true, func(flow.Record) error {
		if n++; n == 3 {
			cancel()
		}
		return nil
	})
	if err != nil || n != 3 {
		t.Errorf("%d records, %v", n, err)
	}
}

func TestErrorsTravel(t *testing.T) {
	f := &fakeAgent{err: &Error{Code: CodeNotFound, Message: "no such peer", Hint: "look"}}
	c := serve(t, f)
	_, err := c.Ping(t.Context(), "x")
	var e *Error
	if !errors.As(err, &e) || *e != *f.err.(*Error) {
		t.Errorf("Ping gave %#v", err)
	}
}

func TestNobodyThere(t *testing.T) {
	c := &Client{Socket: filepath.Join(t.TempDir(), "none.sock")}
	if _, err := c.Status(t.Context()); codeOf(err) != CodeNotRunning {
		t.Errorf("Status gave %v", err)
	}
}

func TestSocketsMode(t *testing.T) {
	c := serve(t, &fakeAgent{})
	info, err := os.Stat(c.Socket)
	if err != nil || info.Mode().Perm() != 0o660 || info.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()) {
		t.Errorf("the socket is %v, %v", info.Mode(), err)
	}
}

func TestStaleSocketIsReplacedAndALivingOneIsNot(t *testing.T) {
	c := serve(t, &fakeAgent{})
	f := &fakeAgent{}
	if _, err := Listen(c.Socket, f, f, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "another agent answers") {
		t.Errorf("Listen gave %v", err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	s, err := Listen(path, f, f, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	if err := os.WriteFile(path+"2", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path+"2", f, f, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a file was replaced")
	}
}

// TestOtherUsers opens the socket's mode, so that only the check of the caller is left.
func TestOtherUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: asks as another user, or gives files away")
	}
	f := &fakeAgent{}
	c := serve(t, f)
	if err := os.Chmod(c.Socket, 0o666); err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(filepath.Dir(c.Socket), "caller")
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(exe, b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = []string{"LOCALAPI_TEST_SOCKET=" + c.Socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "status forbidden\ndown forbidden\n" || len(f.downs) != 0 {
		t.Errorf("a stranger got %q, %v", out, err)
	}
}

func TestMay(t *testing.T) {
	for _, c := range []struct {
		who      caller
		rootOnly bool
		gid      int
		want     bool
	}{
		{caller{}, false, 50, false},
		{caller{known: true}, true, 50, true},
		{caller{known: true, uid: 7, groups: []uint32{50}}, false, 50, true},
		{caller{known: true, uid: 7, groups: []uint32{50}}, true, 50, false},
		{caller{known: true, uid: 7, groups: []uint32{51}}, false, 50, false},
		{caller{known: true, uid: 7, groups: []uint32{0}}, false, -1, false},
	} {
		if got := c.who.may(c.rootOnly, c.gid); got != c.want {
			t.Errorf("%+v rootOnly=%v gid=%d: %v", c.who, c.rootOnly, c.gid, got)
		}
	}
}

func TestBadRequests(t *testing.T) {
	f := &fakeAgent{}
	c := serve(t, f)
	post := func(path, body string) int {
		tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", c.Socket)
		}}
		res, err := (&http.Client{Transport: tr}).Post("http://agent"+path, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		return res.StatusCode
	}
	for body, want := range map[string]int{`{"token": 5}`: 400, `{"unknown": true}`: 400, `{"token": "` + strings.Repeat("x", maxBody) + `"}`: 400, "nonsense": 400} {
		if got := post("/v1/up", body); got != want || len(f.ups) != 0 {
			t.Errorf("%.30s: %d, expected %d", body, got, want)
		}
	}
	if got := post("/v1/other", "{}"); got != 404 {
		t.Errorf("an unknown request gave %d", got)
	}
}

func TestUpRequestDoesNotPrint(t *testing.T) {
	r := UpRequest{Token: "sgt1_secret", Node: "api-1"}
	if s := fmt.Sprintf("%v %+v %#v", r, r, r); strings.Contains(s, "secret") {
		t.Errorf("it prints as %s", s)
	}
}
