package enforce

import (
	"testing"
	"time"

	"github.com/cilium/ebpf/ringbuf"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
	"github.com/signet-overlay/signet/internal/policy/policytest"
)

// step is how exactly the kernel keeps idle times.
const step = 2 << bpf.ConnStep

// story drives the twin through time with the packets of one conversation.
type story struct {
	t      *testing.T
	k      *twin
	client policy.Packet
	server policy.Packet
	now    time.Time
}

// newStory takes the first packet of a case, out of a socket, and its answer, out of the tunnel.
func newStory(t *testing.T, k *twin, name string) *story {
	t.Helper()
	for _, c := range policytest.Cases() {
		if c.Name != name {
			continue
		}
		c.View.Lease.Ends = c.Now.Add(100 * time.Hour)
		k.load(t, c.View, c.Table(), c.Now)
		s := &story{t: t, k: k, client: c.Packet, server: c.Packet, now: c.Now}
		s.server.Hook, s.server.Tuple = policy.HookIngressDevice, c.Packet.Tuple.Reverse()
		s.server.EchoReq = false
		s.client.Hook = policy.HookEgressDevice
		return s
	}
	t.Fatalf("there is no case %q", name)
	return nil
}

func (s *story) after(d time.Duration) { s.now = s.now.Add(d) }

// says lets one end send, and compares the verdict's reason.
func (s *story) says(p policy.Packet, flags uint8, want flow.Reason) {
	s.t.Helper()
	p.TCPFlags = flags
	if got := s.k.judge(s.t, p, s.now).Reason; got != want {
		s.t.Errorf("at %v, flags %#x: got %v, want %v", s.now.Format(time.TimeOnly), flags, got, want)
	}
}

// TestIdle: a connection is forgotten when nothing passes for long enough, agent or not, and not a moment earlier.
// Longer than a function should be, because it is a table of stories.
//
//house:allow-long one table of idle times
func TestIdle(t *testing.T) {
	needRoot(t)
	c := policytest.Cases()[0]
	k := newTwin(t, c.View.Overlay4, c.View.Overlay6)
	const ack, syn, fin, rst = policy.FlagACK, policy.FlagSYN, policy.FlagFIN | policy.FlagACK, policy.FlagRST
	for _, step := range []struct {
		name, from string
		run        func(*story)
	}{
		{"unanswered", "rules: TCP", func(s *story) {
			s.says(s.client, syn, flow.PolicyAllow)
			s.after(time.Minute - step)
			s.says(s.client, ack, flow.PolicyAllow)
			s.after(time.Minute + step)
			s.says(s.client, ack, flow.CTInvalid)
			s.says(s.server, syn|ack, flow.CTInvalid)
		}},
		{"established", "rules: TCP", func(s *story) {
			s.says(s.client, syn, flow.PolicyAllow)
			s.says(s.server, syn|ack, flow.PolicyAllow)
			s.after(24*time.Hour - step)
			s.says(s.server, ack, flow.PolicyAllow)
			s.after(24*time.Hour + step)
			s.says(s.server, ack, flow.CTInvalid)
		}},
		{"closed by both", "rules: TCP", func(s *story) {
			s.says(s.client, syn, flow.PolicyAllow)
			s.says(s.server, syn|ack, flow.PolicyAllow)
			s.says(s.client, fin, flow.PolicyAllow)
			s.after(time.Minute + step)
			s.says(s.server, fin, flow.PolicyAllow)
			s.after(10*time.Second - step)
			s.says(s.client, ack, flow.PolicyAllow)
			s.after(10*time.Second + step)
			s.says(s.client, ack, flow.CTInvalid)
		}},
		{"reset, and opened again at once", "rules: TCP", func(s *story) {
			s.says(s.client, syn, flow.PolicyAllow)
			s.says(s.server, rst, flow.PolicyAllow)
			s.says(s.client, syn, flow.PolicyAllow)
			s.says(s.server, syn|ack, flow.PolicyAllow)
			s.after(time.Minute + step)
			s.says(s.client, ack, flow.PolicyAllow)
		}},
		{"opened backwards after a reset: judged as what it is", "rules: TCP", func(s *story) {
			s.says(s.client, syn, flow.PolicyAllow)
			s.says(s.server, rst, flow.PolicyAllow)
			s.says(s.server, syn, flow.NoRule)
		}},
		{"datagram unanswered", "rules: UDP", func(s *story) {
			s.says(s.client, 0, flow.PolicyAllow)
			s.after(time.Minute + step)
			s.says(s.server, 0, flow.NoRule)
		}},
		{"datagram answered", "rules: UDP", func(s *story) {
			s.says(s.client, 0, flow.PolicyAllow)
			s.says(s.server, 0, flow.PolicyAllow)
			s.after(3*time.Minute - step)
			s.says(s.server, 0, flow.PolicyAllow)
			s.after(3*time.Minute + step)
			s.says(s.server, 0, flow.NoRule)
		}},
		{"ping", "rules: ping", func(s *story) {
			s.says(s.client, 0, flow.PolicyAllow)
			s.after(30*time.Second - step)
			s.says(s.server, 0, flow.PolicyAllow)
			s.after(30*time.Second + step)
			s.says(s.server, 0, flow.CTInvalid)
		}},
	} {
		t.Run(step.name, func(t *testing.T) { step.run(newStory(t, k, step.from)) })
	}
}

// TestSweep: idle connections are taken away in the kernel, their ends are told with their counters, and live ones stay.
func TestSweep(t *testing.T) {
	needRoot(t)
	c := policytest.Cases()[0]
	k := newTwin(t, c.View.Overlay4, c.View.Overlay6)
	s := newStory(t, k, "rules: UDP")
	r, err := ringbuf.NewReader(k.coll.Maps[mapEvents])
	must(t, err, "ring")
	defer r.Close()
	event := func() Event {
		t.Helper()
		r.SetDeadline(time.Now())
		rec, err := r.Read()
		must(t, err, "read event")
		ev, ok := decodeEvent(rec.RawSample, k.now)
		if !ok {
			t.Fatal("event is too short")
		}
		return ev
	}
	s.says(s.client, 0, flow.PolicyAllow)
	start := event()
	s.says(s.client, 0, flow.PolicyAllow)
	s.says(s.server, 0, flow.PolicyAllow)
	s.after(2*time.Minute + step)
	s.says(s.client, 0, flow.PolicyAllow)
	n, err := sweep(k.coll.Programs[progSweep])
	must(t, err, "sweep")
	if n != 0 {
		t.Errorf("%d live connections were swept", n)
	}
	s.after(3*time.Minute + step)
	// The time reaches the programs with a packet; this one opens nothing.
	s.says(policy.Packet{Hook: policy.HookGuard, Tuple: s.client.Tuple, Device: policy.DeviceOther}, 0, flow.NotTunnel)
	if ev := event(); ev.Kind != EventDeny {
		t.Errorf("denial: %+v", ev)
	}
	n, err = sweep(k.coll.Programs[progSweep])
	must(t, err, "sweep")
	if n != 1 {
		t.Errorf("%d connections were swept, want 1", n)
	}
	end := event()
	if start.Kind != EventStart || end.Kind != EventEnd || start.Flow != end.Flow || end.Sent.Packets != 3 || end.Received.Packets != 1 ||
		end.Tuple != s.client.Tuple || !end.Began.Equal(start.Time) {
		t.Errorf("from %+v to %+v", start, end)
	}
	if k.sameTable(t, c.View, &policy.Table{}); t.Failed() {
		t.FailNow()
	}
}
