package session

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/task"
	"github.com/signet-overlay/signet/internal/version"
	"github.com/signet-overlay/signet/proto/codec"
	"github.com/signet-overlay/signet/proto/signetv1"
)

const (
	maxHintNodes    = 1 << 14 // hints for more nodes are cut
	maxHintsPerNode = 16
	// applyTimeout bounds how long an acknowledgement waits for the host; after it, the error says so.
	applyTimeout = 30 * time.Second
	// settle is how long a silent coordinator takes to count as connected.
	settle = time.Second
)

// Presence is what a host says of itself on the stream.
type Presence struct {
	Held       *codec.Held
	WireGuard  key.Public
	ListenPort int
	Candidates []netip.AddrPort
}

// Host is what the session serves.
type Host interface {
	// Presence is asked for at each connect and each Announce.
	Presence() Presence
	// Keep saves a verified snapshot so that a crash does not lose it. After an error it is not held.
	Keep(h *codec.Held) error
	// Apply makes what was kept real, and returns what is not.
	Apply(ctx context.Context, h *codec.Held) error
	// Hints are unsigned, and name only nodes whose endpoints changed.
	Hints(hints map[string][]netip.AddrPort)
	// Connection reports each change: connected to coordinator, or not and why; refused says that an update was not
	// accepted, nil that one was.
	Connection(e Event)
}

// Event is a change that status shows.
type Event struct {
	Coordinator string // empty while not connected
	Err         error  // why not connected
	Update      bool   // the event is about an update: Err nil means accepted
}

// Client speaks with the coordinators of an enrolled host.
type Client struct {
	Coordinators []string // tried in order
	Trust        codec.Trust
	Certificate  func() *tls.Certificate
	Bundle       func() identity.Bundle
	Log          *slog.Logger

	announce chan struct{}
	kick     chan struct{}
}

// NewClient completes a Client.
func NewClient(c Client) *Client {
	c.announce, c.kick = make(chan struct{}, 1), make(chan struct{}, 1)
	return &c
}

// Announce tells the coordinator that Presence has changed.
func (c *Client) Announce() { poke(c.announce) }

// Kick ends a wait before the next attempt.
func (c *Client) Kick() { poke(c.kick) }

func poke(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

func (c *Client) dial(addr string) (*wire, error) {
	return dial(addr, identity.ClientTLS(c.Certificate, c.Bundle, c.Trust.TrustDomain.Coordinator()))
}

// Renew asks for a new certificate for k. The bundle is zero where the coordinator sent none.
func (c *Client) Renew(ctx context.Context, k *ecdsa.PrivateKey) ([]*x509.Certificate, identity.Bundle, error) {
	csr, err := CSR(k)
	if err != nil {
		return nil, identity.Bundle{}, err
	}
	var last error
	for _, addr := range c.Coordinators {
		chain, bundle, err := c.renewAt(ctx, addr, csr, k)
		if err == nil {
			return chain, bundle, nil
		}
		if last == nil || Permanent(err) {
			last = err
		}
	}
	if last == nil {
		last = errors.New("no coordinator is named")
	}
	return nil, identity.Bundle{}, fmt.Errorf("renew certificate: %w", last)
}

func (c *Client) renewAt(ctx context.Context, addr string, csr []byte, k *ecdsa.PrivateKey) ([]*x509.Certificate, identity.Bundle, error) {
	w, err := c.dial(addr)
	if err != nil {
		return nil, identity.Bundle{}, err
	}
	defer w.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := signetv1.NewEnrolmentClient(w).Renew(ctx, &signetv1.RenewRequest{Csr: csr})
	if err != nil {
		return nil, identity.Bundle{}, w.explain(err)
	}
	bundle := c.Bundle()
	if len(res.GetBundle()) > 0 {
		// It comes over a connection that the present bundle vouches for.
		if bundle, err = identity.ParseBundleDER(c.Trust.TrustDomain, res.GetBundle(), bundle.Sequence()+1); err != nil {
			return nil, identity.Bundle{}, fmt.Errorf("read trust bundle: %w", err)
		}
	}
	want, err := c.Trust.TrustDomain.Node(c.Trust.Node)
	if err != nil {
		return nil, identity.Bundle{}, fmt.Errorf("read own name: %w", err)
	}
	chain, err := verifyOwn(bundle, res.GetChain(), want, &k.PublicKey)
	return chain, bundle, err
}

// Run keeps a stream open until ctx ends.
func (c *Client) Run(ctx context.Context, h Host) error {
	for attempt := 0; ; attempt++ {
		began := time.Now()
		err := c.connect(ctx, h)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		h.Connection(Event{Err: err})
		if time.Since(began) >= stable {
			attempt = 0
		}
		wait := backoff(attempt)
		c.Log.Info("not connected", "error", err, "again_in", wait)
		if err := pause(ctx, wait, c.kick); err != nil {
			return err
		}
	}
}

// connect goes through the coordinators once and returns when the first stream that was established has ended.
func (c *Client) connect(ctx context.Context, h Host) error {
	var errs []error
	for _, addr := range c.Coordinators {
		established, err := c.stream(ctx, addr, h)
		if established || ctx.Err() != nil {
			return err
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// stream is one conversation.
type stream struct {
	client *Client
	host   Host
	addr   string
	rpc    grpc.BidiStreamingClient[signetv1.AgentMessage, signetv1.CoordinatorMessage]
	held   *codec.Held

	incoming    chan *signetv1.CoordinatorMessage
	ended       chan error // one slot: what Recv ended with
	established bool
}

// stream runs one conversation to its end. established means that the coordinator has let this host stay.
func (c *Client) stream(ctx context.Context, addr string, h Host) (established bool, err error) {
	w, err := c.dial(addr)
	if err != nil {
		return false, err
	}
	defer w.Close()
	g := task.New(ctx)
	defer func() { g.Stop(nil); _ = g.Wait() }()
	rpc, err := signetv1.NewMeshClient(w).Sync(g.Context())
	if err != nil {
		return false, w.explain(err)
	}
	p := h.Presence()
	s := &stream{client: c, host: h, addr: addr, rpc: rpc, held: p.Held, incoming: make(chan *signetv1.CoordinatorMessage), ended: make(chan error, 1)}
	g.Go("session.receive", s.receive)
	if err := s.hello(p); err != nil {
		return false, w.explain(s.cause(err))
	}
	err = s.converse(g.Context())
	if ctx.Err() != nil {
		return s.established, ctx.Err()
	}
	return s.established, w.explain(s.cause(err))
}

// converse answers until the stream ends, with what ended it.
func (s *stream) converse(ctx context.Context) error {
	// A coordinator that has nothing new to say is silent; one that refuses this host says so at once.
	settled := time.NewTimer(settle)
	defer settled.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-s.ended:
			s.ended <- err // for cause
			return err
		case <-settled.C:
			s.establish()
		case m := <-s.incoming:
			s.establish()
			if err := s.message(ctx, m); err != nil {
				return err
			}
		case <-s.client.announce:
			if err := s.endpoints(s.host.Presence()); err != nil {
				return err
			}
		}
	}
}

func (s *stream) establish() {
	if !s.established {
		s.established = true
		s.host.Connection(Event{Coordinator: s.addr})
		s.client.Log.Info("connected", "coordinator", s.addr)
	}
}

// receive is the only caller of Recv.
func (s *stream) receive(ctx context.Context) error {
	for {
		m, err := s.rpc.Recv()
		if err != nil {
			s.ended <- err
			return nil
		}
		select {
		case s.incoming <- m:
		case <-ctx.Done():
			return nil
		}
	}
}

// cause returns what ended the stream: a Send that fails with io.EOF says only that it ended.
func (s *stream) cause(err error) error {
	for errors.Is(err, io.EOF) {
		select {
		case err = <-s.ended:
			if errors.Is(err, io.EOF) {
				return status.Error(codes.Unavailable, "it closed the stream")
			}
		case <-s.incoming:
		}
	}
	return err
}

func (s *stream) send(m *signetv1.AgentMessage) error {
	if err := s.rpc.Send(m); err != nil {
		return fmt.Errorf("send to coordinator %s: %w", s.addr, err)
	}
	return nil
}

func (s *stream) hello(p Presence) error {
	return s.send(&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Hello{Hello: &signetv1.Hello{
		Version: version.Version, Epoch: p.Held.Epoch(), Sections: codec.EncodeRefs(p.Held.Sections()),
		WireguardKey: p.WireGuard.Bytes(), ListenPort: uint32(p.ListenPort), Endpoints: texts(p.Candidates)}}})
}

func (s *stream) endpoints(p Presence) error {
	return s.send(&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Endpoints{Endpoints: &signetv1.Endpoints{
		ListenPort: uint32(p.ListenPort), Endpoints: texts(p.Candidates)}}})
}

func (s *stream) message(ctx context.Context, m *signetv1.CoordinatorMessage) error {
	switch m := m.GetMessage().(type) {
	case *signetv1.CoordinatorMessage_Update:
		return s.update(ctx, m.Update)
	case *signetv1.CoordinatorMessage_Hints:
		s.host.Hints(hints(m.Hints))
	}
	return nil // a newer coordinator may say more
}

// update takes one snapshot in. In order: it is verified, it is on disk, it is real, it is acknowledged. What cannot
// be verified or kept is acknowledged as an error under its own epoch: the coordinator then sends the whole once.
func (s *stream) update(ctx context.Context, u *signetv1.Update) error {
	next, err := codec.Apply(s.held, u, s.client.Trust)
	if err != nil {
		err = fmt.Errorf("refused an update from coordinator %s: %w", s.addr, err)
	} else if err = s.host.Keep(next); err != nil {
		err = fmt.Errorf("keep snapshot: %w", err)
	}
	s.host.Connection(Event{Coordinator: s.addr, Update: true, Err: err})
	if err != nil {
		s.client.Log.Error("update not accepted", "error", err)
		return s.ack(codec.Claimed(u), err)
	}
	s.held = next
	ctx, cancel := context.WithTimeout(ctx, applyTimeout)
	defer cancel()
	return s.ack(next.Snapshot.Manifest, s.host.Apply(ctx, next))
}

func (s *stream) ack(m mesh.Manifest, failed error) error {
	a := &signetv1.Ack{Epoch: m.Epoch, PolicyRevision: m.PolicyRevision, AppliedUnixNano: time.Now().UnixNano()}
	if failed != nil {
		a.Error = failed.Error()
	}
	return s.send(&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Ack{Ack: a}})
}

func hints(m *signetv1.EndpointHints) map[string][]netip.AddrPort {
	out := map[string][]netip.AddrPort{}
	for _, n := range m.GetNodes() {
		if len(out) == maxHintNodes {
			break
		}
		if identity.ParseName(n.GetNode()) == nil {
			out[n.GetNode()] = codec.ParseEndpoints(n.GetEndpoints(), maxHintsPerNode)
		}
	}
	return out
}

func texts(eps []netip.AddrPort) []string {
	out := make([]string, len(eps))
	for i, e := range eps {
		out[i] = e.String()
	}
	return out
}
