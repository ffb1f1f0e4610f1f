package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/signet-overlay/signet/agent/localapi"
)

// TestStatusNamesWhatIsNotServed once, with an agent that warns of it and with one that does not.
func TestStatusNamesWhatIsNotServed(t *testing.T) {
	const part = "metrics: not built yet; nothing listens at 127.0.0.1:7491"
	for _, warnings := range [][]string{{"loopback is not guarded"}, {"loopback is not guarded", part}} {
		var out bytes.Buffer
		statusTable(&out, localapi.Status{Warnings: warnings, Details: localapi.Details{NotServed: []string{part}}})
		if got := out.String(); strings.Count(got, part) != 1 || !strings.Contains(got, "not served:") || !strings.Contains(got, "loopback") {
			t.Errorf("status with warnings %q:\n%s", warnings, got)
		}
	}
}
