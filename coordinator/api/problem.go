package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/coordinator/compile"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// problem builds a refusal.
func problem(status int, code, detail, hint string) *apitypes.Problem {
	return &apitypes.Problem{Type: "about:blank", Title: http.StatusText(status), Status: status, Code: code, Detail: detail, Hint: hint}
}

func notFound(kind, name string) *apitypes.Problem {
	return problem(http.StatusNotFound, apitypes.CodeNotFound, fmt.Sprintf("there is no %s %.200q", kind, name), "")
}

func invalid(detail, hint string) *apitypes.Problem {
	return problem(http.StatusUnprocessableEntity, apitypes.CodeInvalid, detail, hint)
}

func notBuilt(what string) *apitypes.Problem {
	return problem(http.StatusNotImplemented, apitypes.CodeNotBuilt, what+" is not built yet", "")
}

func internalProblem() *apitypes.Problem {
	return problem(http.StatusInternalServerError, apitypes.CodeInternal, "the coordinator could not answer", "its log has the reason")
}

// refuse writes p where no route answers.
func (s *server) refuse(w http.ResponseWriter, p *apitypes.Problem) {
	w.Header().Set("Content-Type", apitypes.ProblemType)
	w.WriteHeader(p.Status)
	if err := json.NewEncoder(w).Encode(p); err != nil {
		s.deps.Log.Debug("write problem document", "error", err)
	}
}

// maxIssues bounds the faults that one answer lists.
const maxIssues = 50

// codeOfStatus gives refusals of huma their code.
func codeOfStatus(status int) string {
	switch status {
	case http.StatusRequestEntityTooLarge:
		return apitypes.CodeTooLarge
	case http.StatusUnsupportedMediaType, http.StatusNotAcceptable:
		return apitypes.CodeMediaType
	case http.StatusRequestTimeout:
		return apitypes.CodeTimeout
	}
	if status >= http.StatusInternalServerError {
		return apitypes.CodeInternal
	}
	return apitypes.CodeInvalid
}

// translate gives the refusals that huma makes the form of all others. What the request said is not repeated: it may
// hold a secret.
func translate(_ huma.Context, _ string, v any) (any, error) {
	m, ok := v.(*huma.ErrorModel)
	if !ok {
		return v, nil
	}
	if m.Status >= http.StatusInternalServerError {
		return internalProblem(), nil
	}
	p := problem(m.Status, codeOfStatus(m.Status), m.Detail, "")
	if p.Code == apitypes.CodeTooLarge {
		p = tooLarge()
	}
	for i, d := range m.Errors {
		if i == maxIssues {
			break
		}
		if d == nil {
			continue
		}
		text := d.Message
		if d.Location == "body" && m.Status == http.StatusBadRequest {
			text = "the body is not valid JSON" // the decoder's message quotes the body
		}
		p.Errors = append(p.Errors, apitypes.Issue{Field: d.Location, Text: d.Location + ": " + text})
	}
	return p, nil
}

// answer turns the error of a route into what the caller sees. What nobody expected is logged and not told. A mutating
// call that failed leaves its trace in the audit log; one that worked was audited in its own transaction.
func (s *server) answer(ctx context.Context, name string, perm permission, err error) error {
	if err == nil {
		return nil
	}
	told := s.asProblem(ctx, name, err)
	if perm != permRead && perm != permPublic {
		who := actorOf(ctx)
		s.audit(ctx, AuditEntry{Who: who.name(), What: name, Object: who.path, Outcome: "failed", Detail: "from " + who.remote + ": " + told.Error()})
	}
	return told
}

func (s *server) asProblem(ctx context.Context, name string, err error) error {
	switch {
	case errors.As(err, new(*apitypes.Problem)):
		return err // it may carry headers
	case errors.Is(err, context.DeadlineExceeded):
		return problem(http.StatusServiceUnavailable, apitypes.CodeTimeout, "the answer took too long", "try again")
	case errors.Is(err, context.Canceled):
		return problem(http.StatusServiceUnavailable, apitypes.CodeUnavailable, "the request was cancelled", "")
	}
	if p := domainProblem(err); p != nil {
		return p
	}
	s.deps.Log.ErrorContext(ctx, "API request failed", "route", name, "error", err)
	return internalProblem()
}

// domainProblem translates what the registry tells apart; nil for everything else. Its texts are made for operators.
func domainProblem(err error) *apitypes.Problem {
	for _, row := range []struct {
		status int
		code   string
		errs   []error
	}{
		{http.StatusNotFound, apitypes.CodeNotFound, []error{registry.ErrNodeUnknown, registry.ErrWorkloadUnknown, registry.ErrNotPlaced, registry.ErrPolicyUnknown}},
		{http.StatusConflict, apitypes.CodeConflict, []error{registry.ErrNodeRevoked, registry.ErrNameTaken, registry.ErrPoolExhausted}},
		{http.StatusPreconditionFailed, apitypes.CodePrecondition, []error{registry.ErrPolicyConflict}},
		{http.StatusUnprocessableEntity, apitypes.CodeInvalid, []error{registry.ErrTokenRequest, registry.ErrPolicyTooLarge, compile.ErrCompile, policydoc.ErrDocument}},
		{http.StatusServiceUnavailable, apitypes.CodeUnavailable, []error{store.ErrClosed}},
	} {
		for _, known := range row.errs {
			if errors.Is(err, known) {
				return problem(row.status, row.code, err.Error(), "")
			}
		}
	}
	return nil
}
