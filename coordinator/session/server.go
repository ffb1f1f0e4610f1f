package session

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/signet-overlay/signet/coordinator/publish"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/proto/signetv1"
)

const (
	// MaxUpdate is the largest message to an agent.
	MaxUpdate = 64 << 20
	// maxRequest is the largest message from one: a Hello of about 13,000 sections. An agent that holds more names none
	// and gets everything.
	maxRequest = 1 << 20
	// windowSize is how much of a stream may arrive that nobody has asked for yet. It is gRPC's least, and fixed: what
	// gRPC finds out by itself about the line would let a stranger fill megabytes.
	windowSize = 64 << 10
	// maxCalls bounds the calls on one connection; an agent has a stream and now and then a Renew.
	maxCalls = 8
	// bufferSize keeps an idle connection small. gRPC's own default is 32 KiB each way; the one for writing is shared
	// between connections, and held only while something is written.
	bufferSize = 4 << 10

	handshakeTimeout = 10 * time.Second
	idleTimeout      = 5 * time.Minute // a connection without a call
	stopTimeout      = 3 * time.Second // for calls to end in peace
	flushEvery       = time.Second     // reports reach the store at most this often
	flushTimeout     = 5 * time.Second
	flushWriters     = 16 // reports written at a time, so that the store can commit them together
)

// Members lets hosts in, and knows them.
type Members interface {
	State() *registry.State
	// CheckNode says whether a peer that proved an ID and a key is a node that may speak.
	CheckNode(id identity.ID, spki [32]byte) (registry.Node, error)
	// Enrol and Renew issue the certificate in the same transaction as they change the membership.
	Enrol(ctx context.Context, j Join) (Issued, error)
	Renew(ctx context.Context, r Renewal) (Issued, error)
	// Proven says that a node was seen with its current key: the one before is spent.
	Proven(ctx context.Context, id identity.ID, spki [32]byte) error
	Applied(ctx context.Context, node string, r registry.AppliedReport) error
}

// Publisher says what each agent should hold.
type Publisher interface {
	Current() *publish.Published
	Subscribe(node string) (changes <-chan struct{}, cancel func())
}

// Trust is what connections are verified with, and what the coordinator shows of itself.
type Trust interface {
	Bundle() identity.Bundle
	ServerCertificate() *tls.Certificate // nil while there is none
}

// Config is what a Server stands on. Members, Publisher, Trust and Log are required.
type Config struct {
	Members   Members
	Publisher Publisher
	Trust     Trust
	Log       *slog.Logger
	Now       func() time.Time // nil means time.Now

	MaxStreams int // connected agents; 0 means 20,000
	MaxConns   int // TCP connections, of agents or not; 0 means MaxStreams and half as many again
	// Rate and Burst bound enrolments and renewals per second from one address. 0 means 200 and 2,000.
	Rate, Burst float64
	// MaxBodies bounds requests of enrolments and renewals that are on their way, EnrolTimeout their way, and
	// StrangerLife a connection without a certificate. 0 means 64, 10 s and 15 s.
	MaxBodies    int
	EnrolTimeout time.Duration
	StrangerLife time.Duration
}

// Server speaks with agents. Make one with New, then Serve once.
type Server struct {
	signetv1.UnimplementedEnrolmentServer
	signetv1.UnimplementedMeshServer

	cfg       Config
	limiter   *limiter
	bodies    *bodies
	live      live
	places    directory
	reports   *reports
	streams   atomic.Int64
	receivers sync.WaitGroup // every goroutine that a stream started
	stats     struct{ updates atomic.Uint64 }
}

// New makes a Server.
func New(cfg Config) *Server {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	setDefault(&cfg.MaxStreams, 20_000)
	setDefault(&cfg.MaxConns, cfg.MaxStreams*3/2)
	setDefault(&cfg.Rate, 200)
	setDefault(&cfg.Burst, 2000)
	setDefault(&cfg.MaxBodies, maxBodies)
	setDefault(&cfg.EnrolTimeout, enrolTimeout)
	setDefault(&cfg.StrangerLife, strangerLife)
	s := &Server{cfg: cfg, limiter: newLimiter(cfg.Rate, cfg.Burst), bodies: newBodies(cfg.MaxBodies), reports: newReports()}
	s.live.byNode = map[string]*session{}
	s.places.nodes = map[string]place{}
	return s
}

func setDefault[T int | float64 | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Serve accepts agents on lis until ctx ends. Then it tells every agent to go, waits for them for a moment, and stores
// the last reports. When it returns, nothing of it runs any more.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	srv := s.grpcServer()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var g errgroup.Group
	g.Go(func() error {
		defer cancel()
		if err := srv.Serve(newBounded(lis, s.cfg.MaxConns)); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			return fmt.Errorf("serve agents on %s: %w", lis.Addr(), err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		s.live.endAll(errStopping)
		force := time.AfterFunc(stopTimeout, srv.Stop)
		srv.GracefulStop()
		force.Stop()
		return nil
	})
	g.Go(func() error { s.routineFlush(ctx); return nil })
	err := g.Wait()
	s.receivers.Wait()
	last, stop := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer stop()
	s.flush(last)
	return err
}

// Connected lists the nodes that have a stream, with the time when each was last heard of.
func (s *Server) Connected() map[string]time.Time { return s.live.heard() }

// Reports is what each node last said that it made real, since this coordinator started. The store follows.
func (s *Server) Reports() map[string]Report { return s.reports.all() }

// Watch wakes its channel, of one slot, after each report.
func (s *Server) Watch() (changes <-chan struct{}, cancel func()) { return s.reports.subscribe() }

// Endpoints says where a node was last known to be reachable, best first.
func (s *Server) Endpoints(node string) []netip.AddrPort { return s.places.of(node) }

// Updates counts the Updates that were sent.
func (s *Server) Updates() uint64 { return s.stats.updates.Load() }

func (s *Server) grpcServer() *grpc.Server {
	creds := credentials.NewTLS(identity.ServerTLS(s.cfg.Trust.ServerCertificate, s.cfg.Trust.Bundle, identity.RenewGrace))
	srv := grpc.NewServer(
		grpc.Creds(guarded{creds, s.cfg.StrangerLife}),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxConcurrentStreams(maxCalls),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxSendMsgSize(MaxUpdate),
		grpc.StaticStreamWindowSize(windowSize),
		grpc.StaticConnWindowSize(windowSize),
		grpc.MaxHeaderListSize(bufferSize),
		grpc.ReadBufferSize(bufferSize),
		grpc.WriteBufferSize(bufferSize),
		grpc.WaitForHandlers(true),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleTimeout, Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.InTapHandle(s.tap),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
			defer s.survive(info.FullMethod, &err)
			return next(srv, stream)
		}),
	)
	signetv1.RegisterEnrolmentServer(srv, s)
	signetv1.RegisterMeshServer(srv, s)
	return srv
}

// tap turns callers away before a byte of their message is read.
func (s *Server) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	if info.FullMethodName == signetv1.Mesh_Sync_FullMethodName {
		_, err := s.caller(ctx, 0)
		return ctx, err
	}
	p, ok := peer.FromContext(ctx)
	if !ok || !s.limiter.allow(remoteAddr(p.Addr.String()), s.cfg.Now()) {
		return ctx, status.Error(codes.ResourceExhausted, "too many requests from this address: try again in a moment")
	}
	if !isEnrolment(info.FullMethodName) {
		return ctx, nil // no such method: gRPC says so without reading on
	}
	return s.admit(ctx, p)
}

// survive keeps a bug that one caller has found from taking down the coordinator for all.
func (s *Server) survive(method string, err *error) {
	if r := recover(); r != nil {
		s.cfg.Log.Error("internal error in a call", "method", method, "panic", r, "stack", string(debug.Stack()))
		*err = status.Error(codes.Internal, "internal error; the coordinator's log has it")
	}
}

// caller is a peer whose identity is proven.
type caller struct {
	id       identity.ID
	node     string
	spki     [32]byte
	notAfter time.Time
	remote   netip.Addr
}

// caller verifies the certificate of a connection again, with the clock and the grace of this call: the handshake lets
// expired ones in, for Renew.
func (s *Server) caller(ctx context.Context, grace time.Duration) (caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, status.Error(codes.Unauthenticated, "no peer")
	}
	info, ok := tlsOf(p)
	if !ok {
		return caller{}, status.Error(codes.Unauthenticated, "TLS is required")
	}
	v, err := identity.VerifyState(info.State, s.cfg.Trust.Bundle(), identity.Options{Now: s.cfg.Now(), Usage: identity.UsageClient, ExpiredGrace: grace})
	if err != nil {
		s.cfg.Log.Warn("refused", "from", p.Addr.String(), "err", err)
		return caller{}, status.Errorf(codes.Unauthenticated, "the certificate is refused: %s", identity.CodeOf(err))
	}
	out := caller{id: v.ID, node: v.ID.NodeName(), spki: identity.SPKIHash(v.Leaf), notAfter: v.Leaf.NotAfter, remote: remoteAddr(p.Addr.String())}
	if out.node == "" {
		return caller{}, status.Error(codes.PermissionDenied, "only nodes may call this")
	}
	return out, nil
}

// registered says whether the caller is a node that may hold a stream. A revoked one whose key was its own may: it gets
// the signed manifest that ends its part in the mesh, and nothing else.
func (s *Server) registered(ctx context.Context, who caller) (registry.Node, error) {
	n, err := s.cfg.Members.CheckNode(who.id, who.spki)
	if errors.Is(err, registry.ErrNodeRevoked) && n.ID == who.id && (n.SPKI == who.spki || n.PrevSPKI == who.spki) {
		return n, nil
	}
	if err != nil {
		return n, s.refusal(ctx, "sync", who.node, err)
	}
	return n, nil
}

// routineFlush brings reports to the store, gathered, until ctx ends.
func (s *Server) routineFlush(ctx context.Context) {
	timer := time.NewTimer(flushEvery)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.reports.wake:
		}
		s.flush(ctx)
		timer.Reset(flushEvery)
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
	}
}

func (s *Server) flush(ctx context.Context) {
	var g errgroup.Group
	g.SetLimit(flushWriters)
	for node, rep := range s.reports.take() {
		g.Go(func() error {
			err := s.cfg.Members.Applied(ctx, node, registry.AppliedReport{PolicyRevision: rep.PolicyRevision, Epoch: rep.Epoch, Error: rep.Error})
			if err != nil && !errors.Is(err, registry.ErrNodeUnknown) {
				s.reports.giveBack(node)
				if ctx.Err() == nil {
					s.cfg.Log.Error("cannot store what a host reported; it is tried again", "node", node, "err", err)
				}
			}
			return nil
		})
	}
	_ = g.Wait() // its functions keep their errors
}

func from(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return p.Addr.String()
	}
	return ""
}
