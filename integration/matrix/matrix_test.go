package matrix

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/probe/attack"
	"github.com/signet-overlay/signet/integration/scenario"
)

var update = flag.Bool("update", false, "write docs/spoofing.md anew")

// page is where the outcome is kept.
const page = "../../docs/spoofing.md"

// row is one attack: what is tried, by whom, and what must happen.
type row struct {
	attack, variant, family, path string

	at      *scenario.Agent // where the attacker is
	as      netlab.Opts     // who it is
	make    func(token string) attack.Spec
	do      func(t *testing.T, r *row) string // instead of make, for what takes more than one process
	control func(token string) attack.Spec    // what the rightful owner does; nil without one
	owner   string                            // cgroup of the control
	victim  string                            // cgroup of the witness that sees the control

	judge    *scenario.Agent                                  // whose judge refuses
	hook     string                                           // that refuses; one without a counter is named all the same
	reasons  []string                                         // any of which is right; none for hooks that record nothing
	packets  uint64                                           // that must be refused, where it is more than one
	step     string                                           // of the attacker's output
	target   netip.AddrPort                                   // that the attacker wants to reach
	src, dst netip.AddrPort                                   // of the record; what is zero may be anything
	differs  string                                           // how the outcome differs from what the design promises, where it does
	refusal  func(t *testing.T, r *row) (hook, reason string) // instead of counters and records
	// legitimate: the packets are the rightful owner's, and the attacker, who listens, must not get them.
	legitimate bool

	outcome
}

// outcome is what a row's run found.
type outcome struct {
	token          string
	before         map[cell]uint64
	started, ended time.Time
	output         string
	cells          map[cell]uint64
	verdict        cell // for the table
}

// name of the row, for people.
func (r *row) name() string {
	return strings.Join([]string{r.attack, r.variant, r.family, r.path}, " | ")
}

// rank puts families into the order of the table.
func rank(family string) int { return slices.Index([]string{"v4", "v6", "mapped"}, family) }

// refusal is how long one may take: nearly all are over before the attacker's call returns, the others cross the tunnel.
const refusal = 1500 * time.Millisecond

// slop is how far the clock of a record may be from that of the attacker.
const slop = 10 * time.Millisecond

// TestSpoofingMatrix tries everything. The controls come first; then, while nothing else is sent, the attacks.
func TestSpoofingMatrix(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	l := startLab(ctx, t)
	var rows []*row
	for _, more := range [][]*row{l.bindRows(), l.datagramRows(), l.callRows(), l.rawRows(), l.packetRows(), l.frameRows(), l.kernelRows(), l.fragmentRows(),
		l.routeRows(), l.sharedRows(), l.mixedRows(), l.leakRows(), l.bypassRows(), l.listenerRows(), l.underlayRows(), l.cageRows(), l.rogueRows()} {
		slices.SortStableFunc(more, func(a, b *row) int {
			return cmp.Or(cmp.Compare(a.attack, b.attack), -cmp.Compare(a.path, b.path), cmp.Compare(rank(a.family), rank(b.family)), cmp.Compare(a.variant, b.variant))
		})
		rows = append(rows, more...)
	}
	for i, r := range rows {
		r.token = fmt.Sprintf("%sa%d-", attack.Token, i)
	}
	l.warm(t)
	t.Run("control", func(t *testing.T) { l.controls(t, rows) })
	t.Run("positive", l.positives)
	known := l.seen()
	begin := time.Now()
	for _, r := range rows {
		l.try(t, r)
	}
	t.Logf("%d attacks in %v", len(rows), time.Since(begin))
	l.barrier(t)
	l.judgeRows(t, rows, known)
	l.nothingInClear(t)
	t.Run("table", func(t *testing.T) { checkPage(t, rows) })
}

// warm makes the first packets of each lane, which may wait for handshakes.
func (l *lab) warm(t *testing.T) {
	t.Helper()
	for _, ln := range l.lanes("v4", "v6") {
		s := attack.Spec{Kind: attack.Socket, Proto: "tcp", V6: ln.six, Tricks: []string{attack.Connect}, Dst: ln.dst, Payload: "x", Wait: 3000}
		out := ""
		if !until(3*patient, func() bool {
			out = l.attack(t, ln.at, netlab.Opts{Cgroup: ln.owner}, s)
			return strings.Contains(out, "step send ok")
		}) {
			t.Fatalf("%v is not usable: %s", ln, out)
		}
	}
	if !l.script.reaches(t) {
		t.Fatalf("the rogue is not heard: %s", l.script.cmd.Text())
	}
}

// controls runs each distinct control once.
func (l *lab) controls(t *testing.T, rows []*row) {
	done := map[string]bool{}
	for i, r := range rows {
		key := r.attack + r.family + r.path
		if r.control == nil || done[key] {
			continue
		}
		done[key] = true
		token := fmt.Sprintf("%sc%d-", attack.Token, i)
		out := l.attack(t, r.at, netlab.Opts{Cgroup: r.owner}, r.control(token))
		if !until(patient, func() bool { return strings.Contains(l.sees[r.victim].Text(), token) }) {
			t.Errorf("%s: the rightful owner's did not arrive either, so the row proves nothing: %s", r.name(), out)
		}
	}
}

// try runs one attack and notes what the judge's counters say.
func (l *lab) try(t *testing.T, r *row) {
	t.Helper()
	count := l.tallies[r.judge.Host.Name()]
	r.before = count.denied(t)
	r.started = time.Now()
	if r.do != nil {
		r.output = r.do(t, r)
	} else {
		r.output = l.attack(t, r.at, r.as, r.make(r.token))
	}
	if slices.Contains(hookNames, r.hook) {
		until(refusal, func() bool {
			r.cells = count.since(t, r.before)
			return r.counted()
		})
	}
	r.ended = time.Now()
}

// counted: each packet of the attack was refused where and for what it had to be.
func (r *row) counted() bool {
	var sum uint64
	for _, reason := range r.reasons {
		sum += r.cells[cell{r.hook, reason}]
	}
	return sum >= max(1, r.packets)
}

// matches reports whether a record is about the row's attack.
func (r *row) matches(rec record) bool {
	if rec.Verdict != "deny" || rec.Time.Before(r.started.Add(-slop)) || rec.Time.After(r.ended.Add(slop)) {
		return false
	}
	end := func(want netip.AddrPort, ip netip.Addr, port uint16) bool {
		if !want.IsValid() {
			return true
		}
		return want.Addr().Unmap() == ip.Unmap() && (want.Port() == 0 || want.Port() == port)
	}
	return end(r.src, rec.Src.IP, rec.Src.Port) && end(r.dst, rec.Dst.IP, rec.Dst.Port)
}

// judgeRows says for each row whether it was refused, where and why.
func (l *lab) judgeRows(t *testing.T, rows []*row, known map[string]bool) {
	for _, r := range rows {
		t.Run(r.name(), func(t *testing.T) {
			l.undelivered(t, r, known)
			if r.step != "" && !strings.Contains(r.output, "step "+r.step+"\n") {
				t.Errorf("want step %q:\n%s", r.step, r.output)
			}
			if r.refusal != nil {
				r.verdict.hook, r.verdict.reason = r.refusal(t, r)
				return
			}
			l.explained(t, r)
		})
	}
}

// explained demands the counter and the record.
func (l *lab) explained(t *testing.T, r *row) {
	t.Helper()
	counted := r.counted()
	if !counted {
		t.Errorf("no count of %s by %s; what was counted meanwhile: %v\n%s", strings.Join(r.reasons, " or "), r.hook, r.cells, r.output)
	}
	recorded := map[string]bool{}
	for _, rec := range l.records[r.judge.Host.Name()].list() {
		if r.matches(rec) {
			recorded[rec.Reason] = true
		}
	}
	// The times of records are those of another clock, so a neighbouring row's may be among them; the counters are exact.
	right := slices.DeleteFunc(slices.Clone(r.reasons), func(reason string) bool { return !recorded[reason] || r.cells[cell{r.hook, reason}] == 0 })
	if len(right) == 0 {
		t.Errorf("no record with reason %s; reasons recorded of the same packet: %v", strings.Join(r.reasons, " or "), slices.Collect(maps.Keys(recorded)))
	}
	if counted && len(right) > 0 {
		r.verdict = cell{r.hook, strings.Join(right, ", ")}
	}
}

// undelivered demands that no witness saw anything of the attack.
func (l *lab) undelivered(t *testing.T, r *row, known map[string]bool) {
	t.Helper()
	if r.legitimate {
		return // who must not get it was asked already
	}
	var source string
	for line := range strings.Lines(r.output) {
		if at, ok := strings.CutPrefix(line, "local "); ok {
			source = strings.TrimSpace(at)
		}
	}
	for cgroup, w := range l.sees {
		for line := range strings.Lines(w.Text()) {
			// Without a token it is known by its ends: ephemeral ports come back, but not to the same place meanwhile.
			ends := source != "" && strings.Contains(line, fmt.Sprintf(" %s > %v ", source, r.target)) && !known[conversation(line)] && !strings.Contains(line, lastToken)
			if strings.Contains(line, r.token) || ends {
				t.Errorf("LET THROUGH: %s saw: %s%s", cgroup, line, r.output)
			}
		}
	}
}

// conversation is a witness's line without its token and direction.
func conversation(line string) string {
	f := strings.Fields(line)
	if len(f) < 5 {
		return line
	}
	ends := []string{f[2], f[4]}
	slices.Sort(ends)
	return f[1] + " " + strings.Join(ends, " ")
}

// seen lists the conversations that witnesses saw so far.
func (l *lab) seen() map[string]bool {
	out := map[string]bool{}
	for _, w := range l.sees {
		for line := range strings.Lines(w.Text()) {
			out[conversation(line)] = true
		}
	}
	return out
}

// lastToken begins what the barrier sends.
const lastToken = attack.Token + "last"

// barrier sends something allowed by each lane: what was let through before it has arrived when it has.
func (l *lab) barrier(t *testing.T) {
	t.Helper()
	for i, ln := range l.lanes("v4", "v6") {
		token := fmt.Sprintf("%s%d-", lastToken, i)
		l.attack(t, ln.at, netlab.Opts{Cgroup: ln.owner}, attack.Spec{Kind: attack.Socket, Proto: "udp", V6: ln.six,
			Tricks: []string{attack.Connect}, Dst: ln.dst, Payload: token})
		if !until(patient, func() bool { return strings.Contains(l.sees[ln.victim].Text(), token) }) {
			t.Errorf("the last allowed packet of %v did not arrive", ln)
		}
	}
	if !l.script.reaches(t) {
		t.Errorf("the rogue's last allowed packet did not arrive: %s", l.script.cmd.Text())
	}
	// Records come in order, too: a last refusal on each host.
	for _, a := range []*scenario.Agent{l.App, l.Data} {
		began := time.Now()
		l.attack(t, a, root.as, attack.Spec{Kind: attack.Socket, Proto: "udp", Dst: netip.AddrPortFrom(l.pg.v4, portUnlisted), Payload: "x"})
		if !until(patient, func() bool {
			return slices.ContainsFunc(l.records[a.Host.Name()].list(), func(rec record) bool {
				return rec.Dst.Port == portUnlisted && rec.Reason == "NO_IDENTITY" && rec.Time.After(began.Add(-slop))
			})
		}) {
			t.Errorf("the last refusal on %s was not recorded", a.Host.Name())
		}
	}
}

// nothingInClear demands that no overlay address was on the underlay, but where the neighbour put it.
func (l *lab) nothingInClear(t *testing.T) {
	t.Helper()
	for name, c := range l.captures {
		rec := c.Stop()
		if rec.Lost > 0 {
			t.Errorf("the capture at %s has holes", name)
		}
		for _, p := range rec.Packets {
			if (l.overlay(p.Flow.Src) || l.overlay(p.Flow.Dst)) && (name != scenario.DataHost || p.Outgoing) {
				t.Errorf("LEAKED at %s: %v", name, p.Flow)
			}
		}
	}
}

func (l *lab) overlay(a netip.Addr) bool {
	return netip.MustParsePrefix("198.18.0.0/15").Contains(a) || a.Is6() && netip.PrefixFrom(l.api.v6, 48).Masked().Contains(a)
}

// table is the outcome. Families, attackers and paths with the same outcome share a line.
func table(rows []*row) string {
	var lines [][]string // attack, by, family, path, hook, reason
	for _, r := range rows {
		reason := r.verdict.reason
		if r.differs != "" {
			reason += " (" + r.differs + ")"
		}
		lines = append(lines, []string{r.attack, r.variant, r.family, r.path, r.verdict.hook, reason})
	}
	for _, column := range []int{2, 1, 3} {
		lines = merge(lines, column)
	}
	var b strings.Builder
	for _, n := range lines {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(n, " | "))
	}
	return b.String()
}

// merge joins lines that differ only in one column, and keeps the order of the first of each.
func merge(lines [][]string, column int) [][]string {
	var out [][]string
	at := map[string]int{}
	for _, n := range lines {
		rest := slices.Clone(n)
		rest[column] = ""
		key := strings.Join(rest, "|")
		i, known := at[key]
		if !known {
			at[key] = len(out)
			out = append(out, slices.Clone(n))
			continue
		}
		if !slices.Contains(strings.Split(out[i][column], ", "), n[column]) {
			out[i][column] += ", " + n[column]
		}
	}
	return out
}

const preface = `# The spoofing matrix

What happens when a process or a host claims to be somebody else, or reaches past the judge: each attack is tried against
real agents, none of it is delivered, and this page says which hook refused it and what was recorded. It is written by a
test; the words of the last column are explained in [reasons](reasons.md).

Who tries: *root* and *nobody* run in a unit that is no workload, *workload* is root in a unit that is another workload,
*owner* is the workload that owns the address that is attacked from, *caged* is root of a user and network namespace of
its own behind a veth, *neighbour* is a machine on the underlay, *rogue* a host of the mesh with valid keys and no judge.
Root has every capability but those that make it the host itself: CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_BPF and their like.

Where: *tunnel* is towards another host, *lo* towards a workload of the same host, *underlay* past the tunnel. Mapped
means IPv4 by an IPv6 socket.

| attack | by | family | path | refused by | recorded |
|---|---|---|---|---|---|
`

// checkPage prints the outcome and compares it with what is documented.
func checkPage(t *testing.T, rows []*row) {
	if bad := slices.ContainsFunc(rows, func(r *row) bool { return r.verdict.hook == "" }); bad {
		t.Error("some rows have no outcome, so there is no table; see above")
		return
	}
	text := preface + table(rows)
	t.Logf("%d rows\n%s", len(rows), text)
	if *update {
		must(t, os.WriteFile(page, []byte(text), 0o644))
	}
	got, err := os.ReadFile(page)
	must(t, err)
	if string(got) != text {
		t.Error("docs/spoofing.md differs from the outcome; run: go test ./integration/matrix -update")
	}
}
