package flowlog

import (
	"bufio"
	"context"
	"encoding/json"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-overlay/signet/agent/session/sessiontest"
	"github.com/signet-overlay/signet/internal/flow"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func observation() flow.Observation {
	return flow.Observation{Event: flow.EventStart, At: time.Unix(1_800_000_000, 5).UTC(), FlowID: 0xabc, Verdict: flow.Allow, Reason: flow.PolicyAllow,
		Rule: sessiontest.RuleNumber, Src: sessiontest.APINumber, Dst: sessiontest.PGNumber, Local: "src", Cgroup: 9, Lost: 3,
		Tuple: flow.Tuple{Proto: flow.TCP, Src: netip.AddrPortFrom(sessiontest.Addrs(5)[0], 40312), Dst: netip.AddrPortFrom(sessiontest.Addrs(9)[0], 5432)}}
}

func newLog(t testing.TB) *Log {
	t.Helper()
	l := New("api-1", func(cgroup uint64) string {
		if cgroup == 9 {
			return "api-server.service"
		}
		return ""
	})
	s := sessiontest.Sample(t, 1, time.Now())
	l.SetNames(NamesOf(&s))
	return l
}

func TestDecorate(t *testing.T) {
	l := newLog(t)
	l.Observe(observation())
	r := l.Recent()[0]
	if r.Seq != 1 || r.Schema != flow.Schema || r.FlowID != "0000000000000abc" || r.Rule != "api-to-postgres" || r.PolicyRevision != 101 || r.LostBefore != 3 || r.CommunityID == "" {
		t.Errorf("record: %+v", r)
	}
	if r.Src.ID.Short() != "app/api-server" || r.Src.Zone != "app" || r.Src.Node != "api-1" || r.Src.Unit != "api-server.service" || r.Src.Port != 40312 {
		t.Errorf("src: %+v", r.Src)
	}
	if r.Dst.ID.Short() != "data/postgres" || r.Dst.Zone != "data" || r.Dst.Node != "db-1" || r.Dst.Unit != "" {
		t.Errorf("dst: %+v", r.Dst)
	}
	unknown := observation()
	unknown.Src, unknown.Rule, unknown.Reason, unknown.Verdict = 4242, 99, flow.UnknownPeer, flow.Deny
	unknown.Tuple.Src, unknown.Local = netip.MustParseAddrPort("198.18.9.9:1"), "dst" // somebody elsewhere
	l.Observe(unknown)
	if r := l.Recent()[1]; !r.Src.ID.IsZero() || r.Src.Zone != "" || r.Src.Node != "" || r.Rule != "rule-99" || r.Seq != 2 {
		t.Errorf("unknown: %+v", r)
	}
	if _, err := json.Marshal(r); err != nil {
		t.Error(err)
	}
}

// TestDeniedConnectHasNoSource: the kernel refuses a connect before it has chosen a source.
func TestDeniedConnectHasNoSource(t *testing.T) {
	for _, any := range []string{"0.0.0.0:0", "[::]:4000"} {
		l, o := newLog(t), observation()
		o.Event, o.Verdict, o.Reason, o.PID, o.Tuple.Src = flow.EventDeny, flow.Deny, flow.UnknownPeer, 4711, netip.MustParseAddrPort(any)
		l.Observe(o)
		r := l.Recent()[0]
		if r.Src.IP.IsValid() || r.Src.Port != 0 || r.CommunityID != "" || r.Src.Node != "api-1" || r.Src.PID != 4711 || r.Dst.PID != 0 || r.Dst.Node != "db-1" {
			t.Errorf("%s: %+v, Community ID %q", any, r, r.CommunityID)
		}
		text, err := json.Marshal(r.Src)
		if err != nil || strings.Contains(string(text), `"ip"`) || strings.Contains(string(text), `"port"`) {
			t.Errorf("%s, %v", text, err)
		}
	}
}

// TestOwnEndsHaveTheirNode although no snapshot names their addresses.
func TestOwnEndsHaveTheirNode(t *testing.T) {
	for local, want := range map[string][2]string{"src": {"api-1", ""}, "dst": {"", "api-1"}, "local": {"api-1", "api-1"}, "": {"", ""}} {
		l, o := New("api-1", func(uint64) string { return "" }), observation()
		o.Local = local
		l.Observe(o)
		if r := l.Recent()[0]; r.Src.Node != want[0] || r.Dst.Node != want[1] || r.CommunityID == "" {
			t.Errorf("%q: from %q to %q", local, r.Src.Node, r.Dst.Node)
		}
	}
}

// TestCommunityID has the values of the specification's own test vectors.
func TestCommunityID(t *testing.T) {
	ends := func(proto flow.Proto, a, b string) flow.Tuple {
		return flow.Tuple{Proto: proto, Src: netip.MustParseAddrPort(a), Dst: netip.MustParseAddrPort(b)}
	}
	for _, c := range []struct {
		t    flow.Tuple
		want string
	}{
		{ends(flow.TCP, "128.232.110.120:34855", "66.35.250.204:80"), "1:LQU9qZlK+B5F3KDmev6m5PMibrg="},
		{ends(flow.UDP, "192.168.1.52:54585", "8.8.8.8:53"), "1:d/FP5EW3wiY1vCndhwleRRKHowQ="},
		{ends(flow.ICMP, "192.168.0.89:77", "192.168.0.1:77"), "1:X0snYXpgwiv9TZtqg64sgzUn6Dk="},
	} {
		if got := communityID(c.t); got != c.want {
			t.Errorf("%v gives %s, expected %s", c.t, got, c.want)
		}
		if back := communityID(c.t.Reverse()); c.t.Proto != flow.ICMP && back != c.want {
			t.Errorf("the replies of %v give %s", c.t, back)
		}
	}
	if got := communityID(flow.Tuple{}); got != "" {
		t.Errorf("no tuple gives %s", got)
	}
}

func TestRingKeepsTheLast(t *testing.T) {
	l := newLog(t)
	for range recent + 10 {
		l.Observe(observation())
	}
	got := l.Recent()
	if len(got) != recent || got[0].Seq != 11 || got[recent-1].Seq != recent+10 {
		t.Errorf("%d records from %d to %d", len(got), got[0].Seq, got[len(got)-1].Seq)
	}
}

func TestSlowReaderLosesWithAnExactCount(t *testing.T) {
	l := newLog(t)
	_, s := l.Subscribe()
	defer s.Close()
	const lost = 500
	for range queueLength + lost {
		l.Observe(observation())
	}
	for i := range queueLength {
		if r, err := s.Next(t.Context()); err != nil || r.Seq != uint64(i+1) {
			t.Fatalf("record %d: %d, %v", i, r.Seq, err)
		}
	}
	l.Observe(observation())
	if r, _ := s.Next(t.Context()); r.Event != flow.EventLoss || r.Count != lost {
		t.Errorf("loss record: %+v", r)
	}
	if r, _ := s.Next(t.Context()); r.Seq != queueLength+lost+1 {
		t.Errorf("next record: %d", r.Seq)
	}
}

func TestSubscribersAreBounded(t *testing.T) {
	l := newLog(t)
	var subs []*Subscription
	for range MaxSubscribers {
		_, s := l.Subscribe()
		subs = append(subs, s)
	}
	if _, s := l.Subscribe(); s != nil {
		t.Error("one too many")
	}
	subs[0].Close()
	if _, s := l.Subscribe(); s == nil {
		t.Error("a closed one still counts")
	}
}

func TestFile(t *testing.T) {
	l := newLog(t)
	path := filepath.Join(t.TempDir(), "flows.jsonl")
	f := NewFile(path, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = f.Run(ctx, l) }()
	defer func() { cancel(); <-done }()
	waitFor(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.subs) == 1 })
	l.Observe(observation())
	waitFor(t, func() bool { return lines(path) == 1 })
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	f.Reopen()
	waitFor(t, func() bool { return len(f.reopen) == 0 })
	l.Observe(observation())
	waitFor(t, func() bool { return lines(path) == 1 && lines(path+".1") == 1 })
}

// lines counts whole records.
func lines(path string) (n int) {
	file, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer file.Close()
	for sc := bufio.NewScanner(file); sc.Scan(); {
		var r flow.Record
		if json.Unmarshal(sc.Bytes(), &r) == nil && r.Schema == flow.Schema {
			n++
		}
	}
	return n
}

func waitFor(t *testing.T, what func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(5 * time.Second); !what(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen within 5 s")
		}
	}
}
