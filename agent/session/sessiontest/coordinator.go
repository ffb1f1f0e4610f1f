package sessiontest

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/proto/codec"
	"github.com/signet-overlay/signet/proto/signetv1"
)

// Coordinator listens on loopback.
type Coordinator struct {
	signetv1.UnimplementedEnrolmentServer
	signetv1.UnimplementedMeshServer

	PKI   *PKI
	Token identity.JoinToken
	Addr  string
	// Acks, Hellos and Endpoints receive what agents say; a full channel loses it.
	Acks      chan *signetv1.Ack
	Hellos    chan *signetv1.Hello
	Endpoints chan *signetv1.Endpoints

	t      testing.TB
	server *grpc.Server

	mu       sync.Mutex
	enrolled map[string][]byte // node: SPKI of its key
	joins    []*signetv1.EnrolRequest
	renewals int
	refusal  error // of Enrol, instead of an answer
	loseNext bool  // the next Enrol or Renew works and its answer is lost
	life     time.Duration
	last     *signetv1.CoordinatorMessage
	streams  map[chan *signetv1.CoordinatorMessage]struct{}
}

// Start runs a coordinator with its own trust domain until the test ends.
func Start(t testing.TB, pki *PKI) *Coordinator {
	t.Helper()
	c := &Coordinator{PKI: pki, t: t, Token: pki.Token(t), life: time.Hour,
		Acks: make(chan *signetv1.Ack, 256), Hellos: make(chan *signetv1.Hello, 64), Endpoints: make(chan *signetv1.Endpoints, 64),
		enrolled: map[string][]byte{}, streams: map[chan *signetv1.CoordinatorMessage]struct{}{}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	c.Addr = l.Addr().String()
	c.serve(l)
	t.Cleanup(c.Stop)
	return c
}

func (c *Coordinator) serve(l net.Listener) {
	cert := c.PKI.Serving(c.t)
	cfg := identity.ServerTLS(func() *tls.Certificate { return cert }, func() identity.Bundle { return c.PKI.Bundle }, identity.RenewGrace)
	c.server = grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}))
	signetv1.RegisterEnrolmentServer(c.server, c)
	signetv1.RegisterMeshServer(c.server, c)
	server := c.server
	go func() { _ = server.Serve(l) }()
}

// Stop ends every connection.
func (c *Coordinator) Stop() { c.server.Stop() }

// Restart listens again at the same address after Stop.
func (c *Coordinator) Restart() {
	c.t.Helper()
	l, err := net.Listen("tcp", c.Addr)
	check(c.t, err)
	c.serve(l)
}

// Refuse makes Enrol answer with a code; codes.OK ends that.
func (c *Coordinator) Refuse(code codes.Code, message string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refusal = status.Error(code, message)
}

// RefuseUsed makes Enrol say that the token was used.
func (c *Coordinator) RefuseUsed() {
	c.Refuse(codes.PermissionDenied, "the join token was used already")
}

// RefuseForNow makes Enrol fail as an overloaded coordinator does; Admit ends every refusal.
func (c *Coordinator) RefuseForNow() { c.Refuse(codes.Unavailable, "later") }

// Admit ends every refusal.
func (c *Coordinator) Admit() { c.Refuse(codes.OK, "") }

// LoseNextAnswer lets the next Enrol or Renew work and loses the answer.
func (c *Coordinator) LoseNextAnswer() { c.mu.Lock(); defer c.mu.Unlock(); c.loseNext = true }

// SetLife is how long certificates live; negative makes ended ones.
func (c *Coordinator) SetLife(d time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); c.life = d }

// Joins returns the requests to enrol that arrived.
func (c *Coordinator) Joins() []*signetv1.EnrolRequest {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]*signetv1.EnrolRequest(nil), c.joins...)
}

// Renewals counts answered renewals.
func (c *Coordinator) Renewals() int { c.mu.Lock(); defer c.mu.Unlock(); return c.renewals }

// Enrol is the RPC.
func (c *Coordinator) Enrol(_ context.Context, r *signetv1.EnrolRequest) (*signetv1.EnrolResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.joins = append(c.joins, r)
	if c.refusal != nil {
		return nil, c.refusal
	}
	if string(r.TokenSecret) != string(c.Token.Secret()) {
		return nil, status.Error(codes.PermissionDenied, "the join token is not known")
	}
	csr, err := x509.ParseCertificateRequest(r.Csr)
	if err != nil || csr.CheckSignature() != nil {
		return nil, status.Error(codes.InvalidArgument, "bad CSR")
	}
	if have, ok := c.enrolled[r.Node]; ok && string(have) != string(csr.RawSubjectPublicKeyInfo) {
		return nil, status.Error(codes.PermissionDenied, "the join token was used already")
	}
	c.enrolled[r.Node] = csr.RawSubjectPublicKeyInfo
	chain, err := c.issueLocked(r.Node, csr)
	if err != nil {
		return nil, err
	}
	return &signetv1.EnrolResponse{Chain: chain, Bundle: c.PKI.Bundle.DER(), NodeId: r.Node}, nil
}

func (c *Coordinator) issueLocked(node string, csr *x509.CertificateRequest) ([][]byte, error) {
	id, err := c.PKI.TD.Node(node)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if c.loseNext {
		c.loseNext = false
		return nil, status.Error(codes.Unavailable, "the answer was lost")
	}
	now := time.Now()
	if c.life < 0 {
		return c.PKI.Issue(c.t, id, csr.PublicKey.(*ecdsa.PublicKey), now.Add(2*c.life), now.Add(c.life)), nil
	}
	return c.PKI.Issue(c.t, id, csr.PublicKey.(*ecdsa.PublicKey), now.Add(-time.Minute), now.Add(c.life)), nil
}

func (c *Coordinator) caller(ctx context.Context, grace time.Duration) (identity.Verified, error) {
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return identity.Verified{}, status.Error(codes.Unauthenticated, "no TLS")
	}
	v, err := identity.VerifyState(info.State, c.PKI.Bundle, identity.Options{Now: time.Now(), ExpiredGrace: grace})
	if err != nil {
		return v, status.Error(codes.Unauthenticated, err.Error())
	}
	return v, nil
}

// Renew is the RPC.
func (c *Coordinator) Renew(ctx context.Context, r *signetv1.RenewRequest) (*signetv1.RenewResponse, error) {
	v, err := c.caller(ctx, identity.RenewGrace)
	if err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(r.Csr)
	if err != nil || csr.CheckSignature() != nil {
		return nil, status.Error(codes.InvalidArgument, "bad CSR")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.life < 0 {
		c.life = time.Hour
	}
	chain, err := c.issueLocked(v.ID.NodeName(), csr)
	if err != nil {
		return nil, err
	}
	c.renewals++
	return &signetv1.RenewResponse{Chain: chain, Bundle: c.PKI.Bundle.DER()}, nil
}

// Sync is the RPC.
func (c *Coordinator) Sync(s grpc.BidiStreamingServer[signetv1.AgentMessage, signetv1.CoordinatorMessage]) error {
	if _, err := c.caller(s.Context(), 0); err != nil {
		return err
	}
	out := make(chan *signetv1.CoordinatorMessage, 64)
	c.mu.Lock()
	if c.last != nil {
		out <- c.last
	}
	c.streams[out] = struct{}{}
	c.mu.Unlock()
	defer func() { c.mu.Lock(); delete(c.streams, out); c.mu.Unlock() }()
	go func() {
		for {
			m, err := s.Recv()
			if err != nil {
				return
			}
			switch {
			case m.GetAck() != nil:
				offer(c.Acks, m.GetAck())
			case m.GetHello() != nil:
				offer(c.Hellos, m.GetHello())
			case m.GetEndpoints() != nil:
				offer(c.Endpoints, m.GetEndpoints())
			}
		}
	}()
	for {
		select {
		case <-s.Context().Done():
			return nil
		case m := <-out:
			if err := s.Send(m); err != nil {
				return err
			}
		}
	}
}

func offer[T any](ch chan T, v T) {
	select {
	case ch <- v:
	default:
	}
}

// Say sends a message to every connected agent. An Update is also sent to those that connect later.
func (c *Coordinator) Say(m *signetv1.CoordinatorMessage) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.GetUpdate() != nil {
		c.last = m
	}
	for ch := range c.streams {
		offer(ch, m)
	}
}

// Publish sends a snapshot whole.
func (c *Coordinator) Publish(s mesh.Snapshot) *signetv1.Update {
	u := c.PKI.Update(s)
	c.Say(&signetv1.CoordinatorMessage{Message: &signetv1.CoordinatorMessage_Update{Update: u}})
	return u
}

// Saved is the form of a snapshot on an agent's disk.
func (p *PKI) Saved(t testing.TB, s mesh.Snapshot) []byte {
	t.Helper()
	held, err := codec.Apply(nil, p.Update(s), codec.Trust{TrustDomain: p.TD, Node: s.Self.Node, Distribution: func(der []byte) (ed25519.PublicKey, error) {
		return identity.VerifyDistribution(p.Bundle, der, time.Now())
	}})
	check(t, err)
	return held.Marshal()
}

// Update signs a snapshot and puts it together whole. Manifest.Sections is made here.
func (p *PKI) Update(s mesh.Snapshot) *signetv1.Update {
	sections := []codec.Section{codec.EncodeSelf(s.Self), codec.EncodeWorkloads(s.Workloads), codec.EncodeNames(s.Names, s.Rules), codec.EncodeRevoked(s.Revoked)}
	for n, rs := range s.Rulesets {
		sections = append(sections, codec.EncodeRuleset(n, rs))
	}
	for _, b := range s.Bindings {
		sections = append(sections, codec.EncodeBinding(b, p.Sign))
	}
	u := &signetv1.Update{DistributionCertificate: p.Distribution}
	sortSections(sections)
	s.Manifest.Sections = nil
	for _, sec := range sections {
		s.Manifest.Sections = append(s.Manifest.Sections, sec.Ref)
		u.Sections = append(u.Sections, &signetv1.Section{Name: sec.Ref.Name, Body: sec.Body})
	}
	u.Manifest = codec.EncodeManifest(s.Manifest, p.TD, p.Sign)
	return u
}
