package session

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/proto/signetv1"
)

const (
	secretSize = 32
	maxCSR     = 4 << 10
)

// Join is a host that asks to join; its key is proven.
type Join struct {
	Secret       [secretSize]byte // of its join token
	Node         string           // the name that it claims
	WireGuardKey key.Public
	CSR          []byte   // DER
	SPKI         [32]byte // of the key that signed the CSR
}

// Renewal is a node that asks for its next SVID.
type Renewal struct {
	ID      identity.ID // proven by the certificate that it presented
	SPKI    [32]byte    // of that certificate
	CSR     []byte
	NewSPKI [32]byte // of the key that signed the CSR; may be the same
}

// Issued is the answer to either.
type Issued struct {
	Node  registry.Node
	Chain [][]byte // DER, leaf first, without the root
}

// Enrol exchanges a join token for a node SVID.
func (s *Server) Enrol(ctx context.Context, req *signetv1.EnrolRequest) (*signetv1.EnrolResponse, error) {
	if len(req.TokenSecret) != secretSize {
		return nil, status.Error(codes.InvalidArgument, "the join token's secret has not the right length")
	}
	wg, err := key.PublicFromBytes(req.WireguardKey)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	spki, err := provenKey(req.Csr)
	if err != nil {
		return nil, err
	}
	out, err := s.cfg.Members.Enrol(ctx, Join{Secret: [secretSize]byte(req.TokenSecret), Node: req.Node, WireGuardKey: wg, CSR: req.Csr, SPKI: spki})
	if err != nil {
		return nil, s.refusal(ctx, "enrol", req.Node, err)
	}
	// Where the name changed hands, the host that had it is out from now on.
	s.live.endNode(out.Node.Name, errRekeyed, func(c *session) bool { return c.who.spki == spki })
	s.cfg.Log.Info("host enrolled", "node", out.Node.Name, "status", string(out.Node.Status), "version", plain(req.Version))
	return &signetv1.EnrolResponse{Chain: out.Chain, Bundle: s.cfg.Trust.Bundle().DER(), NodeId: out.Node.ID.String(),
		Pending: out.Node.Status == registry.NodePending}, nil
}

// Renew replaces a node's SVID. Its certificate may have ended; its key must be the registered one, or the one before.
func (s *Server) Renew(ctx context.Context, req *signetv1.RenewRequest) (*signetv1.RenewResponse, error) {
	who, err := s.caller(ctx, identity.RenewGrace)
	if err != nil {
		return nil, err
	}
	spki, err := provenKey(req.Csr)
	if err != nil {
		return nil, err
	}
	out, err := s.cfg.Members.Renew(ctx, Renewal{ID: who.id, SPKI: who.spki, CSR: req.Csr, NewSPKI: spki})
	if err != nil {
		return nil, s.refusal(ctx, "renew", who.node, err)
	}
	return &signetv1.RenewResponse{Chain: out.Chain, Bundle: s.cfg.Trust.Bundle().DER()}, nil
}

// provenKey returns the hash of the key that signed the request. Nothing else in a CSR counts.
func provenKey(der []byte) ([32]byte, error) {
	if len(der) == 0 || len(der) > maxCSR {
		return [32]byte{}, status.Errorf(codes.InvalidArgument, "the certificate request has %d bytes, expected 1 to %d", len(der), maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return [32]byte{}, status.Error(codes.InvalidArgument, "the certificate request does not parse")
	}
	if k, ok := csr.PublicKey.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() {
		return [32]byte{}, status.Error(codes.InvalidArgument, "the certificate request is for another kind of key, expected P-256")
	}
	if csr.CheckSignature() != nil {
		return [32]byte{}, status.Error(codes.InvalidArgument, "the certificate request is not signed by its own key")
	}
	return sha256.Sum256(csr.RawSubjectPublicKeyInfo), nil
}

// refusals are what callers may know, and the code that they can act on. The sentinel's sentence is all that is told.
var refusals = []struct {
	err  error
	code codes.Code
}{
	{registry.ErrTokenUnknown, codes.PermissionDenied},
	{registry.ErrTokenUsed, codes.PermissionDenied},
	{registry.ErrTokenExpired, codes.PermissionDenied},
	{registry.ErrTokenRevoked, codes.PermissionDenied},
	{registry.ErrTokenOtherName, codes.PermissionDenied},
	{registry.ErrKeyTaken, codes.PermissionDenied},
	{registry.ErrKeyRetired, codes.PermissionDenied},
	{registry.ErrNodeRevoked, codes.PermissionDenied},
	{registry.ErrNodeUnknown, codes.PermissionDenied},
	{registry.ErrNameTaken, codes.AlreadyExists},
	{registry.ErrPoolExhausted, codes.ResourceExhausted},
	{key.ErrKey, codes.InvalidArgument},
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
}

// refusal turns an error into one plain sentence. What is not on the list is the coordinator's own trouble: the caller
// learns that much, and the log the rest.
func (s *Server) refusal(ctx context.Context, what, node string, err error) error {
	for _, r := range refusals {
		if errors.Is(err, r.err) {
			s.cfg.Log.Warn("refused", "request", what, "node", plain(node), "from", from(ctx), "err", r.err)
			return status.Error(r.code, r.err.Error())
		}
	}
	if errors.Is(err, identity.ErrID) {
		return status.Errorf(codes.InvalidArgument, "%.70q is not a node name: expected a-z A-Z 0-9 . - _, at most %d", node, identity.MaxNameLength)
	}
	s.cfg.Log.Error("request failed", "request", what, "node", plain(node), "err", err)
	return status.Error(codes.Internal, "the coordinator could not do it; its log says why")
}
