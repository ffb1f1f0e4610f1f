package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
)

// maxPages bounds a listing: a server that never ends one must not keep the client for ever.
const maxPages = 1_000

// Nodes lists every node.
func (c *Client) Nodes(ctx context.Context) ([]apitypes.Node, error) {
	return all(func(cursor string) ([]apitypes.Node, string, error) {
		var page apitypes.NodeList
		err := c.do(ctx, list("/nodes", cursor), &page)
		return page.Nodes, page.NextCursor, err
	})
}

// Node shows one node.
func (c *Client) Node(ctx context.Context, name string) (out apitypes.Node, err error) {
	err = c.do(ctx, request{method: http.MethodGet, path: "/nodes/" + url.PathEscape(name)}, &out)
	return out, err
}

// ApproveNode lets a pending node have its workloads.
func (c *Client) ApproveNode(ctx context.Context, name string) error {
	return c.do(ctx, request{method: http.MethodPost, path: "/nodes/" + url.PathEscape(name) + "/approve"}, nil)
}

// RevokeNode takes a node back, for good.
func (c *Client) RevokeNode(ctx context.Context, name string) error {
	return c.do(ctx, request{method: http.MethodPost, path: "/nodes/" + url.PathEscape(name) + "/revoke"}, nil)
}

// CreateJoinToken makes a token that hosts may join with.
func (c *Client) CreateJoinToken(ctx context.Context, r apitypes.JoinTokenRequest) (out apitypes.JoinToken, err error) {
	err = c.do(ctx, request{method: http.MethodPost, path: "/join-tokens", body: r}, &out)
	return out, err
}

// Workloads lists every workload.
func (c *Client) Workloads(ctx context.Context) ([]apitypes.Workload, error) {
	return all(func(cursor string) ([]apitypes.Workload, string, error) {
		var page apitypes.WorkloadList
		err := c.do(ctx, list("/workloads", cursor), &page)
		return page.Workloads, page.NextCursor, err
	})
}

// Workload shows one workload, named zone/workload.
func (c *Client) Workload(ctx context.Context, short string) (out apitypes.Workload, err error) {
	err = c.do(ctx, request{method: http.MethodGet, path: workloadPath(short)}, &out)
	return out, err
}

// RevokeWorkload cuts a workload off, on one node or, when node is empty, on all.
func (c *Client) RevokeWorkload(ctx context.Context, short, node string) error {
	return c.do(ctx, request{method: http.MethodPost, path: workloadPath(short) + "/revoke", body: apitypes.RevokeRequest{Node: node}}, nil)
}

// Resolve lists the overlay addresses of a workload.
func (c *Client) Resolve(ctx context.Context, id string) (out apitypes.Resolution, err error) {
	err = c.do(ctx, request{method: http.MethodGet, path: "/resolve", query: url.Values{"id": {id}}}, &out)
	return out, err
}

// Policy reads the document in force.
func (c *Client) Policy(ctx context.Context) (out apitypes.Policy, err error) {
	err = c.do(ctx, request{method: http.MethodGet, path: "/policy"}, &out)
	return out, err
}

// PolicyAt reads the document of a revision.
func (c *Client) PolicyAt(ctx context.Context, revision uint64) (out apitypes.Policy, err error) {
	err = c.do(ctx, request{method: http.MethodGet, path: revisionPath(revision)}, &out)
	return out, err
}

// CheckPolicy checks and tests a document.
func (c *Client) CheckPolicy(ctx context.Context, files []apitypes.File) (out apitypes.PolicyCheck, err error) {
	err = c.do(ctx, request{method: http.MethodPost, path: "/policy/check", body: apitypes.PolicyRequest{Files: files}}, &out)
	return out, err
}

// ApplyPolicy commits a document; with base, only where that revision is in force.
func (c *Client) ApplyPolicy(ctx context.Context, files []apitypes.File, base *uint64) (out apitypes.PolicyApplied, err error) {
	r := request{method: http.MethodPut, path: "/policy", body: apitypes.PolicyRequest{Files: files}}
	if base != nil {
		r.header = http.Header{"If-Match": {fmt.Sprintf("%q", strconv.FormatUint(*base, 10))}}
	}
	err = c.do(ctx, r, &out)
	return out, err
}

// History lists every revision of the policy, newest first.
func (c *Client) History(ctx context.Context) ([]apitypes.Revision, error) {
	return all(func(cursor string) ([]apitypes.Revision, string, error) {
		var page apitypes.RevisionList
		err := c.do(ctx, list("/policy/revisions", cursor), &page)
		return page.Revisions, page.NextCursor, err
	})
}

// Rollback brings the document of a revision into force again; 0 is the one before the current.
func (c *Client) Rollback(ctx context.Context, revision uint64) (out apitypes.PolicyApplied, err error) {
	err = c.do(ctx, request{method: http.MethodPost, path: "/policy/rollback", body: apitypes.RollbackRequest{Revision: revision}}, &out)
	return out, err
}

// Rollout lists which hosts have applied a revision.
func (c *Client) Rollout(ctx context.Context, revision uint64) (out apitypes.Rollout, err error) {
	err = c.do(ctx, request{method: http.MethodGet, path: revisionPath(revision) + "/rollout"}, &out)
	return out, err
}

// Explain asks whether one workload may reach another, and why (not).
func (c *Client) Explain(ctx context.Context, r apitypes.ExplainRequest) (out apitypes.Explanation, err error) {
	err = c.do(ctx, request{method: http.MethodPost, path: "/explain", body: r}, &out)
	return out, err
}

func list(path, cursor string) request {
	q := url.Values{"limit": {"1000"}}
	if cursor != "" {
		q.Set("cursor", cursor)
	}
	return request{method: http.MethodGet, path: path, query: q}
}

// all follows the cursors of a listing.
func all[T any](page func(cursor string) ([]T, string, error)) ([]T, error) {
	out := []T{}
	cursor := ""
	for range maxPages {
		items, next, err := page(cursor)
		if err != nil {
			return nil, err
		}
		out = append(out, items...)
		if next == "" {
			return out, nil
		}
		cursor = next
	}
	return nil, fmt.Errorf("%w: its list has no end", ErrAnswer)
}

func workloadPath(short string) string {
	zone, name, _ := strings.Cut(short, "/")
	return "/workloads/" + url.PathEscape(zone) + "/" + url.PathEscape(name)
}

func revisionPath(n uint64) string { return "/policy/revisions/" + strconv.FormatUint(n, 10) }
