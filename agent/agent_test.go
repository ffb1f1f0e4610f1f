package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/agent/session/sessiontest"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is one host with its coordinator. Its agent may be stopped and started again over the same disk and kernel.
type rig struct {
	t      *testing.T
	cfg    Config
	coord  *sessiontest.Coordinator
	kernel *kernel
	client *localapi.Client
	agent  *Agent
	stop   context.CancelFunc
	done   chan error
}

func newRig(t *testing.T) *rig {
	t.Helper()
	base, err := os.MkdirTemp("", "signet") // short: a socket's path is limited
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	r := &rig{t: t, kernel: &kernel{}, coord: sessiontest.Start(t, sessiontest.NewPKI(t)), cfg: DefaultConfig()}
	r.cfg.Coordinator, r.cfg.Node = []string{r.coord.Addr}, "api-1"
	r.cfg.StateDir, r.cfg.KeyFile, r.cfg.Socket = filepath.Join(base, "state"), filepath.Join(base, "etc", "key"), filepath.Join(base, "a.sock")
	r.cfg.CgroupRoot, r.cfg.JoinTokenFile = filepath.Join(base, "cgroup"), filepath.Join(base, "join.token")
	if err := os.MkdirAll(filepath.Join(r.cfg.CgroupRoot, "system.slice", "api-server.service"), 0o755); err != nil {
		t.Fatal(err)
	}
	r.write(r.cfg.JoinTokenFile, r.coord.Token.Reveal()+"\n")
	r.client = &localapi.Client{Socket: r.cfg.Socket}
	return r
}

func (r *rig) write(path, text string) {
	r.t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) start() {
	r.t.Helper()
	var err error
	if r.agent, err = New(r.cfg, r.kernel.deps(), slog.New(slog.DiscardHandler)); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(r.t.Context())
	r.stop, r.done = cancel, make(chan error, 1)
	agent, done := r.agent, r.done
	go func() { done <- agent.Run(ctx); close(done) }()
	r.t.Cleanup(func() { cancel(); <-done })
}

// end stops the agent and returns what Run returned.
func (r *rig) end() error {
	r.stop()
	return <-r.done
}

// exits waits for an agent that ends by itself.
func (r *rig) exits() error {
	r.t.Helper()
	select {
	case err := <-r.done:
		return err
	case <-time.After(10 * time.Second):
		r.t.Fatal("the agent goes on")
		return nil
	}
}

// until polls status until ok holds.
func (r *rig) until(what string, ok func(localapi.Status) bool) localapi.Status {
	r.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var s localapi.Status
	var err error
	for deadline := time.Now().Add(10 * time.Second); ; <-tick.C {
		if s, err = r.client.Status(r.t.Context()); err == nil && ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("%s did not come true within 10 s: %+v, %v", what, s, err)
		}
	}
}

func running(s localapi.Status) bool { return s.State == localapi.StateRunning && s.Peers.Total == 1 }

// TestTokenThatOthersCanReadIsRefused: nothing is sent, so the token can still be used.
func TestTokenThatOthersCanReadIsRefused(t *testing.T) {
	for _, mode := range []os.FileMode{0o640, 0o604} {
		r := newRig(t)
		if err := os.Chmod(r.cfg.JoinTokenFile, mode); err != nil {
			t.Fatal(err)
		}
		r.start()
		err := r.exits()
		if err == nil || !strings.Contains(err.Error(), "can read the token") || !strings.Contains(err.Error(), "chmod 600 "+r.cfg.JoinTokenFile) || strings.Contains(err.Error(), "\n") {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
}

func TestWhatIsNotServedIsAWarning(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	s := r.until("running", running)
	if len(s.NotServed) != 2 {
		t.Fatalf("not served: %q", s.NotServed)
	}
	for _, n := range s.NotServed {
		if !slices.Contains(s.Warnings, n) {
			t.Errorf("%q is not among the warnings %q", n, s.Warnings)
		}
	}
}

// TestClockJumpIsToldToTheKernel, whose stamps were made from the clock as it was.
func TestClockJumpIsToldToTheKernel(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", running)
	count := func() (n int) { _ = r.kernel.do(func() { n = r.kernel.enforced }); return n }
	before := count()
	r.agent.clockJumped(time.Hour)
	r.until("enforced again", func(localapi.Status) bool { return count() > before })
}

func TestJoinRunAndStop(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	s := r.until("running", func(s localapi.Status) bool { return running(s) && s.Connected && s.Epoch == 1 })
	if s.Node.ID.String() != "spiffe://settler.example/signet/node/api-1" || s.Revision != 101 || s.Coordinator != r.coord.Addr || len(s.SVIDs) != 1 ||
		s.LeaseEnds.IsZero() || s.Clocks.LeaseSeconds < 80000 || s.Clocks.SVIDSeconds < 3000 || !s.Enforcement.Healthy || len(s.Enforcement.Hooks) != 1 || !s.Healthy() {
		t.Errorf("status: %+v", s)
	}
	if len(s.Workloads) != 1 || !s.Workloads[0].Matched {
		t.Errorf("workloads: %+v", s.Workloads)
	}
	view, _, _, _ := r.kernel.look()
	if len(view.Locals) != 1 || len(view.Rulesets) != 1 {
		t.Errorf("view: %+v", view)
	}
	ctx := t.Context()
	if p, err := r.client.Ping(ctx, "data/postgres"); err != nil || p.Node != "db-1" || p.RTTMs != 5 {
		t.Errorf("ping: %+v, %v", p, err)
	}
	if _, err := r.client.Ping(ctx, "no-such"); err == nil {
		t.Error("pinged nobody")
	}
	if res, err := r.client.Resolve(ctx, "data/postgres"); err != nil || len(res.Instances) != 1 || res.Instances[0].Node != "db-1" {
		t.Errorf("resolve: %+v, %v", res, err)
	}
	if n, err := r.client.Netcheck(ctx); err != nil || len(n.Candidates) != 1 || len(n.Peers) != 1 || n.Notes[0] != natNote {
		t.Errorf("netcheck: %+v, %v", n, err)
	}
	if peers, err := r.client.Peers(ctx); err != nil || len(peers) != 1 || len(peers[0].Identities) != 2 {
		t.Errorf("peers: %+v, %v", peers, err)
	}
	if err := r.end(); err != nil {
		t.Errorf("Run gave %v", err)
	}
	if view, down, peers, open := r.kernel.look(); view == nil || down || peers != 1 || open != 0 {
		t.Error("stopping changed what is enforced")
	}
}

func TestRestartWithoutCoordinator(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", running)
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	r.coord.Stop()
	began := time.Now()
	r.start()
	s := r.until("running from disk", running)
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("traffic was back after %v", took)
	}
	if s.Connected || s.Epoch != 1 || !strings.Contains(strings.Join(s.Warnings, "\n"), "no coordinator is connected") {
		t.Errorf("status: %+v", s)
	}
}

func TestDamagedSnapshotDeniesUntilTheCoordinatorSendsAnother(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", running)
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	r.coord.Stop()
	path := filepath.Join(r.cfg.StateDir, "snapshot")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-40] ^= 1
	r.write(path, string(b))
	r.start()
	s := r.until("degraded", func(s localapi.Status) bool {
		view, _, peers, _ := r.kernel.look()
		return s.State == localapi.StateDegraded && s.RefusedSnapshot != "" && peers == 0 && view != nil && len(view.Addresses) == 0
	})
	if !strings.Contains(s.RefusedSnapshot, path) || s.Healthy() {
		t.Errorf("status: %+v", s)
	}
	view, _, _, _ := r.kernel.look()
	deniesAll(t, view)
	r.coord.Restart()
	r.until("running again", running)
}

// TestForgedSnapshotInState seals a snapshot of another coordinator with the right key: only the signature is wrong.
func TestForgedSnapshotInState(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", running)
	held := r.agent.snapshot()
	if err := r.agent.dir.SaveSnapshot(forge(t)); err != nil {
		t.Fatal(err)
	}
	if held == nil || r.end() != nil {
		t.Fatal("no snapshot, or a bad end")
	}
	r.coord.Stop()
	r.start()
	s := r.until("degraded", func(s localapi.Status) bool { return s.State == localapi.StateDegraded && s.Enforcement.Healthy })
	if !strings.Contains(s.RefusedSnapshot, "distribution certificate") {
		t.Errorf("refused because of %q", s.RefusedSnapshot)
	}
	view, _, _, _ := r.kernel.look()
	deniesAll(t, view)
}

func deniesAll(t *testing.T, v *policy.View) {
	t.Helper()
	d := policy.Judge(v, &policy.Table{Conns: map[flow.Tuple]policy.Conn{}}, policy.Packet{Hook: policy.HookIngressDevice, TCPFlags: policy.FlagSYN,
		Tuple: flow.Tuple{Proto: flow.TCP, Src: addrPort(9), Dst: addrPort(5)}}, time.Now())
	if d.Verdict != flow.Deny {
		t.Errorf("a packet passes: %+v", d)
	}
}

func TestDamagedIdentityEndsTheStart(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", running)
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	before := len(r.coord.Joins())
	r.write(filepath.Join(r.cfg.StateDir, "identity"), "")
	r.start()
	if err := r.exits(); err == nil || !strings.Contains(err.Error(), "is empty") {
		t.Errorf("Run gave %v", err)
	}
	if len(r.coord.Joins()) != before {
		t.Error("a new identity was asked for in silence")
	}
}

func TestLostAnswerKeepsTheKeyOverARestart(t *testing.T) {
	r := newRig(t)
	r.coord.RefuseForNow()
	r.start()
	waitFor(t, func() bool { return len(r.coord.Joins()) > 0 })
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	r.coord.Admit()
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", running)
	joins := r.coord.Joins()
	for _, j := range joins {
		if string(j.WireguardKey) != string(joins[0].WireguardKey) {
			t.Error("another key was used after the restart")
		}
	}
}

func TestBadTokensEndTheStartWithOneSentence(t *testing.T) {
	r := newRig(t)
	text := r.coord.Token.Reveal()
	for name, c := range map[string]struct{ token, says string }{
		"truncated": {text[:40], "cut short"},
		"foreign":   {"hello", "not a Signet join token"},
	} {
		r.write(r.cfg.JoinTokenFile, c.token)
		r.start()
		if err := r.exits(); err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), c.token) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r.write(r.cfg.JoinTokenFile, text)
	r.coord.RefuseUsed()
	r.start()
	if err := r.exits(); err == nil || !strings.HasSuffix(err.Error(), "refused: the join token was used already") {
		t.Errorf("used: %v", err)
	}
}

func TestUpOverTheSocket(t *testing.T) {
	r := newRig(t)
	r.cfg.JoinTokenFile = ""
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("needs enrolment", func(s localapi.Status) bool { return s.State == localapi.StateNeedsEnrolment })
	var e *localapi.Error
	if _, err := r.client.Up(t.Context(), localapi.UpRequest{}); !errors.As(err, &e) || e.Code != localapi.CodeInvalid {
		t.Errorf("up without a token: %v", err)
	}
	if _, err := r.client.Up(t.Context(), localapi.UpRequest{Token: "sgt1_wrong"}); !errors.As(err, &e) || e.Code != localapi.CodeInvalid || strings.Contains(err.Error(), "wrong") {
		t.Errorf("up with a bad token: %v", err)
	}
	reply, err := r.client.Up(t.Context(), localapi.UpRequest{Token: r.coord.Token.Reveal()})
	if err != nil || !reply.Enrolled || reply.Node.Name != "api-1" {
		t.Errorf("up: %+v, %v", reply, err)
	}
	r.until("running", running)
	if reply, err := r.client.Up(t.Context(), localapi.UpRequest{}); err != nil || reply.Enrolled {
		t.Errorf("up again: %+v, %v", reply, err)
	}
}

func TestDownIsRememberedAndUpTakesItBack(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", running)
	if err := r.client.Down(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if _, down, peers, open := r.kernel.look(); !down || peers != 0 || open != 1 {
		t.Errorf("down=%v peers=%d open=%d", down, peers, open)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.until("down", func(s localapi.Status) bool {
		_, down, _, open := r.kernel.look()
		return s.State == localapi.StateDown && down && open == 1
	})
	if _, err := r.client.Up(t.Context(), localapi.UpRequest{}); err != nil {
		t.Fatal(err)
	}
	r.until("running", running)
}

func TestReleaseAndBack(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", running)
	if err := r.client.Down(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if _, _, peers, open := r.kernel.look(); peers != 0 || open != 0 || r.kernel.released != 1 {
		t.Errorf("peers=%d open=%d released=%d", peers, open, r.kernel.released)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	opened := r.kernel.opened
	r.start()
	r.until("down", func(s localapi.Status) bool { return s.State == localapi.StateDown && s.Connected })
	if r.kernel.opened != opened {
		t.Error("a restart after a release guards again")
	}
	if _, err := r.client.Up(t.Context(), localapi.UpRequest{}); err != nil {
		t.Fatal(err)
	}
	r.until("running", running)
}

func TestHostThatCannotCarryTheOverlay(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.kernel.preflight = errors.New("overlay range 198.18.0.0/15 overlaps route 198.18.5.0/24 dev eth1")
	r.start()
	if err := r.exits(); err == nil || !strings.HasSuffix(err.Error(), "this host cannot carry the overlay: overlay range 198.18.0.0/15 overlaps route 198.18.5.0/24 dev eth1") {
		t.Errorf("Run gave %v", err)
	}
}

func TestPendingNodeHasNothing(t *testing.T) {
	r := newRig(t)
	s := sessiontest.Sample(t, 1, time.Now())
	s.Self.Status = "pending"
	r.coord.Publish(s)
	r.start()
	r.until("pending", func(s localapi.Status) bool { return s.State == localapi.StatePending && s.Epoch == 1 })
	if view, _, peers, _ := r.kernel.look(); peers != 0 || view != nil && len(view.Rulesets)+len(view.Locals) != 0 {
		t.Errorf("a pending node has %d peers and %+v", peers, view)
	}
	r.coord.Publish(sessiontest.Sample(t, 2, time.Now()))
	r.until("running", running)
}

func TestExpiredNodeRenewsByItself(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", running)
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	r.start()
	id := r.until("running", running)
	_ = id
	if err := r.agent.changeIdentity(endedIdentity(t, r)); err != nil {
		t.Fatal(err)
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.until("renewed and connected", func(s localapi.Status) bool {
		return s.Connected && r.coord.Renewals() > 0 && s.Clocks.SVIDSeconds > 3000 && running(s)
	})
	if r.agent.identity().NextKey != nil {
		t.Error("the next key is still waiting")
	}
}

func TestServiceThatRestartsKeepsItsIdentity(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", running)
	dir := filepath.Join(r.cfg.CgroupRoot, "system.slice", "api-server.service")
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { v, _, _, _ := r.kernel.look(); return len(v.Locals) == 0 })
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { v, _, _, _ := r.kernel.look(); return len(v.Locals) == 1 })
}

func TestFlowsOverTheSocket(t *testing.T) {
	r := newRig(t)
	r.coord.Publish(sessiontest.Sample(t, 1, time.Now()))
	r.start()
	r.until("running", running)
	waitFor(t, func() bool { r.kernel.mu.Lock(); defer r.kernel.mu.Unlock(); return r.kernel.report != nil })
	r.kernel.report(flow.Observation{Event: flow.EventDeny, Src: sessiontest.APINumber, Dst: sessiontest.PGNumber, Reason: flow.NoRule,
		Tuple: flow.Tuple{Proto: flow.TCP, Src: addrPort(5), Dst: addrPort(9)}})
	var got []flow.Record
	if err := r.client.Flows(t.Context(), false, func(rec flow.Record) error { got = append(got, rec); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0].Dst.ID.Short() != "data/postgres" || got[0].Reason != flow.NoRule || got[0].Observer.Node != "api-1" {
		t.Errorf("records: %+v", got)
	}
}

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "n")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := notify("READY=1"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	if n, err := l.Read(buf); err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("systemd got %q, %v", buf[:n], err)
	}
}

func waitFor(t *testing.T, what func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); !what(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen within 10 s")
		}
	}
}
