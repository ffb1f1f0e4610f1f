package localapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
)

const (
	// maxAnswer bounds one answer; a longer one is an error.
	maxAnswer = 64 << 20
	// answerTimeout bounds everything but up, ping and flows -f, which wait for others.
	answerTimeout = 10 * time.Second
)

// Client asks the agent of this host. The zero value uses DefaultSocket. It is safe for use by several goroutines.
type Client struct {
	Socket string
}

// Status asks how the agent is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return get[Status](ctx, c, "/v1/status")
}

// Peers lists the WireGuard peers.
func (c *Client) Peers(ctx context.Context) ([]Peer, error) { return get[[]Peer](ctx, c, "/v1/peers") }

// Workloads lists the host's own workloads.
func (c *Client) Workloads(ctx context.Context) ([]Workload, error) {
	return get[[]Workload](ctx, c, "/v1/workloads")
}

// Resolve finds the overlay addresses of a workload: "zone/name" or a full SPIFFE ID.
func (c *Client) Resolve(ctx context.Context, id string) (Resolved, error) {
	return get[Resolved](ctx, c, "/v1/resolve?id="+url.QueryEscape(id))
}

// Netcheck asks how this host is reached.
func (c *Client) Netcheck(ctx context.Context) (Netcheck, error) {
	return get[Netcheck](ctx, c, "/v1/netcheck")
}

// Up enrols the host, or takes back a down. It returns when the coordinator has answered, or when ctx ends.
func (c *Client) Up(ctx context.Context, r UpRequest) (UpReply, error) {
	return call[UpReply](ctx, c, http.MethodPost, "/v1/up", r)
}

// Down stops traffic and keeps denying; with release it removes everything that guards the overlay.
func (c *Client) Down(ctx context.Context, release bool) error {
	_, err := call[struct{}](ctx, c, http.MethodPost, "/v1/down", DownRequest{Release: release})
	return err
}

// Ping makes WireGuard prove a peer anew. target is a node's name, a workload or an overlay address.
func (c *Client) Ping(ctx context.Context, target string) (PingReply, error) {
	return call[PingReply](ctx, c, http.MethodPost, "/v1/ping", struct {
		Target string `json:"target"`
	}{target})
}

// Flows calls report for the recent records and, with follow, for each new one until ctx ends, which is not an error.
// It stops when report returns an error, and returns that.
func (c *Client) Flows(ctx context.Context, follow bool, report func(flow.Record) error) error {
	path := "/v1/flows"
	if follow {
		path += "?follow=1"
	}
	res, done, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		if follow && ctx.Err() != nil {
			return nil // the head comes with the first record
		}
		return err
	}
	defer done()
	dec := json.NewDecoder(res.Body)
	for {
		var r flow.Record
		switch err := dec.Decode(&r); {
		case errors.Is(err, io.EOF) && !follow, ctx.Err() != nil:
			return nil
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return &Error{Code: CodeNotRunning, Message: "the agent stopped", Hint: "see: journalctl -u signetd"}
		case err != nil:
			return fmt.Errorf("read flow records: %w", err)
		}
		if err := report(r); err != nil {
			return err
		}
	}
}

func get[T any](ctx context.Context, c *Client, path string) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	return call[T](ctx, c, http.MethodGet, path, nil)
}

func call[T any](ctx context.Context, c *Client, method, path string, body any) (T, error) {
	var out T
	res, done, err := c.do(ctx, method, path, body)
	if err != nil {
		return out, err
	}
	defer done()
	if err := json.NewDecoder(io.LimitReader(res.Body, maxAnswer)).Decode(&out); err != nil {
		return out, fmt.Errorf("read the agent's answer: %w", err)
	}
	return out, nil
}

// do sends one request; done must be called when the body has been read.
func (c *Client) do(ctx context.Context, method, path string, body any) (*http.Response, func(), error) {
	socket := c.Socket
	if socket == "" {
		socket = DefaultSocket
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	var payload io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, nil, fmt.Errorf("encode request: %w", err)
		}
		payload = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, payload)
	if err != nil {
		return nil, nil, fmt.Errorf("make request: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return nil, nil, unreachable(socket, err)
	}
	done := func() { _ = res.Body.Close(); transport.CloseIdleConnections() }
	if res.StatusCode/100 == 2 {
		return res, done, nil
	}
	defer done()
	refusal := &Error{}
	if err := json.NewDecoder(io.LimitReader(res.Body, 1<<16)).Decode(refusal); err != nil || refusal.Message == "" {
		refusal = &Error{Code: CodeInternal, Message: "the agent answered " + res.Status}
	}
	return nil, nil, refusal
}

// unreachable says what a person can do about a socket that does not answer.
func unreachable(socket string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED):
		return &Error{Code: CodeNotRunning, Message: fmt.Sprintf("the agent is not running: nothing answers at %s", socket), Hint: "start it with: systemctl start signetd"}
	case errors.Is(err, fs.ErrPermission):
		return &Error{Code: CodeForbidden, Message: fmt.Sprintf("you may not use %s", socket), Hint: "run this as root or as a member of group signet"}
	case errors.Is(err, context.DeadlineExceeded):
		return &Error{Code: CodeNoAnswer, Message: "the agent did not answer in time", Hint: "see: journalctl -u signetd"}
	}
	return fmt.Errorf("ask the agent at %s: %w", socket, err)
}
