package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"reflect"
	"strconv"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/compile"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// etag is the policy revision as HTTP writes it.
func etag(revision uint64) string { return `"` + strconv.FormatUint(revision, 10) + `"` }

type getPolicyInput struct {
	IfNoneMatch string `header:"If-None-Match" maxLength:"64"`
}

type policyOutput struct {
	ETag string `header:"ETag"`
	Body apitypes.Policy
}

func (s *server) getPolicy(ctx context.Context, in *getPolicyInput) (*policyOutput, error) {
	revision := s.deps.Mesh.State().PolicyRevision
	if in.IfNoneMatch == etag(revision) {
		return nil, huma.ErrorWithHeaders(&apitypes.Problem{Status: http.StatusNotModified}, http.Header{"ETag": {etag(revision)}})
	}
	return s.source(ctx, revision)
}

type revisionInput struct {
	N uint64 `path:"n" maximum:"9007199254740991" doc:"Policy revision"`
}

func (s *server) showRevision(ctx context.Context, in *revisionInput) (*policyOutput, error) {
	if in.N == 0 {
		return nil, notFound("policy revision", "0")
	}
	return s.source(ctx, in.N)
}

func (s *server) source(ctx context.Context, revision uint64) (*policyOutput, error) {
	out := &policyOutput{ETag: etag(revision), Body: apitypes.Policy{Revision: revision, Files: []apitypes.File{}}}
	if revision == 0 {
		return out, nil
	}
	files, err := s.deps.Policies.PolicySource(ctx, revision)
	if errors.Is(err, registry.ErrPolicyUnknown) {
		return nil, notFound("policy revision", strconv.FormatUint(revision, 10))
	}
	if err != nil {
		return nil, fmt.Errorf("read the policy: %w", err)
	}
	for _, f := range files {
		out.Body.Files = append(out.Body.Files, apitypes.File{Name: f.Name, Data: string(f.Data)})
	}
	return out, nil
}

// DocumentInput is a policy document in one of two forms; see documentBody. It is exported for huma, which reads embedded
// structs only then.
type DocumentInput struct {
	ContentType string `header:"Content-Type"`
	RawBody     []byte `contentType:"text/yaml"`
}

// documentBody declares the two forms of a document: JSON with files, or one YAML file as it is. huma does not check
// them: a document's own errors say more.
func (s *server) documentBody(op *huma.Operation) {
	schema := s.api.OpenAPI().Components.Schemas.Schema(reflect.TypeFor[apitypes.PolicyRequest](), true, "PolicyRequest")
	op.SkipValidateBody = true
	op.RequestBody = &huma.RequestBody{Required: true, Content: map[string]*huma.MediaType{typeJSON: {Schema: schema}}}
}

// files reads the sources out of the body. They are copied: the buffer is used again after the request.
func (in DocumentInput) files() ([]policydoc.File, error) {
	kind, _, err := mime.ParseMediaType(in.ContentType)
	switch {
	case err == nil && isYAML(kind):
		return []policydoc.File{{Name: "policy.yaml", Data: bytes.Clone(in.RawBody)}}, nil
	case err != nil || kind != typeJSON:
		return nil, problem(http.StatusUnsupportedMediaType, apitypes.CodeMediaType, "the body's type is not one of a policy document", "send application/json or text/yaml")
	}
	var r apitypes.PolicyRequest
	dec := json.NewDecoder(bytes.NewReader(in.RawBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return nil, problem(http.StatusBadRequest, apitypes.CodeInvalid, "the body is not a JSON policy request", `expected {"files":[{"name":…,"data":…}]}`)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, problem(http.StatusBadRequest, apitypes.CodeInvalid, "the body goes on after its JSON value", "")
	}
	if len(r.Files) == 0 || len(r.Files) > policydoc.MaxFiles {
		return nil, invalid(fmt.Sprintf("the request has %d files, expected 1 to %d", len(r.Files), policydoc.MaxFiles), "")
	}
	out := make([]policydoc.File, 0, len(r.Files))
	seen := make(map[string]bool, len(r.Files))
	for i, f := range r.Files {
		if p := fileName(f.Name); p != "" || seen[f.Name] {
			if p == "" {
				p = "stands there twice"
			}
			return nil, invalid(fmt.Sprintf("the name of file %d, %.70q, %s", i+1, f.Name, p), "")
		}
		seen[f.Name] = true
		out = append(out, policydoc.File{Name: f.Name, Data: []byte(f.Data)})
	}
	return out, nil
}

const maxFileName = 255

// fileName says what is wrong with a file's name. Names come back in errors and are written to disk by clients: no
// control signs, no way out of a directory.
func fileName(s string) string {
	switch {
	case s == "" || len(s) > maxFileName:
		return fmt.Sprintf("has %d bytes, expected 1 to %d", len(s), maxFileName)
	case strings.HasPrefix(s, "/") || strings.Contains("/"+s+"/", "/../") || strings.Contains("/"+s+"/", "/./") || strings.Contains(s, "//") || strings.Contains(s, `\`):
		return "is not a plain relative name"
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' || s[i] == ':' {
			return "has signs other than letters, digits and - _ . /"
		}
	}
	return ""
}

// examine parses and tests a document.
func (s *server) examine(files []policydoc.File) (*policydoc.Document, apitypes.PolicyCheck) {
	check := apitypes.PolicyCheck{Errors: []apitypes.Issue{}, Warnings: []string{}, Tests: []apitypes.TestResult{}}
	doc, warnings, err := policydoc.Parse(s.deps.Mesh.State().TrustDomain, files)
	if err != nil {
		check.Errors = issues(err)
		return nil, check
	}
	for _, w := range warnings {
		check.Warnings = append(check.Warnings, w.String())
	}
	results, err := compile.RunTests(doc, s.deps.Now())
	if err != nil {
		check.Errors = issues(err)
		return nil, check
	}
	check.OK = true
	for _, r := range results {
		check.OK = check.OK && r.Pass
		check.Tests = append(check.Tests, testResult(r))
	}
	return doc, check
}

func testResult(r compile.TestResult) apitypes.TestResult {
	out := apitypes.TestResult{
		OK: r.Pass, From: r.Test.From.Short(), To: r.Test.To.Short(), Port: r.Test.Service.String(), Expect: r.Test.Expect.String(),
		Got: r.Verdict.String(), Code: r.Code.String(), Rule: r.Rule, At: r.Test.At.String(), Text: r.String(),
	}
	if r.Explanation != nil {
		out.Remedy = r.Explanation.Remedy
	}
	return out
}

// issues lists the faults of a document with their places.
func issues(err error) []apitypes.Issue {
	var list policydoc.Errors
	if !errors.As(err, &list) {
		return []apitypes.Issue{{Text: err.Error()}}
	}
	out := make([]apitypes.Issue, 0, len(list))
	for _, e := range list {
		out = append(out, apitypes.Issue{File: e.Pos.File, Line: e.Pos.Line, Column: e.Pos.Column, Text: e.Error()})
	}
	return out
}

func (s *server) checkPolicy(_ context.Context, in *DocumentInput) (*output[apitypes.PolicyCheck], error) {
	files, err := in.files()
	if err != nil {
		return nil, err
	}
	_, check := s.examine(files)
	return &output[apitypes.PolicyCheck]{check}, nil
}

type putPolicyInput struct {
	DocumentInput
	IfMatch string `header:"If-Match" maxLength:"64" doc:"ETag of the policy that the document was made from"`
}

type appliedOutput struct {
	ETag string `header:"ETag"`
	Body apitypes.PolicyApplied
}

// putPolicy commits a document: parse, test, commit. What fails on the way leaves everything as it was.
func (s *server) putPolicy(ctx context.Context, in *putPolicyInput) (*appliedOutput, error) {
	files, err := in.files()
	if err != nil {
		return nil, err
	}
	var base *uint64
	if in.IfMatch != "" && in.IfMatch != "*" {
		n, ok := ifMatch(in.IfMatch)
		if !ok {
			return nil, problem(http.StatusBadRequest, apitypes.CodeInvalid, fmt.Sprintf("If-Match %.64q is not an ETag of the policy", in.IfMatch), `expected such as "17", quotes included`)
		}
		base = &n
		// The registry decides; asking early spares the work on a document that is refused anyway.
		if now := s.deps.Mesh.State().PolicyRevision; n != now {
			return nil, stale(n, now)
		}
	}
	doc, check := s.examine(files)
	if !check.OK {
		return nil, refusedDocument(check)
	}
	sources := make([]registry.SourceFile, 0, len(files))
	for _, f := range files {
		sources = append(sources, registry.SourceFile{Name: f.Name, Data: f.Data})
	}
	revision, err := s.deps.Policies.ApplyPolicy(ctx, doc, sources, actorOf(ctx).name(), base)
	if err != nil {
		return nil, err
	}
	return applied(revision, check), nil
}

func applied(revision uint64, check apitypes.PolicyCheck) *appliedOutput {
	return &appliedOutput{ETag: etag(revision), Body: apitypes.PolicyApplied{Revision: revision, Warnings: check.Warnings, Tests: len(check.Tests)}}
}

// ifMatch reads one strong ETag; a weak one never matches (RFC 9110, section 13.1.1).
func ifMatch(s string) (uint64, bool) {
	inner, ok := strings.CutPrefix(s, `"`)
	if ok {
		inner, ok = strings.CutSuffix(inner, `"`)
	}
	n, err := strconv.ParseUint(inner, 10, 64)
	return n, ok && err == nil && etag(n) == s
}

func stale(base, now uint64) *apitypes.Problem {
	return problem(http.StatusPreconditionFailed, apitypes.CodePrecondition, fmt.Sprintf("the document was made from policy revision %d, and %d is in force", base, now),
		"look at the change with: signet policy get")
}

// refusedDocument is the answer for a document with errors or failing tests.
func refusedDocument(check apitypes.PolicyCheck) *apitypes.Problem {
	if len(check.Errors) > 0 {
		p := problem(http.StatusUnprocessableEntity, apitypes.CodePolicyInvalid, "the policy document has errors; nothing was changed", "correct them, then apply it again")
		p.Errors = check.Errors
		return p
	}
	p := problem(http.StatusUnprocessableEntity, apitypes.CodePolicyTests, "tests of the policy document fail; nothing was changed", "correct the rules or the tests")
	for _, t := range check.Tests {
		if !t.OK && len(p.Errors) < maxIssues {
			p.Errors = append(p.Errors, apitypes.Issue{Text: t.Text})
		}
	}
	return p
}
