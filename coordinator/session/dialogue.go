package session

import (
	"slices"
	"time"

	"github.com/signet-overlay/signet/coordinator/publish"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/proto/signetv1"
)

const (
	// patience is how long a newer Update waits for the acknowledgement of the one before. Then it goes out all the
	// same: an agent that is stuck in applying must still hear of a revocation.
	patience = 500 * time.Millisecond
	// hintWindow is how long changes of endpoints gather after some were sent. The first go out at once.
	hintWindow = 50 * time.Millisecond
)

// dialogue decides what to send next on one stream. It is pure: no clock, lock or connection.
//
// The rules, in order:
//
//  1. Only the latest counts: what was published while an Update is on its way is skipped.
//  2. An Update holds the sections that differ from what the agent holds, and nothing else. What it holds is what Hello
//     said, and then what was sent: the stream keeps the order.
//  3. One Update is unacknowledged at a time, for at most patience. The final manifest of a revoked node waits for
//     nothing.
//  4. An Update that the agent refused is sent once more as a whole, in case the two sides disagree about what it
//     holds. A whole one that is refused is not repeated: something else is wrong, and it is in the agent's report.
//  5. Endpoints go before the Update that makes their node a peer, so that the peer is reached as soon as it is made. The
//     node's own are among them: that is how it learns how it is seen.
type dialogue struct {
	held   []mesh.SectionRef // what the agent holds once it has read everything that was sent
	sent   *publish.Node     // the latest that it was sent, or was found to hold
	whole  bool              // sent held every section
	again  bool              // send it once more, as a whole
	wait   bool              // sent is not acknowledged
	sentAt time.Time

	hinted   uint64   // endpoints up to this version of the directory were sent
	hintedTo []string // the peers then
	hintedAt time.Time
}

// newDialogue begins with what Hello said. confirmed: the agent's report on that very epoch has arrived before, so that
// there is nothing to tell when nothing changed.
func newDialogue(epoch uint64, held []mesh.SectionRef, n *publish.Node, confirmed bool) *dialogue {
	d := &dialogue{held: held}
	if diff := mesh.Compare(held, n.Refs()); confirmed && epoch == n.Epoch && len(diff.Changed)+len(diff.Removed) == 0 {
		d.sent = n
	}
	return d
}

// update returns what to send of n, or nil and how long to wait before asking again (0: until something happens).
func (d *dialogue) update(n *publish.Node, now time.Time) (*signetv1.Update, time.Duration) {
	if n == d.sent && !d.again {
		return nil, 0
	}
	if left := d.sentAt.Add(patience).Sub(now); d.wait && left > 0 && n.Status != registry.NodeRevoked {
		return nil, left
	}
	held := d.held
	if d.again {
		held = nil
	}
	refs := n.Refs()
	changed := mesh.Compare(held, refs).Changed
	u := &signetv1.Update{Manifest: n.Manifest(), DistributionCertificate: n.Certificate}
	for _, ref := range changed {
		u.Sections = append(u.Sections, &signetv1.Section{Name: ref.Name, Body: n.Section(ref.Name).Body})
	}
	d.held, d.sent, d.sentAt, d.wait, d.again = refs, n, now, true, false
	d.whole = len(changed) == len(refs)
	return u, 0
}

// acked takes in a report. Reports on older epochs say nothing about what is on its way.
func (d *dialogue) acked(epoch uint64, failed bool) {
	if d.sent == nil || epoch != d.sent.Epoch || !d.wait {
		return
	}
	d.wait = false
	d.again = failed && !d.whole
}

// hints returns the endpoints that the agent has not heard of and that n makes it need, or nil and how long to wait.
func (d *dialogue) hints(dir *directory, n *publish.Node, now time.Time) (*signetv1.EndpointHints, time.Duration) {
	to := slices.Sorted(slices.Values(append([]string{n.Name}, n.Peers...)))
	nodes, latest := dir.since(to, d.hinted, d.hintedTo)
	if len(nodes) == 0 {
		d.hinted, d.hintedTo = latest, to
		return nil, 0
	}
	if left := d.hintedAt.Add(hintWindow).Sub(now); left > 0 {
		return nil, left
	}
	d.hinted, d.hintedTo, d.hintedAt = latest, to, now
	return &signetv1.EndpointHints{Nodes: nodes}, 0
}
