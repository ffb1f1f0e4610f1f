package apitypes

import "fmt"

// Codes of problems. They are stable: scripts match on them, never on the text.
const (
	CodeUnauthorized    = "unauthorized"           // no token, or none that counts; which of these is not said
	CodeForbidden       = "forbidden"              // the token's role lacks the permission
	CodeForeignOrigin   = "foreign_origin"         // a browser sent it from another site, or under another host name
	CodeNotFound        = "not_found"              // no such route or object
	CodeMethod          = "method_not_allowed"     // the route exists with other methods
	CodeInvalid         = "invalid_request"        // the request cannot be read or breaks the schema
	CodeMediaType       = "unsupported_media_type" // the body is of a type, or encoded in a way, that is not read
	CodeTooLarge        = "body_too_large"         // over MaxBody
	CodeTimeout         = "timeout"                // the request took too long to arrive or to answer
	CodePrecondition    = "precondition_failed"    // If-Match names another policy revision than the one in force
	CodeConflict        = "conflict"               // the object's state forbids it
	CodePolicyInvalid   = "policy_invalid"         // the document has errors
	CodePolicyTests     = "policy_tests_failed"    // a test of the document fails
	CodeNotBuilt        = "not_built"              // the route is in the contract and not built yet
	CodeUnavailable     = "unavailable"            // the coordinator cannot answer now
	CodeTooManyRequests = "too_many_requests"      // over a limit; try again later
	CodeInternal        = "internal"               // a fault of the coordinator; its log has the rest
)

// MaxBody bounds the body of every request, in bytes.
const MaxBody = 4 << 20

// ProblemType is the media type of a Problem (RFC 9457).
const ProblemType = "application/problem+json"

// Problem is a refusal as RFC 9457 has it, with a stable code, a hint for the operator and, for documents, places.
type Problem struct {
	Type   string  `json:"type,omitempty" doc:"about:blank: the code says what it is"`
	Title  string  `json:"title" doc:"The text of the HTTP status"`
	Status int     `json:"status" doc:"The HTTP status"`
	Code   string  `json:"code" doc:"What happened, in a form that does not change"`
	Detail string  `json:"detail,omitempty" doc:"What happened, for people"`
	Hint   string  `json:"hint,omitempty" doc:"What can be done about it"`
	Errors []Issue `json:"errors,omitempty" doc:"The single faults of a document or request"`
}

// Error is the detail with the hint.
func (p *Problem) Error() string {
	text := p.Detail
	if text == "" {
		text = p.Title
	}
	if p.Hint != "" {
		return fmt.Sprintf("%s (%s)", text, p.Hint)
	}
	return text
}

// GetStatus is the HTTP status.
func (p *Problem) GetStatus() int { return p.Status }

// ContentType is the media type of problems, whatever was negotiated.
func (p *Problem) ContentType(string) string { return ProblemType }

// Issue is one fault of a document or request. Text is the whole line for people; the other fields are for editors.
type Issue struct {
	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"`
	Column int    `json:"column,omitempty"`
	Field  string `json:"field,omitempty" doc:"The place in the request, where the fault is not in a document"`
	Text   string `json:"text"`
}
