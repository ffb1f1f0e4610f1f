// Package reconcile makes the host what the last snapshot says: peers, addresses and policy, by idempotent operations
// with a status for each object.
//
// Start at Reconciler; how a peer is added is peers.go.
package reconcile

import (
	"context"
	"net/netip"

	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/internal/policy"
)

// Target is what the reconciler drives. Every method may be repeated without harm, and removing what is not there
// succeeds.
type Target interface {
	// UpdateHost gives the tunnel device exactly these addresses, and the routes of the overlay. The first of addrs
	// per family is the node's own.
	UpdateHost(ctx context.Context, self mesh.Self, addrs []netip.Addr) error
	// Enforce makes one View real as a whole, or leaves what was real before.
	Enforce(ctx context.Context, v *policy.View) error
	UpdatePeer(ctx context.Context, p mesh.Peer) error
	DeletePeer(ctx context.Context, k key.Public) error
	// PrunePeers deletes every peer whose key is not listed.
	PrunePeers(ctx context.Context, keep []key.Public) error
}
