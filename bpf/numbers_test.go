package bpf

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// enums reads the numbered names of the enums in a header.
func enums(t *testing.T, file string) map[string]int {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for _, m := range regexp.MustCompile(`(?m)^\s*(?:#define )?([A-Z][A-Z0-9_]+)(?: =|\s)\s*\(?(\d+U?(?: << \d+)?)\b`).FindAllStringSubmatch(string(b), -1) {
		base, shift, _ := strings.Cut(m[2], " << ")
		n, err := strconv.Atoi(strings.TrimSuffix(base, "U"))
		if err != nil {
			t.Fatal(err)
		}
		by := 0
		if shift != "" {
			if by, err = strconv.Atoi(shift); err != nil {
				t.Fatal(err)
			}
		}
		out[m[1]] = n << by
	}
	return out
}

// TestNumbers compares the numbers of the C enums with those of the vocabulary in Go, both ways.
func TestNumbers(t *testing.T) {
	c := enums(t, "lib/reasons.h")
	for _, header := range []string{"lib/maps.h", "lib/ct.h", "lib/events.h"} {
		for name, n := range enums(t, header) {
			c[name] = n
		}
	}
	want := map[string]int{
		"VERDICT_DENY": int(flow.Deny), "VERDICT_ALLOW": int(flow.Allow), "VERDICT_AUDIT": int(flow.Audit), "VERDICT_IGNORE": int(flow.Ignore),
		"HOOK_CONNECT": int(policy.HookConnect), "HOOK_BIND": int(policy.HookBind),
		"HOOK_EGRESS_SOCKET": int(policy.HookEgressSocket), "HOOK_INGRESS_SOCKET": int(policy.HookIngressSocket),
		"HOOK_EGRESS_DEVICE": int(policy.HookEgressDevice), "HOOK_INGRESS_DEVICE": int(policy.HookIngressDevice),
		"HOOK_GUARD": int(policy.HookGuard), "HOOK_LOOPBACK": int(policy.HookLoopback),
		"HOOK_FROM_WORKLOAD": int(policy.HookFromWorkload), "HOOK_TO_WORKLOAD": int(policy.HookToWorkload), "DEVICE_WORKLOAD": int(policy.DeviceWorkload),
		"DEVICE_TUNNEL": int(policy.DeviceTunnel), "DEVICE_LOOPBACK": int(policy.DeviceLoopback), "DEVICE_OTHER": int(policy.DeviceOther),
		"LEASE_DENY_ALL": int(policy.LeaseDenyAll), "LEASE_DENY_NEW": int(policy.LeaseDenyNew),
		"DIR_EGRESS": int(policy.Egress), "DIR_INGRESS": int(policy.Ingress),
		"ADDR_LOCAL": AddrLocal, "ADDR_REVOKED": AddrRevoked, "OWN_V4": OwnV4, "OWN_V6": OwnV6,
		"OWN_CONFINED": OwnConfined, "OWN_OVERLAY_ONLY": OwnOverlayOnly,
		"RULESET_RANGES": RulesetRanges, "SLOT_LENIENT": SlotLenient, "RANGE_FIXED": RangeFixed,
		"CT_STEP": ConnStep, "CT_SWAPPED": ConnSwapped, "CT_LOCAL0": ConnLocal0, "CT_LOCAL1": ConnLocal1, "CT_PEER0": ConnPeer0,
		"CT_PEER1": ConnPeer1, "CT_TOLD": ConnTold, "CT_AUDITED": ConnAudited,
		"EVENT_START": EventStart, "EVENT_END": EventEnd, "EVENT_DENY": EventDeny, "EVENT_AUDIT": EventAudit,
		"COUNTER_REASONS": CounterReasons, "COUNTER_HOOKS": CounterHooks,
	}
	for _, r := range flow.Reasons() {
		want["REASON_"+r.Name] = int(r.Code)
	}
	for name, n := range want {
		if got, ok := c[name]; !ok || got != n {
			t.Errorf("%s is %d in C (there: %v), want %d", name, got, ok, n)
		}
	}
	for name := range c {
		for _, prefix := range []string{"VERDICT_", "HOOK_", "DEVICE_", "LEASE_", "DIR_", "REASON_", "ADDR_", "OWN_", "EVENT_"} {
			if _, ok := want[name]; !ok && strings.HasPrefix(name, prefix) {
				t.Errorf("%s is known in C only", name)
			}
		}
	}
	if c["COUNTER_REASONS"] < len(flow.Reasons()) || c["COUNTER_HOOKS"] <= int(policy.HookToWorkload) {
		t.Error("the counters have no room for every reason and hook")
	}
}
