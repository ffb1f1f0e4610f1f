package identity

import (
	"crypto/tls"
	"time"
)

// The configurations below are TLS 1.3 only and verify in VerifyConnection, which crypto/tls calls for resumed
// connections too (it skips VerifyPeerCertificate there, so that a ban would not bite). Tickets are off besides:
// nothing is resumed. A test may set the Time field before first use.

// ClientTLS is for an enrolled peer that calls wantServer. source gives the current SVID, or nil to present none.
func ClientTLS(source func() *tls.Certificate, bundle func() Bundle, wantServer ID) *tls.Config {
	cfg := baseTLS()
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if c := source(); c != nil {
			return c, nil
		}
		return &tls.Certificate{}, nil
	}
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		v, err := VerifyState(cs, bundle(), Options{Now: clock(cfg), Usage: UsageServer})
		if err != nil {
			return err
		}
		if v.ID != wantServer {
			return idMismatch(wantServer, v.ID)
		}
		return nil
	}
	return cfg
}

// ServerTLS is for the coordinator. A client certificate is asked for and, when there is one, verified; handlers
// demand it with VerifyState. grace lets expired SVIDs reach the handler of Renew: every other handler must verify
// with a grace of zero, which VerifyState does by default.
func ServerTLS(source func() *tls.Certificate, bundle func() Bundle, grace time.Duration) *tls.Config {
	cfg := baseTLS()
	cfg.ClientAuth = tls.RequestClientCert
	cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		c := source()
		if c == nil {
			return nil, &VerifyError{Code: CodeNoCertificate, Detail: "this server has no certificate yet"}
		}
		return c, nil
	}
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if cs.Version < tls.VersionTLS13 {
			return &VerifyError{Code: CodeTLSVersion, Detail: "expected TLS 1.3"}
		}
		if len(cs.PeerCertificates) == 0 {
			return nil
		}
		_, err := VerifyState(cs, bundle(), Options{Now: clock(cfg), Usage: UsageClient, ExpiredGrace: grace})
		return err
	}
	return cfg
}

// PinnedTLS is for enrolment: nothing is known of the server but the pin in the join token. The handshake fails before
// the token leaves the host. Afterwards VerifyPinned over the connection's PeerCertificates gives the bundle.
func PinnedTLS(pin [32]byte) *tls.Config {
	cfg := baseTLS()
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if cs.Version < tls.VersionTLS13 {
			return &VerifyError{Code: CodeTLSVersion, Detail: "expected TLS 1.3"}
		}
		_, _, err := VerifyPinned(pin, cs.PeerCertificates, clock(cfg))
		return err
	}
	return cfg
}

// VerifyState verifies the peer of a finished handshake. Long-lived streams call it again, because certificates end
// while connections live.
func VerifyState(cs tls.ConnectionState, b Bundle, opts Options) (Verified, error) {
	if cs.Version < tls.VersionTLS13 {
		return Verified{}, &VerifyError{Code: CodeTLSVersion, Detail: "expected TLS 1.3"}
	}
	return VerifyX509(b, cs.PeerCertificates, opts)
}

func baseTLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		// crypto/tls would look for a host name, which an SVID does not have. VerifyConnection takes its place.
		InsecureSkipVerify: true,
	}
}

func clock(cfg *tls.Config) time.Time {
	if cfg.Time != nil {
		return cfg.Time()
	}
	return time.Now()
}
