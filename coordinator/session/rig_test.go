package session_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/signet-overlay/signet/coordinator/authority"
	"github.com/signet-overlay/signet/coordinator/publish"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/coordinator/session"
	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/policydoc"
	"github.com/signet-overlay/signet/proto/codec"
	"github.com/signet-overlay/signet/proto/signetv1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	document = `
zones: [{name: app}, {name: data}]
workloads:
  - {id: app/api, selectors: ["unit:api.service"], nodes: ["api-*"]}
  - {id: app/hook, selectors: ["unit:hook.service"], nodes: ["api-*"]}
  - {id: data/db, selectors: ["unit:db.service"], nodes: ["db-*"]}
rules:
  - {id: api-to-db, from: [app/api], to: [data/db], allow: [tcp/5432]}
`
	hookRule = "  - {id: hook-to-db, from: [app/hook], to: [data/db], allow: [tcp/5432]}\n"
	patience = 10 * time.Second // for anything that a test waits for; the machine is shared
)

// rig is a coordinator with a real store, authority, registry and publisher behind a server on loopback.
type rig struct {
	t       testing.TB
	td      identity.TrustDomain
	reg     *registry.Registry
	auth    *authority.Authority
	pub     *publish.Publisher
	srv     *session.Server
	addr    string
	checked chan struct{} // poked when a node's key was looked at
	proofs  atomic.Int64  // calls of Proven
	skew    atomic.Int64  // the server's clock is ahead by this
	tokens  sync.Map      // secret to identity.JoinToken
	stored  chan struct{} // poked when a report was stored
	stop    func() error
}

type options struct {
	config func(*session.Config)
	life   time.Duration
}

func newRig(t testing.TB, opts ...func(*options)) *rig {
	t.Helper()
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	ctx := t.Context()
	r := &rig{t: t, stored: make(chan struct{}, 1), checked: make(chan struct{}, 1)}
	r.td = must(identity.ParseTrustDomain("settler.example"))(t)
	db := must(store.OpenSQLite(ctx, t.TempDir()))(t)
	sealing := must(key.NewStateKey())(t)
	ao := authority.Options{TrustDomain: r.td, Key: sealing, NodeLife: o.life}
	if err := authority.Init(ctx, db, ao); err != nil {
		t.Fatal(err)
	}
	r.auth = must(authority.Open(ctx, db, ao))(t)
	r.reg = must(registry.Open(ctx, db, registry.Options{TrustDomain: r.td, Pin: func() [32]byte { return r.auth.Bundle().Pin() }}))(t)
	log := slog.New(slog.DiscardHandler)
	r.pub = must(publish.New(ctx, publish.Config{Source: r.reg, Signer: r.auth, Log: log}))(t)
	cfg := session.Config{Members: members{r}, Publisher: r.pub, Trust: r.auth, Log: log, Now: func() time.Time { return time.Now().Add(time.Duration(r.skew.Load())) }}
	if o.config != nil {
		o.config(&cfg)
	}
	r.srv = session.New(cfg)
	lis := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	r.addr = lis.Addr().String()
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 2)
	go func() { ended <- r.pub.Run(run) }()
	go func() { ended <- r.srv.Serve(run, lis) }()
	r.stop = sync.OnceValue(func() error {
		cancel()
		return errors.Join(<-ended, <-ended, db.Close())
	})
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
	r.apply(document)
	return r
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func (r *rig) apply(text string) uint64 {
	r.t.Helper()
	doc, _, err := policydoc.Parse(r.td, []policydoc.File{{Name: "policy.yaml", Data: []byte(text)}})
	if err != nil {
		r.t.Fatal(err)
	}
	rev, err := r.reg.ApplyPolicy(r.t.Context(), doc, []registry.SourceFile{{Name: "policy.yaml", Data: []byte(text)}}, "test", nil)
	if err != nil {
		r.t.Fatal(err)
	}
	return rev
}

// members is the root's adapter, with tokens found by the secret that travels.
type members struct{ r *rig }

func (m members) State() *registry.State { return m.r.reg.State() }
func (m members) CheckNode(id identity.ID, spki [32]byte) (registry.Node, error) {
	defer func() {
		select {
		case m.r.checked <- struct{}{}:
		default:
		}
	}()
	return m.r.reg.CheckNode(id, spki)
}
func (m members) Proven(ctx context.Context, id identity.ID, spki [32]byte) error {
	m.r.proofs.Add(1)
	return m.r.reg.Proven(ctx, id, spki)
}
func (m members) Applied(ctx context.Context, node string, rep registry.AppliedReport) error {
	defer func() {
		select {
		case m.r.stored <- struct{}{}:
		default:
		}
	}()
	return m.r.reg.Applied(ctx, node, rep)
}
func (m members) Enrol(ctx context.Context, j session.Join) (out session.Issued, err error) {
	req, err := authority.ParseRequest(j.CSR)
	if err != nil {
		return out, err
	}
	token, ok := m.r.tokens.Load(j.Secret)
	if !ok {
		return out, registry.ErrTokenUnknown
	}
	out.Node, _, err = m.r.reg.Enrol(ctx, registry.EnrolRequest{Token: token.(identity.JoinToken), Node: j.Node, SPKI: req.SPKI, WireGuardKey: j.WireGuardKey, Issue: m.issue(req, &out)})
	return out, err
}
func (m members) Renew(ctx context.Context, rn session.Renewal) (out session.Issued, err error) {
	req, err := authority.ParseRequest(rn.CSR)
	if err != nil {
		return out, err
	}
	out.Node, err = m.r.reg.Renew(ctx, registry.RenewRequest{ID: rn.ID, SPKI: rn.SPKI, NewSPKI: req.SPKI, Issue: m.issue(req, &out)})
	return out, err
}
func (m members) issue(req authority.Request, out *session.Issued) func(store.Tx, registry.Node) error {
	return func(tx store.Tx, n registry.Node) error {
		is, err := m.r.auth.IssueNodeIn(tx, req, n.ID)
		out.Chain = is.Chain
		return err
	}
}

func (r *rig) token(req registry.TokenRequest) (secret [32]byte) {
	r.t.Helper()
	text, _, err := r.reg.CreateJoinToken(r.t.Context(), req)
	if err != nil {
		r.t.Fatal(err)
	}
	token := must(identity.ParseJoinToken(text))(r.t)
	_, _ = rand.Read(secret[:])
	r.tokens.Store(secret, token)
	return secret
}

// host is a test agent.
type host struct {
	r    *rig
	name string
	priv *ecdsa.PrivateKey
	wg   key.Public
	held *codec.Held

	mu   sync.Mutex
	cert *tls.Certificate
}

func (r *rig) newHost(name string) *host {
	r.t.Helper()
	sum := sha256.Sum256([]byte(name))
	return &host{r: r, name: name, priv: must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(r.t), wg: must(key.PublicFromBytes(sum[:]))(r.t)}
}

// enrolled makes a host that has joined under its name.
func (r *rig) enrolled(name string) *host {
	r.t.Helper()
	h := r.newHost(name)
	if _, err := h.enrol(r.token(registry.TokenRequest{Node: name})); err != nil {
		r.t.Fatalf("enrol %s: %v", name, err)
	}
	return h
}

func (h *host) csr(k *ecdsa.PrivateKey) []byte {
	return must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k))(h.r.t)
}

func (h *host) dial(cfg *tls.Config) *grpc.ClientConn {
	return must(grpc.NewClient("passthrough:///"+h.r.addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(session.MaxUpdate))))(h.r.t)
}

func (h *host) enrol(secret [32]byte) (*signetv1.EnrolResponse, error) {
	conn := h.dial(identity.PinnedTLS(h.r.auth.Bundle().Pin()))
	defer conn.Close()
	ctx, cancel := context.WithTimeout(h.r.t.Context(), patience)
	defer cancel()
	resp, err := signetv1.NewEnrolmentClient(conn).Enrol(ctx, &signetv1.EnrolRequest{TokenSecret: secret[:], Node: h.name, Csr: h.csr(h.priv), WireguardKey: h.wg.Bytes(), Version: "test"})
	if err == nil {
		h.use(resp.Chain, h.priv)
	}
	return resp, err
}

func (h *host) use(chain [][]byte, k *ecdsa.PrivateKey) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.priv, h.cert = k, &tls.Certificate{Certificate: chain, PrivateKey: k}
}

func (h *host) svid() *tls.Certificate {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cert
}

func (h *host) client() *grpc.ClientConn {
	return h.dial(identity.ClientTLS(h.svid, h.r.auth.Bundle, h.r.td.Coordinator()))
}

func (h *host) renew(k *ecdsa.PrivateKey) error {
	conn := h.client()
	defer conn.Close()
	ctx, cancel := context.WithTimeout(h.r.t.Context(), patience)
	defer cancel()
	resp, err := signetv1.NewEnrolmentClient(conn).Renew(ctx, &signetv1.RenewRequest{Csr: h.csr(k)})
	if err == nil {
		h.use(resp.Chain, k)
	}
	return err
}

// line is one open stream.
type line struct {
	h      *host
	conn   *grpc.ClientConn
	stream grpc.BidiStreamingClient[signetv1.AgentMessage, signetv1.CoordinatorMessage]
	cancel context.CancelFunc
	failed error // of opening
}

func (h *host) connect() *line {
	h.r.t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(h.r.t.Context()))
	conn := h.client()
	l := &line{h: h, conn: conn, cancel: cancel}
	h.r.t.Cleanup(l.close)
	stream, err := signetv1.NewMeshClient(conn).Sync(ctx)
	if l.stream, l.failed = stream, err; err != nil {
		return l
	}
	l.hello(&signetv1.Hello{ListenPort: 51820})
	return l
}

func (l *line) hello(m *signetv1.Hello) {
	m.Version, m.Epoch, m.Sections, m.WireguardKey = "test", l.h.held.Epoch(), codec.EncodeRefs(l.h.held.Sections()), l.h.wg.Bytes()
	// An error of Send is that the stream has ended; Recv says why.
	_ = l.stream.Send(&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Hello{Hello: m}})
}

func (l *line) close() {
	l.cancel()
	_ = l.conn.Close()
}

// read waits for the next message.
func (l *line) read() (*signetv1.CoordinatorMessage, error) {
	if l.failed != nil {
		return nil, l.failed
	}
	timer := time.AfterFunc(patience, l.cancel)
	defer timer.Stop()
	return l.stream.Recv()
}

// update reads until the next Update, verifies and holds it. Hints on the way are returned.
func (l *line) update() (*signetv1.Update, []*signetv1.NodeEndpoints) {
	l.h.r.t.Helper()
	var hints []*signetv1.NodeEndpoints
	for {
		m, err := l.read()
		if err != nil {
			l.h.r.t.Fatalf("%s: %v", l.h.name, err)
		}
		if m.GetUpdate() == nil {
			hints = append(hints, m.GetHints().GetNodes()...)
			continue
		}
		if err := l.h.hold(m.GetUpdate()); err != nil {
			l.h.r.t.Fatalf("%s: %v", l.h.name, err)
		}
		return m.GetUpdate(), hints
	}
}

func (h *host) hold(u *signetv1.Update) error {
	held, err := codec.Apply(h.held, u, codec.Trust{TrustDomain: h.r.td, Node: h.name, Distribution: func(der []byte) (ed25519.PublicKey, error) {
		return identity.VerifyDistribution(h.r.auth.Bundle(), der, time.Now())
	}})
	if err != nil {
		return err
	}
	h.held = held
	return nil
}

func (l *line) ack(failure string) {
	m := l.h.held.Snapshot.Manifest
	_ = l.stream.Send(&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Ack{Ack: &signetv1.Ack{Epoch: m.Epoch, PolicyRevision: m.PolicyRevision, Error: failure}}})
}

// end reads until the stream ends, and returns its code.
func (l *line) end() (codes.Code, string) {
	for {
		m, err := l.read()
		if err != nil {
			return status.Code(err), status.Convert(err).Message()
		}
		if u := m.GetUpdate(); u != nil {
			if err := l.h.hold(u); err != nil {
				return codes.DataLoss, err.Error()
			}
		}
	}
}

// eventually waits for wakes until ok.
func (r *rig) eventually(what string, wake <-chan struct{}, ok func() bool) {
	r.t.Helper()
	limit := time.After(patience)
	for !ok() {
		select {
		case <-wake:
		case <-limit:
			r.t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

func names(u *signetv1.Update) []string {
	var out []string
	for _, s := range u.Sections {
		out = append(out, s.Name)
	}
	return out
}

func hasPrefix(t testing.TB, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("got %v, expected code %v", err, code)
	}
}

func bindingOf(n int, node string) string { return fmt.Sprintf("binding/%d/%s", n, node) }
