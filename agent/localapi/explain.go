package localapi

import (
	"context"
	"net/http"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/identity"
)

// ExplainRequest asks whether one workload may open a flow to another (POST /v1/explain). One of them is on this host.
type ExplainRequest struct {
	From string `json:"from"` // zone/name or a SPIFFE ID
	To   string `json:"to"`
	Port string `json:"port"` // one port of one protocol, such as tcp/5432; or icmp
}

// Explanation is the answer: what the judge of this host would do with such a flow, found without sending one.
type Explanation struct {
	Verdict        flow.Verdict `json:"verdict"` // allow, deny, or audit: it passes, on record
	Code           flow.Reason  `json:"code"`
	Stage          string       `json:"stage"` // the step that decided: identity, placement, egress or ingress
	Rule           string       `json:"rule"`  // that decided, or ""
	PolicyRevision uint64       `json:"policy_revision"`
	From           ExplainedEnd `json:"from"`
	To             ExplainedEnd `json:"to"`
	Service        string       `json:"service"`
	Observed       string       `json:"observed"`
	Expected       string       `json:"expected"`
	Nearest        []Near       `json:"nearest"` // rules that almost decided, as far as this host knows them
	Remedy         string       `json:"remedy"`
	Warnings       []string     `json:"warnings,omitempty"`
	// Hooks are the programs that were asked, in the order in which a packet meets them.
	Hooks []ExplainedHook `json:"hooks"`
	// Tracked tells that such a flow is open already.
	Tracked bool `json:"tracked"`
}

// ExplainedEnd is one end of the flow in question.
type ExplainedEnd struct {
	ID     identity.ID     `json:"id"`
	Number identity.Number `json:"number"` // 0 where this host does not know the workload
	Node   string          `json:"node"`
}

// Near is a rule that almost decided.
type Near struct {
	Rule   string `json:"rule"`
	Action string `json:"action"`
	At     string `json:"at"` // position in the document, which hosts do not know: ""
	Fails  string `json:"fails"`
}

// ExplainedHook is what one program says.
type ExplainedHook struct {
	Hook    string       `json:"hook"`
	Verdict flow.Verdict `json:"verdict"`
	Code    flow.Reason  `json:"code"`
	Rule    string       `json:"rule,omitempty"`
}

// Explain asks whether a flow would pass, and why (not).
func (c *Client) Explain(ctx context.Context, r ExplainRequest) (Explanation, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	return call[Explanation](ctx, c, http.MethodPost, "/v1/explain", r)
}

func (h *handler) explain(r *http.Request) (any, error) {
	var req ExplainRequest
	if err := decode(r.Body, &req); err != nil {
		return nil, err
	}
	return h.reader.Explain(req)
}
