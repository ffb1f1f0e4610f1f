package apitypes

import "time"

// File is one source of a policy document. A document of several files is read as one.
type File struct {
	Name string `json:"name" maxLength:"255"`
	Data string `json:"data"`
}

// PolicyRequest carries a whole document.
type PolicyRequest struct {
	Files []File `json:"files" maxItems:"1000"`
}

// Policy is a document as it was applied.
type Policy struct {
	Revision uint64 `json:"revision" doc:"0 when none was applied"`
	Files    []File `json:"files"`
}

// PolicyApplied answers a commit.
type PolicyApplied struct {
	Revision uint64   `json:"revision"`
	Warnings []string `json:"warnings"`
	Tests    int      `json:"tests" doc:"How many tests of the document passed"`
}

// PolicyCheck is what is right and wrong with a document.
type PolicyCheck struct {
	OK       bool         `json:"ok" doc:"The document has no errors and its tests pass"`
	Errors   []Issue      `json:"errors"`
	Warnings []string     `json:"warnings"`
	Tests    []TestResult `json:"tests"`
}

// TestResult is one test of a document.
type TestResult struct {
	OK     bool   `json:"ok"`
	From   string `json:"from"`
	To     string `json:"to"`
	Port   string `json:"port"`
	Expect string `json:"expect"`
	Got    string `json:"got"`
	Code   string `json:"code" doc:"Reason code of the verdict"`
	Rule   string `json:"rule,omitempty"`
	At     string `json:"at" doc:"file:line:column"`
	Text   string `json:"text" doc:"All of it in one line"`
	Remedy string `json:"remedy,omitempty" doc:"Of a failing test"`
}

// Revision is one entry of the policy's history.
type Revision struct {
	Revision uint64    `json:"revision"`
	Time     time.Time `json:"time"`
	By       string    `json:"by"`
	Note     string    `json:"note,omitempty"`
	Current  bool      `json:"current"`
}

// RevisionList is one page of the history, newest first.
type RevisionList struct {
	Revisions  []Revision `json:"revisions"`
	NextCursor string     `json:"next_cursor,omitempty"`
}

// RollbackRequest names the revision whose document comes into force again; 0 is the one before the current.
type RollbackRequest struct {
	Revision uint64 `json:"revision,omitempty"`
}

// Rollout lists each host with the policy revision that it has applied, and when.
type Rollout struct {
	Revision uint64        `json:"revision"`
	Hosts    []RolloutHost `json:"hosts"`
	// Waiting counts the connected hosts that do not have the revision yet.
	Waiting int `json:"waiting"`
}

// RolloutHost is one line of a Rollout.
type RolloutHost struct {
	Node      string    `json:"node"`
	Connected bool      `json:"connected"`
	Revision  uint64    `json:"revision" doc:"The newest revision that the host has applied"`
	Applied   time.Time `json:"applied,omitzero"`
	Done      bool      `json:"done" doc:"It has applied this revision or a later one"`
	Error     string    `json:"error,omitempty" doc:"Why the host could not apply what it has"`
}

// AuditRecord is one line of the audit log.
type AuditRecord struct {
	Seq     uint64    `json:"seq"`
	Time    time.Time `json:"time"`
	Who     string    `json:"who" doc:"The id of an API token, a node, or the coordinator itself"`
	What    string    `json:"what"`
	Object  string    `json:"object"`
	Outcome string    `json:"outcome"`
	Detail  string    `json:"detail,omitempty"`
	Hash    string    `json:"hash,omitempty" doc:"Of this record and the one before it"`
}

// AuditList is one page of the log, oldest first.
type AuditList struct {
	Records    []AuditRecord `json:"records"`
	NextCursor string        `json:"next_cursor,omitempty"`
}

// AuditVerification says whether the hash chain holds.
type AuditVerification struct {
	OK      bool   `json:"ok"`
	Records uint64 `json:"records"`
	Head    string `json:"head,omitempty" doc:"Hash of the newest record; keep it elsewhere to notice a cut end"`
	Problem string `json:"problem,omitempty"`
}
