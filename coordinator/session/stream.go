package session

import (
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-overlay/signet/coordinator/publish"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/proto/codec"
	"github.com/signet-overlay/signet/proto/signetv1"
)

const (
	helloTimeout = 10 * time.Second
	// sendTimeout is how long an agent may leave one message unread before its stream ends. It loses nothing: it says
	// what it holds when it comes back.
	sendTimeout = 30 * time.Second
	// finalTimeout is the same for a node that was revoked.
	finalTimeout = time.Second
	// messageRate and messageBurst bound what one agent may say: far above an acknowledgement for each Update.
	messageRate  = 50
	messageBurst = 200
)

var (
	errReplaced = status.Error(codes.Aborted, "this node has opened a newer stream")
	errRevoked  = status.Error(codes.PermissionDenied, "this node was revoked")
	errEnded    = status.Error(codes.Unauthenticated, "the SVID of this connection has ended: connect again with the renewed one")
	errRekeyed  = status.Error(codes.Unauthenticated, "the node was enrolled again with another key")
	errSlow     = status.Error(codes.Unavailable, "the agent does not read: connect again")
	errFlood    = status.Error(codes.ResourceExhausted, "too many messages")
	errNoHello  = status.Error(codes.DeadlineExceeded, "no Hello arrived")
	errStopping = status.Error(codes.Unavailable, "the coordinator is stopping: connect again")
)

type syncStream = grpc.BidiStreamingServer[signetv1.AgentMessage, signetv1.CoordinatorMessage]

// session is one agent's stream. Its loop owns everything but the channels.
type session struct {
	srv    *Server
	node   string
	who    caller
	stream syncStream

	in    chan received
	sent  chan error    // one slot: how the message on its way fared
	ended chan error    // one slot: why the stream must end
	hint  chan struct{} // one slot: endpoints of peers changed
	heard atomic.Int64  // when the agent last said something

	hello        *signetv1.Hello
	talk         *dialogue // nil until the node is published
	sending      bool
	sendingSince time.Time
	budget       bucket
}

type received struct {
	msg *signetv1.AgentMessage
	err error
}

// Sync keeps one agent current until its stream, its SVID or its membership ends.
func (s *Server) Sync(stream syncStream) error {
	ctx := stream.Context()
	who, err := s.caller(ctx, 0)
	if err != nil {
		return err
	}
	n, err := s.registered(ctx, who)
	if err != nil {
		return err
	}
	s.proven(ctx, n, who)
	if s.streams.Add(1) > int64(s.cfg.MaxStreams) {
		s.streams.Add(-1)
		return status.Error(codes.ResourceExhausted, "this coordinator holds as many agents as it may: try another")
	}
	defer s.streams.Add(-1)
	c := &session{srv: s, node: who.node, who: who, stream: stream, in: make(chan received), sent: make(chan error, 1),
		ended: make(chan error, 1), hint: make(chan struct{}, 1), budget: bucket{level: messageBurst}}
	done := make(chan struct{})
	defer close(done)
	s.receivers.Add(1)
	go c.routineReceive(done)
	if err := c.greet(ctx); err != nil {
		return err
	}
	if err := s.live.enter(c); err != nil {
		return err
	}
	defer s.live.leave(c)
	// Once more: an enrolment with --replace, while Hello was awaited, has ended the streams that it found, and this one
	// was not among them.
	if _, err := s.registered(ctx, who); err != nil {
		return err
	}
	s.cfg.Log.Info("agent connected", "node", c.node, "version", plain(c.hello.Version), "epoch", c.hello.Epoch)
	if err = c.run(ctx); errors.Is(err, errRevoked) {
		s.places.forget(c.node)
	}
	s.cfg.Log.Info("agent disconnected", "node", c.node, "cause", status.Convert(err).Message())
	return err
}

// proven ends the life of a node's former key when its current one is seen. That costs a write once for each renewal. An
// error does not keep the node out: the next stream tries again.
func (s *Server) proven(ctx context.Context, n registry.Node, who caller) {
	if n.SPKI != who.spki || n.PrevSPKI == [32]byte{} || n.Status == registry.NodeRevoked {
		return
	}
	if err := s.cfg.Members.Proven(ctx, who.id, who.spki); err != nil {
		s.cfg.Log.Error("cannot retire a node's former key; it is tried again when the node connects again", "node", who.node, "err", err)
	}
}

// end asks the loop to stop; the first cause counts.
func (c *session) end(cause error) {
	select {
	case c.ended <- cause:
	default:
	}
}

// routineReceive ends when the stream does, which is at the latest when its handler has returned.
func (c *session) routineReceive(done <-chan struct{}) {
	defer c.srv.receivers.Done()
	for {
		m, err := c.stream.Recv()
		select {
		case c.in <- received{m, err}:
		case <-done:
			return
		}
		if err != nil {
			return
		}
	}
}

func (c *session) greet(ctx context.Context) error {
	timer := time.NewTimer(helloTimeout)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	case <-timer.C:
		return errNoHello
	case r := <-c.in:
		if r.err != nil {
			return r.err
		}
		if c.hello = r.msg.GetHello(); c.hello == nil {
			return status.Error(codes.InvalidArgument, "the first message is not Hello")
		}
	}
	c.heard.Store(c.srv.cfg.Now().UnixNano())
	n, ok := c.srv.cfg.Members.State().Nodes[c.node]
	if !ok || string(c.hello.WireguardKey) != string(n.Key.Bytes()) {
		return status.Error(codes.FailedPrecondition, "the host's WireGuard key is not the registered one: enrol it again, with a token made with --replace")
	}
	if have := c.srv.cfg.Publisher.Current().Epoch; c.hello.Epoch > have {
		// Never followed on an agent's word: one wrong number would use up all epochs.
		c.srv.cfg.Log.Error("a host holds a newer snapshot than this coordinator has made; was an older backup restored without a new incarnation?",
			"node", c.node, "holds", c.hello.Epoch, "epoch", have)
		return status.Errorf(codes.FailedPrecondition, "the host holds epoch %d, the coordinator is at %d: it was restored from an older backup", c.hello.Epoch, have)
	}
	return nil
}

// run is the loop: look at what is published, send if something is due, wait for the next event.
func (c *session) run(ctx context.Context) error {
	changes, cancel := c.srv.cfg.Publisher.Subscribe(c.node)
	defer cancel()
	if err := c.located(c.hello.ListenPort, c.hello.Endpoints); err != nil {
		return err
	}
	expiry := time.NewTimer(c.who.notAfter.Sub(c.srv.cfg.Now()))
	defer expiry.Stop()
	timer := time.NewTimer(sendTimeout)
	defer timer.Stop()
	for {
		wait, err := c.advance(c.srv.cfg.Now())
		if err != nil {
			return err
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case cause := <-c.ended:
			return cause
		case <-expiry.C:
			return errEnded
		case r := <-c.in:
			if r.err != nil {
				return r.err
			}
			if err := c.handle(r.msg); err != nil {
				return err
			}
		case err := <-c.sent:
			c.sending = false
			if err != nil {
				return err
			}
		case <-changes:
		case <-c.hint:
		case <-timer.C:
		}
	}
}

// advance starts sending what is due, and says when to look again without an event.
func (c *session) advance(now time.Time) (time.Duration, error) {
	n := c.srv.cfg.Publisher.Current().Nodes[c.node]
	if n == nil {
		return sendTimeout, nil // enrolled this moment: its first publication is on its way
	}
	revoked := n.Status == registry.NodeRevoked
	if c.sending {
		limit, cause := sendTimeout, errSlow
		if revoked {
			limit, cause = finalTimeout, errRevoked
		}
		if left := c.sendingSince.Add(limit).Sub(now); left > 0 {
			return left, nil
		}
		return 0, cause
	}
	if c.talk == nil {
		if err := c.open(n); err != nil {
			return 0, err
		}
	}
	hintWait := time.Duration(0)
	if !revoked {
		var h *signetv1.EndpointHints
		if h, hintWait = c.talk.hints(&c.srv.places, n, now); h != nil {
			c.send(&signetv1.CoordinatorMessage{Message: &signetv1.CoordinatorMessage_Hints{Hints: h}}, now)
			return sendTimeout, nil
		}
	}
	u, wait := c.talk.update(n, now)
	if u != nil {
		c.srv.stats.updates.Add(1)
		c.send(&signetv1.CoordinatorMessage{Message: &signetv1.CoordinatorMessage_Update{Update: u}}, now)
		if revoked {
			return finalTimeout, nil
		}
		return sendTimeout, nil
	}
	if revoked {
		return 0, errRevoked
	}
	return soonest(wait, hintWait), nil
}

func (c *session) open(n *publish.Node) error {
	held, err := codec.DecodeRefs(c.hello.Sections)
	if err != nil {
		return status.Error(codes.InvalidArgument, "Hello names sections that cannot be")
	}
	rep, ok := c.srv.reports.of(c.node)
	c.talk = newDialogue(c.hello.Epoch, held, n, ok && rep.Epoch == c.hello.Epoch && rep.Error == "")
	c.hello.Sections = nil // up to megabytes, and done with
	return nil
}

func soonest(a, b time.Duration) time.Duration {
	switch {
	case a == 0 && b == 0:
		return sendTimeout
	case a == 0:
		return b
	case b == 0:
		return a
	}
	return min(a, b)
}

// send hands one message to a goroutine of its own, because a slow reader blocks it; the loop must go on hearing of
// revocations. There is never more than one, and it ends when the handler returns at the latest.
func (c *session) send(m *signetv1.CoordinatorMessage, now time.Time) {
	c.sending, c.sendingSince = true, now
	c.srv.receivers.Add(1)
	go c.routineSend(m)
}

func (c *session) routineSend(m *signetv1.CoordinatorMessage) {
	defer c.srv.receivers.Done()
	c.sent <- c.stream.Send(m)
}

func (c *session) handle(m *signetv1.AgentMessage) error {
	now := c.srv.cfg.Now()
	c.heard.Store(now.UnixNano())
	c.budget.level = min(messageBurst, c.budget.level+max(0, now.Sub(c.budget.at).Seconds())*messageRate) - 1
	c.budget.at = now
	if c.budget.level < 0 {
		return errFlood
	}
	switch m := m.Message.(type) {
	case *signetv1.AgentMessage_Ack:
		c.acked(m.Ack, now)
		return nil
	case *signetv1.AgentMessage_Endpoints:
		return c.located(m.Endpoints.GetListenPort(), m.Endpoints.GetEndpoints())
	default:
		return status.Error(codes.InvalidArgument, "a message that this version does not know, or a second Hello")
	}
}

func (c *session) acked(a *signetv1.Ack, now time.Time) {
	cur := c.srv.cfg.Publisher.Current()
	if a.GetEpoch() > cur.Epoch || a.GetPolicyRevision() > cur.PolicyRevision {
		return // nobody can have applied what was never published
	}
	if c.talk != nil {
		c.talk.acked(a.Epoch, a.Error != "")
	}
	if a.Error != "" {
		c.srv.cfg.Log.Warn("an agent could not apply a snapshot", "node", c.node, "epoch", a.Epoch, "err", plain(a.Error))
	}
	c.srv.reports.put(c.node, Report{Epoch: a.Epoch, PolicyRevision: a.PolicyRevision, Error: a.Error, Time: now})
}

// located takes in where the agent may be reached, and wakes those who want to know. Interest is mutual: a rule
// concerns both ends, so who has this node among its peers is among this node's peers.
func (c *session) located(port uint32, reported []string) error {
	if port > 65535 {
		return status.Error(codes.InvalidArgument, "the listen port is above 65535")
	}
	eps := candidates(codec.ParseEndpoints(reported, maxEndpoints), c.who.remote, uint16(port))
	if !c.srv.places.set(c.node, eps) {
		return nil
	}
	if n := c.srv.cfg.Publisher.Current().Nodes[c.node]; n != nil {
		c.srv.live.hint(append([]string{c.node}, n.Peers...))
	}
	return nil
}

// remoteAddr is an address without port, or the zero Addr.
func remoteAddr(text string) netip.Addr {
	ap, err := netip.ParseAddrPort(text)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}
