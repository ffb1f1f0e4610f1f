package session

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/signet-overlay/signet/proto/signetv1"
)

// What follows bounds what a caller may hold of the coordinator before it is known who it is: the Enrolment service
// answers anyone.
const (
	// maxEnrolment is the largest request of the Enrolment service; an honest one has about 1 KiB.
	maxEnrolment = 64 << 10
	// enrolTimeout is how long a request of it may be on its way.
	enrolTimeout = 10 * time.Second
	// answerTimeout is how long an answer may take. When a whole fleet enrols at once, the last waits for the store a
	// while; agents give up before.
	answerTimeout = time.Minute
	// maxBodies is how many requests of it may be on their way at once. Each may fill maxRequest, because gRPC has one
	// bound for all methods. A call whose request has arrived no longer counts: bursts of honest hosts wait for the
	// store, not for each other's requests.
	maxBodies = 64
	// strangerLife is how long a connection without a client certificate may stay; once more as long while it enrols.
	strangerLife = 15 * time.Second
)

// isEnrolment says whether a method answers before, or without, knowing the caller's membership.
func isEnrolment(method string) bool {
	return method == signetv1.Enrolment_Enrol_FullMethodName || method == signetv1.Enrolment_Renew_FullMethodName
}

// bodies counts requests on their way, in all and from each source: one source may hold half of the places, so that it
// cannot keep everybody else from enrolling.
type bodies struct {
	limit int

	mu       sync.Mutex
	all      int
	bySource map[netip.Prefix]int
}

func newBodies(limit int) *bodies { return &bodies{limit: limit, bySource: map[netip.Prefix]int{}} }

// take returns what gives the place back, however often it is called, or nil when there is none.
func (b *bodies) take(src netip.Prefix) func() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.all >= b.limit || b.bySource[src] >= (b.limit+1)/2 {
		return nil
	}
	b.all++
	b.bySource[src]++
	return sync.OnceFunc(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.all--
		if b.bySource[src]--; b.bySource[src] == 0 {
			delete(b.bySource, src)
		}
	})
}

type arrivedKey struct{}

// admit lets one call of the Enrolment service begin: with a place for its request, for a while.
func (s *Server) admit(ctx context.Context, p *peer.Peer) (context.Context, error) {
	giveBack := s.bodies.take(source(remoteAddr(p.Addr.String())))
	if giveBack == nil {
		return ctx, status.Error(codes.ResourceExhausted, "too many requests are on their way: try again in a moment")
	}
	done := func() {}
	if who, ok := p.AuthInfo.(stranger); ok {
		who.conn.calls.Add(1)
		done = func() { who.conn.calls.Add(-1) }
	}
	ctx, cancel := context.WithCancel(ctx)
	late := time.AfterFunc(s.cfg.EnrolTimeout, cancel)
	arrived := func() {
		late.Stop()
		giveBack()
	}
	// gRPC ends the context with the call, whatever became of it.
	context.AfterFunc(ctx, func() {
		cancel()
		arrived()
		done()
	})
	return context.WithValue(ctx, arrivedKey{}, arrived), nil
}

// unary runs a handler of the Enrolment service; its request has arrived as a whole.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (out any, err error) {
	defer s.survive(info.FullMethod, &err)
	if arrived, ok := ctx.Value(arrivedKey{}).(func()); ok {
		arrived()
	}
	if n := size(req); n > maxEnrolment {
		return nil, status.Errorf(codes.InvalidArgument, "the request has %d bytes, expected at most %d", n, maxEnrolment)
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	return next(ctx, req)
}

// size is what a request of the Enrolment service holds.
func size(req any) int {
	switch m := req.(type) {
	case *signetv1.EnrolRequest:
		return len(m.TokenSecret) + len(m.Node) + len(m.Csr) + len(m.WireguardKey) + len(m.Version) + len(m.ProtoReflect().GetUnknown())
	case *signetv1.RenewRequest:
		return len(m.Csr) + len(m.ProtoReflect().GetUnknown())
	}
	return 0
}

// stranger is the peer of a connection without a client certificate.
type stranger struct {
	credentials.TLSInfo
	conn *boundedConn
}

// tlsOf is the finished handshake behind a call.
func tlsOf(p *peer.Peer) (credentials.TLSInfo, bool) {
	switch info := p.AuthInfo.(type) {
	case credentials.TLSInfo:
		return info, true
	case stranger:
		return info.TLSInfo, true
	}
	return credentials.TLSInfo{}, false
}

// guarded ends connections of strangers soon after the handshake.
type guarded struct {
	credentials.TransportCredentials
	life time.Duration
}

// ServerHandshake implements credentials.TransportCredentials.
func (g guarded) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := g.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err // gRPC logs it as it is
	}
	t, isTLS := info.(credentials.TLSInfo)
	b, isBounded := raw.(*boundedConn)
	// A certificate that is there was verified: the handshake fails otherwise.
	if !isTLS || !isBounded || len(t.State.PeerCertificates) > 0 {
		return conn, info, nil
	}
	b.expire(g.life, true)
	return conn, stranger{t, b}, nil
}

// Clone implements credentials.TransportCredentials.
func (g guarded) Clone() credentials.TransportCredentials {
	return guarded{g.TransportCredentials.Clone(), g.life}
}
