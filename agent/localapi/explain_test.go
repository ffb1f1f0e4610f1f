package localapi

import (
	"context"
	"testing"

	"github.com/signet-overlay/signet/internal/flow"
)

// TestExplain: the question reaches the agent, and its answer the caller; so does a refusal.
func TestExplain(t *testing.T) {
	agent := &fakeAgent{}
	c := serve(t, agent)
	x, err := c.Explain(context.Background(), ExplainRequest{From: "app/a", To: "app/b", Port: "tcp/1"})
	if err != nil {
		t.Fatal(err)
	}
	if x.Code != flow.NoRule || x.Service != "tcp/1" || x.Observed != "app/a to app/b" {
		t.Errorf("got %+v", x)
	}
	agent.err = &Error{Code: CodeNotFound, Message: "neither is here"}
	if _, err := c.Explain(context.Background(), ExplainRequest{}); codeOf(err) != CodeNotFound {
		t.Errorf("got %v", err)
	}
}
