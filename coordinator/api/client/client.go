// Package client asks the coordinator's web API. It is small and hand-written: it links neither the server nor huma.
//
// It owns how a request is sent safely: the token goes only to the host that was named, never in clear over a network,
// and never into an error. Start at New; the calls are in calls.go.
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
)

const (
	timeout   = 30 * time.Second // of one call
	maxAnswer = 64 << 20
	prefix    = "/api/v1"
)

// What callers must tell apart besides *apitypes.Problem.
var (
	ErrAddress     = errors.New("invalid API address")
	ErrUnreachable = errors.New("the coordinator's API cannot be reached")
	ErrAnswer      = errors.New("what answered is not the coordinator's API")
)

// Options say how to reach the API.
type Options struct {
	Address string // https://host:port, or http:// to an address of this host
	Token   string
	// CA is PEM with the certificates to trust instead of the system's; empty for the system's.
	CA []byte
}

// Client asks one API. It is safe for use by several goroutines.
type Client struct {
	base  string
	token string
	http  *http.Client
}

// New checks the options. It does not connect.
func New(o Options) (*Client, error) {
	u, err := url.Parse(o.Address)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return nil, fmt.Errorf("%w %q: expected such as https://coordinator.example:7480", ErrAddress, o.Address)
	}
	switch {
	case u.Scheme == "https":
	case u.Scheme == "http" && local(u.Hostname()):
	case u.Scheme == "http":
		return nil, fmt.Errorf("%w %q: the token would travel in clear; expected https://, or http:// to 127.0.0.1 or localhost", ErrAddress, o.Address)
	default:
		return nil, fmt.Errorf("%w %q: expected https://", ErrAddress, o.Address)
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(o.CA) > 0 {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(o.CA) {
			return nil, fmt.Errorf("%w: the CA file has no PEM certificate", ErrAddress)
		}
	}
	transport := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true, Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: 10 * time.Second}
	if u.Scheme == "http" {
		transport.Proxy = nil
	}
	return &Client{
		base: u.Scheme + "://" + u.Host, token: o.Token,
		http: &http.Client{
			Transport: transport, Timeout: timeout,
			// A redirect would carry the token to wherever an answer says.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

func local(host string) bool {
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}

// request is one call.
type request struct {
	method, path string
	query        url.Values
	body         any // nil for none
	header       http.Header
}

// do sends a request and reads its answer into out, unless that is nil.
func (c *Client) do(ctx context.Context, r request, out any) error {
	var body io.Reader
	if r.body != nil {
		b, err := json.Marshal(r.body)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	target := c.base + prefix + r.path
	if len(r.query) > 0 {
		target += "?" + r.query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, r.method, target, body)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrAddress, err)
	}
	for k, v := range r.header {
		req.Header[k] = v
	}
	req.Header.Set("Accept", "application/json, "+apitypes.ProblemType)
	if r.body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return unreachable(c.base, err)
	}
	defer func() { _ = res.Body.Close() }()
	data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("%w at %s: read the answer: %w", ErrUnreachable, c.base, err)
	}
	if len(data) > maxAnswer {
		return fmt.Errorf("%w: more than %d bytes from %s", ErrAnswer, maxAnswer, c.base)
	}
	return c.read(res, data, out)
}

func (c *Client) read(res *http.Response, data []byte, out any) error {
	kind, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
	if res.StatusCode/100 != 2 {
		p := &apitypes.Problem{}
		if kind != apitypes.ProblemType || json.Unmarshal(data, p) != nil || p.Code == "" {
			return fmt.Errorf("%w: %s answered %s", ErrAnswer, c.base, res.Status)
		}
		return p
	}
	if out == nil {
		return nil
	}
	if kind != "application/json" {
		return fmt.Errorf("%w: %s sent %q", ErrAnswer, c.base, kind)
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrAnswer, c.base, err)
	}
	return nil
}

// unreachable leaves the request's URL out: the base says enough.
func unreachable(base string, err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		err = op.Err
	}
	return fmt.Errorf("%w at %s: %w", ErrUnreachable, base, err)
}
