package session_test

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"

	"github.com/signet-overlay/signet/agent/session"
	"github.com/signet-overlay/signet/agent/session/sessiontest"
	"github.com/signet-overlay/signet/agent/state"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/proto/codec"
	"github.com/signet-overlay/signet/proto/signetv1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

func draft(t *testing.T, c *sessiontest.Coordinator) (state.Identity, session.Application) {
	t.Helper()
	d, err := state.NewDraft(c.PKI.TD, "api-1", []string{c.Addr})
	if err != nil {
		t.Fatal(err)
	}
	return d, session.Application{Coordinators: []string{c.Addr}, Token: c.Token, Node: "api-1", Key: d.Key, WireGuard: d.WireGuard.Public()}
}

func enrol(t *testing.T, c *sessiontest.Coordinator) state.Identity {
	t.Helper()
	d, app := draft(t, c)
	adm, err := session.Enrol(t.Context(), app, quiet)
	if err != nil {
		t.Fatal(err)
	}
	d.Chain, d.Bundle = adm.Chain, adm.Bundle
	return d
}

func TestEnrol(t *testing.T) {
	c := sessiontest.Start(t, sessiontest.NewPKI(t))
	d := enrol(t, c)
	if got := d.Chain[0].URIs[0].String(); got != "spiffe://settler.example/signet/node/api-1" {
		t.Errorf("the certificate is for %s", got)
	}
	if d.Bundle.Pin() != c.Token.Pin {
		t.Error("the bundle is not the pinned root's")
	}
}

func TestEnrolOverALostAnswerAsksAgainWithTheSameKey(t *testing.T) {
	c := sessiontest.Start(t, sessiontest.NewPKI(t))
	c.LoseNextAnswer()
	enrol(t, c)
	joins := c.Joins()
	if len(joins) != 2 || string(joins[0].WireguardKey) != string(joins[1].WireguardKey) || string(joins[0].Csr) != string(joins[1].Csr) {
		t.Errorf("%d requests, or their keys differ", len(joins))
	}
}

func TestInterceptorNeverSeesTheToken(t *testing.T) {
	real, other := sessiontest.NewPKI(t), sessiontest.Start(t, sessiontest.NewPKI(t))
	_, app := draft(t, other)
	app.Token = real.Token(t)
	_, err := session.Enrol(t.Context(), app, quiet)
	if !session.Permanent(err) || identity.CodeOf(err) != identity.CodeUnknownCA {
		t.Errorf("Enrol gave %v", err)
	}
	if n := len(other.Joins()); n != 0 {
		t.Errorf("%d requests arrived at the interceptor", n)
	}
}

func TestPermanentRefusals(t *testing.T) {
	c := sessiontest.Start(t, sessiontest.NewPKI(t))
	_, app := draft(t, c)
	for _, code := range []codes.Code{codes.PermissionDenied, codes.FailedPrecondition, codes.InvalidArgument, codes.AlreadyExists} {
		c.Refuse(code, "the join token was used already")
		before := len(c.Joins())
		_, err := session.Enrol(t.Context(), app, quiet)
		if !session.Permanent(err) || !strings.HasSuffix(err.Error(), "refused: the join token was used already") {
			t.Errorf("%v: %v", code, err)
		}
		if asked := len(c.Joins()) - before; asked != 1 {
			t.Errorf("%v: asked %d times", code, asked)
		}
	}
}

func TestUnreachableIsRetriedUntilTheCallerGivesUp(t *testing.T) {
	c := sessiontest.Start(t, sessiontest.NewPKI(t))
	_, app := draft(t, c)
	c.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	_, err := session.Enrol(ctx, app, quiet)
	if session.Permanent(err) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Enrol gave %v", err)
	}
}

func TestSecondCoordinatorIsTried(t *testing.T) {
	c := sessiontest.Start(t, sessiontest.NewPKI(t))
	_, app := draft(t, c)
	app.Coordinators = []string{"127.0.0.1:1", c.Addr}
	if _, err := session.Enrol(t.Context(), app, quiet); err != nil {
		t.Error(err)
	}
}

// fakeHost records what the session does with it, in order.
type fakeHost struct {
	id state.Identity

	mu       sync.Mutex
	held     *codec.Held
	order    []string
	keepErr  error
	applyErr error
	hints    chan map[string][]netip.AddrPort
	events   chan session.Event
}

func newHost(id state.Identity) *fakeHost {
	return &fakeHost{id: id, hints: make(chan map[string][]netip.AddrPort, 16), events: make(chan session.Event, 256)}
}

func (h *fakeHost) Presence() session.Presence {
	h.mu.Lock()
	defer h.mu.Unlock()
	return session.Presence{Held: h.held, WireGuard: h.id.WireGuard.Public(), ListenPort: 51820, Candidates: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:51820")}}
}

func (h *fakeHost) Keep(held *codec.Held) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.order = append(h.order, "keep")
	if h.keepErr == nil {
		h.held = held
	}
	return h.keepErr
}

func (h *fakeHost) Apply(context.Context, *codec.Held) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.order = append(h.order, "apply")
	return h.applyErr
}

func (h *fakeHost) Hints(m map[string][]netip.AddrPort) { h.hints <- m }
func (h *fakeHost) Connection(e session.Event)          { h.events <- e }

func (h *fakeHost) set(keep, apply error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keepErr, h.applyErr = keep, apply
}

// client runs a session of h until the test ends.
func client(t *testing.T, c *sessiontest.Coordinator, h *fakeHost) *session.Client {
	t.Helper()
	cl := session.NewClient(session.Client{Coordinators: []string{c.Addr}, Log: quiet, Certificate: func() *tls.Certificate { return h.id.Certificate() },
		Bundle: func() identity.Bundle { return h.id.Bundle },
		Trust: codec.Trust{TrustDomain: c.PKI.TD, Node: "api-1", Distribution: func(der []byte) (ed25519.PublicKey, error) {
			return identity.VerifyDistribution(h.id.Bundle, der, time.Now())
		}}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = cl.Run(ctx, h) }()
	t.Cleanup(func() { cancel(); <-done })
	return cl
}

func receive[T any](t *testing.T, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(10 * time.Second):
		t.Fatal("nothing came within 10 s")
		panic("unreachable")
	}
}

func TestSyncKeepsAppliesAndAcknowledgesInThisOrder(t *testing.T) {
	c := sessiontest.Start(t, sessiontest.NewPKI(t))
	h := newHost(enrol(t, c))
	c.Publish(sessiontest.Sample(t, 1, time.Now()))
	client(t, c, h)
	hello := receive(t, c.Hellos)
	if hello.Epoch != 0 || hello.ListenPort != 51820 || len(hello.Endpoints) != 1 {
		t.Errorf("Hello is %v", hello)
	}
	if ack := receive(t, c.Acks); ack.Epoch != 1 || ack.PolicyRevision != 101 || ack.Error != "" || ack.AppliedUnixNano == 0 {
		t.Errorf("Ack is %v", ack)
	}
	h.set(nil, errors.New("peer db-1: no"))
	c.Publish(sessiontest.Sample(t, 2, time.Now()))
	if ack := receive(t, c.Acks); ack.Epoch != 2 || ack.Error != "peer db-1: no" {
		t.Errorf("Ack is %v", ack)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if got := strings.Join(h.order, " "); got != "keep apply keep apply" {
		t.Errorf("the host was asked to %s", got)
	}
}

func TestSyncRefusesWhatDoesNotHold(t *testing.T) {
	c := sessiontest.Start(t, sessiontest.NewPKI(t))
	h := newHost(enrol(t, c))
	client(t, c, h)
	receive(t, c.Hellos)
	c.Publish(sessiontest.Sample(t, 5, time.Now()))
	receive(t, c.Acks)
	forged := sessiontest.NewPKI(t).Update(sessiontest.Sample(t, 6, time.Now()))
	tampered := c.PKI.Update(sessiontest.Sample(t, 7, time.Now()))
	tampered.Sections[0].Body[len(tampered.Sections[0].Body)-1] ^= 1
	for name, u := range map[string]*signetv1.Update{"forged": forged, "tampered": tampered, "older": c.PKI.Update(sessiontest.Sample(t, 4, time.Now()))} {
		c.Say(&signetv1.CoordinatorMessage{Message: &signetv1.CoordinatorMessage_Update{Update: u}})
		if ack := receive(t, c.Acks); ack.Error == "" {
			t.Errorf("%s was accepted", name)
		}
	}
	h.set(errors.New("disk full"), nil)
	c.Publish(sessiontest.Sample(t, 8, time.Now()))
	if ack := receive(t, c.Acks); !strings.Contains(ack.Error, "disk full") || ack.Epoch != 8 {
		t.Errorf("Ack is %v", ack)
	}
	h.mu.Lock()
	epoch := h.held.Epoch()
	h.mu.Unlock()
	if epoch != 5 {
		t.Errorf("epoch %d is held, expected 5", epoch)
	}
	h.set(nil, nil)
	c.Publish(sessiontest.Sample(t, 9, time.Now()))
	if ack := receive(t, c.Acks); ack.Error != "" || ack.Epoch != 9 {
		t.Errorf("Ack is %v", ack)
	}
}

func TestSyncComesBackAndSaysWhatItHolds(t *testing.T) {
	c := sessiontest.Start(t, sessiontest.NewPKI(t))
	h := newHost(enrol(t, c))
	cl := client(t, c, h)
	receive(t, c.Hellos)
	c.Publish(sessiontest.Sample(t, 3, time.Now()))
	receive(t, c.Acks)
	c.Stop()
	for receive(t, h.events).Err == nil {
	}
	c.Restart()
	cl.Kick()
	if hello := receive(t, c.Hellos); hello.Epoch != 3 || len(hello.Sections) == 0 {
		t.Errorf("Hello is %v", hello)
	}
}

func TestSyncPassesHintsAndEndpoints(t *testing.T) {
	c := sessiontest.Start(t, sessiontest.NewPKI(t))
	h := newHost(enrol(t, c))
	cl := client(t, c, h)
	receive(t, c.Hellos)
	c.Say(&signetv1.CoordinatorMessage{Message: &signetv1.CoordinatorMessage_Hints{Hints: &signetv1.EndpointHints{Nodes: []*signetv1.NodeEndpoints{
		{Node: "db-1", Endpoints: []string{"192.0.2.7:51820", "not one"}}, {Node: "../x", Endpoints: []string{"192.0.2.8:1"}}}}}})
	got := receive(t, h.hints)
	if len(got) != 1 || len(got["db-1"]) != 1 {
		t.Errorf("hints are %v", got)
	}
	cl.Announce()
	if e := receive(t, c.Endpoints); e.ListenPort != 51820 || len(e.Endpoints) != 1 {
		t.Errorf("Endpoints is %v", e)
	}
}

func TestExpiredCertificateRenews(t *testing.T) {
	c := sessiontest.Start(t, sessiontest.NewPKI(t))
	h := newHost(enrol(t, c))
	ended := c.PKI.Issue(t, h.id.ID(), &h.id.Key.PublicKey, time.Now().Add(-72*time.Hour), time.Now().Add(-48*time.Hour))
	var err error
	if h.id.Chain, err = identity.ParseChain(ended); err != nil {
		t.Fatal(err)
	}
	cl := client(t, c, h)
	for {
		if e := receive(t, h.events); e.Err != nil {
			break // the stream is refused
		}
	}
	next, err := state.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	chain, bundle, err := cl.Renew(t.Context(), next)
	if err != nil || bundle.IsZero() || !chain[0].NotAfter.After(time.Now()) {
		t.Errorf("Renew gave %v", err)
	}
}

func TestAnotherServerIsNotTheCoordinator(t *testing.T) {
	c, other := sessiontest.Start(t, sessiontest.NewPKI(t)), sessiontest.Start(t, sessiontest.NewPKI(t))
	h := newHost(enrol(t, c))
	c.Addr = other.Addr
	client(t, c, h)
	e := receive(t, h.events)
	if !session.Permanent(e.Err) || len(other.Hellos) != 0 {
		t.Errorf("the event is %v", e.Err)
	}
}
