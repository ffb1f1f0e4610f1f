package registry

import (
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
)

// EnrolRequest is a host that asks to join. SPKI must be proven: it is the hash of the key that signed the request.
type EnrolRequest struct {
	Token        identity.JoinToken
	Node         string // the name that the host claims; empty: the one that the token binds
	SPKI         [32]byte
	WireGuardKey key.Public
	// Issue, when set, runs inside the transaction, so that a certificate is in the issuance log exactly when the
	// enrolment is. It runs on a repeated enrolment too.
	Issue func(store.Tx, Node) error
}

// Enrol consumes a use of a token and makes a node of it, in one transaction. In order:
//
//  1. the token is ours and its secret is right;
//  2. the same key again, with the same token, gets the same answer (a reply may have been lost), used up or expired,
//     but not when token or node was revoked, the node has another key now, or the token expired so long ago
//     (identity.RenewGrace) that an SVID of then could not be renewed either;
//  3. the token is neither revoked, nor expired, nor used up;
//  4. the name is one, and the token binds it;
//  5. the key never belonged to another node, nor to this one before a replacement; a revoked node's key is refused;
//  6. the name is free, or the token may replace;
//  7. one use is taken, in a statement that changes a row only when a use was left.
//
// A token that binds a name or glob makes the node active; any other leaves it pending.
func (r *Registry) Enrol(ctx context.Context, req EnrolRequest) (node Node, already bool, err error) {
	if req.WireGuardKey.IsZero() {
		return Node{}, false, fmt.Errorf("enrol: %w: none given", key.ErrKey)
	}
	_, err = r.update(ctx, func(tx store.Tx) error {
		e := enrolment{r: r, tx: tx, req: req, now: r.opts.Now()}
		row, repeated, err := e.run(ctx)
		if err != nil {
			return err
		}
		already = repeated
		if node, err = nodeFromRow(row); err != nil {
			return err
		}
		if req.Issue != nil {
			return req.Issue(tx, node)
		}
		return nil
	})
	if err != nil {
		return Node{}, false, fmt.Errorf("enrol: %w", err)
	}
	return node, already, nil
}

// enrolment is one run of Enrol.
type enrolment struct {
	r   *Registry
	tx  store.Tx
	req EnrolRequest
	now time.Time
}

func (e *enrolment) run(ctx context.Context) (row store.Node, already bool, err error) {
	token, err := e.token()
	if err != nil {
		return row, false, err
	}
	if row, already, err = e.again(token); already || err != nil {
		return row, already, err
	}
	if err := e.usable(token); err != nil {
		return row, false, err
	}
	name, err := e.name(token)
	if err != nil {
		return row, false, err
	}
	old, exists, err := e.existing(token, name)
	if err != nil {
		return row, false, err
	}
	consumed, err := e.tx.ConsumeJoinToken(token.ID, e.req.SPKI, name, e.now)
	if err != nil {
		return row, false, err
	}
	if !consumed {
		return row, false, ErrTokenUsed
	}
	row, err = e.newNode(token, name, old, exists)
	if err != nil {
		return row, false, err
	}
	if err := e.r.placeOn(e.tx, row); err != nil {
		return row, false, err
	}
	detail := fmt.Sprintf("%s, token %s, key %s, replaced %t", row.Status, hex.EncodeToString(token.ID[:]), hex.EncodeToString(e.req.SPKI[:8]), exists)
	return row, false, e.r.audit(ctx, e.tx, "node.enrol", name, detail)
}

// token finds the token. An unknown ID and a wrong secret are one answer.
func (e *enrolment) token() (store.JoinToken, error) {
	token, err := e.tx.JoinToken(e.req.Token.ID)
	if err != nil {
		return token, orSentinel(err, ErrTokenUnknown)
	}
	hash := e.req.Token.SecretHash()
	if subtle.ConstantTimeCompare(hash[:], token.SecretHash[:]) != 1 {
		return token, ErrTokenUnknown
	}
	return token, nil
}

// again answers the key that this token enrolled before.
func (e *enrolment) again(token store.JoinToken) (row store.Node, already bool, err error) {
	name, err := e.tx.JoinUse(e.req.Token.ID, e.req.SPKI)
	if errors.Is(err, store.ErrNotFound) {
		return row, false, nil
	}
	if err != nil {
		return row, false, err
	}
	if token.Revoked {
		return row, false, ErrTokenRevoked
	}
	if e.now.After(token.Expires.Add(identity.RenewGrace)) {
		return row, false, ErrTokenExpired
	}
	if row, err = e.tx.Node(name); err != nil {
		return row, false, err
	}
	if err := acceptsKey(row, e.req.SPKI); err != nil {
		return row, false, err
	}
	if !bytes.Equal(row.Key, e.req.WireGuardKey.Bytes()) {
		return row, false, fmt.Errorf("%w: the node has another WireGuard key: enrol again with a new token and --replace", ErrKeyTaken)
	}
	return row, true, nil
}

func (e *enrolment) usable(token store.JoinToken) error {
	switch {
	case token.Revoked:
		return ErrTokenRevoked
	case token.Uses >= token.MaxUses:
		return ErrTokenUsed
	case !e.now.Before(token.Expires):
		return ErrTokenExpired
	}
	return nil
}

func (e *enrolment) name(token store.JoinToken) (string, error) {
	name := e.req.Node
	if name == "" && token.Node != "" && !isGlob(token.Node) {
		name = token.Node
	}
	if err := identity.ParseName(name); err != nil {
		return "", err
	}
	if token.Node != "" && name != token.Node && !(isGlob(token.Node) && matches([]string{token.Node}, name)) {
		return "", fmt.Errorf("%w: it is for %q, the host says %q", ErrTokenOtherName, token.Node, name)
	}
	return name, nil
}

// existing checks what is known of the key and the name.
func (e *enrolment) existing(token store.JoinToken, name string) (old store.Node, exists bool, err error) {
	owner, err := e.tx.NodeKey(e.req.SPKI)
	if err == nil {
		return old, false, e.knownKey(owner, name)
	}
	if !errors.Is(err, store.ErrNotFound) {
		return old, false, err
	}
	old, err = e.tx.Node(name)
	exists = err == nil
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return old, false, err
	}
	if exists && !token.Replace {
		return old, false, ErrNameTaken
	}
	wg, err := e.tx.NodeByWireGuard(e.req.WireGuardKey.Bytes())
	// The WireGuard key of a host that only lost its node key may stay, but a revoked host's may not.
	if err == nil && (wg.Name != name || NodeStatus(wg.Status) == NodeRevoked) {
		return old, false, fmt.Errorf("%w (WireGuard)", ErrKeyTaken)
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return old, false, err
	}
	return old, exists, nil
}

// knownKey explains why a key that was enrolled before, with another token, is refused.
func (e *enrolment) knownKey(owner, name string) error {
	row, err := e.tx.Node(owner)
	if err != nil {
		return err
	}
	if err := acceptsKey(row, e.req.SPKI); err != nil {
		return err
	}
	if owner != name {
		return fmt.Errorf("%w: %s", ErrKeyTaken, owner)
	}
	return fmt.Errorf("%w: this host is enrolled with that key: start it without a token", ErrNameTaken)
}

func (e *enrolment) newNode(token store.JoinToken, name string, old store.Node, exists bool) (row store.Node, err error) {
	row = store.Node{Name: name, Status: string(NodePending), Key: e.req.WireGuardKey.Bytes(), SPKI: e.req.SPKI,
		Ephemeral: token.Ephemeral, Created: e.now, Bound: e.tx.Revision()}
	if token.Node != "" {
		row.Status = string(NodeActive)
	}
	id, err := e.r.State().TrustDomain.Node(name)
	if err != nil {
		return row, err
	}
	row.ID = id.String()
	if row.Number, err = e.tx.NumberFor(row.ID); err != nil {
		return row, err
	}
	if exists && NodeStatus(old.Status) != NodeRevoked {
		row.IPv4, row.IPv6 = old.IPv4, old.IPv6
	} else if err := e.freshAddresses(&row, old, exists); err != nil {
		return row, err
	}
	if err := e.tx.PutNodeKey(row.SPKI, name); err != nil {
		return row, orDuplicate(err, ErrKeyTaken)
	}
	return row, e.tx.PutNode(row)
}

// freshAddresses never takes up those of a revoked node: somewhere they may still be cut off. Its workloads' go too.
func (e *enrolment) freshAddresses(row *store.Node, old store.Node, exists bool) (err error) {
	if exists {
		if err := e.tx.ReleaseAddress(old.IPv4, e.now.Add(Quarantine)); err != nil {
			return err
		}
		standing, err := e.tx.InstancesOn(old.Name)
		if err != nil {
			return err
		}
		for _, i := range standing {
			if !i.Removed.IsZero() {
				continue
			}
			if err := removeInstance(e.tx, i, e.now); err != nil {
				return err
			}
		}
		if err := e.tx.DeleteRevocation(revokedNode, old.Name, ""); err != nil {
			return err
		}
	}
	row.IPv4, row.IPv6, err = takeAddresses(e.tx, nodeOwner(row.Name), e.now)
	return err
}

// acceptsKey says whether a node may act with a key.
func acceptsKey(row store.Node, spki [32]byte) error {
	if NodeStatus(row.Status) == NodeRevoked {
		return ErrNodeRevoked
	}
	if row.SPKI == spki || row.PrevSPKI == spki && row.PrevSPKI != [32]byte{} {
		return nil
	}
	return ErrKeyRetired
}

// CheckNode says whether a peer that proved an ID and a key is a node that may speak: registered, not revoked, with its
// current key (or the one before, while the reply to its last renewal may have been lost). Pending nodes pass: their
// Status says what they may do.
func (r *Registry) CheckNode(id identity.ID, spki [32]byte) (Node, error) {
	n, ok := r.State().Nodes[id.NodeName()]
	if !ok || n.ID != id {
		return Node{}, ErrNodeUnknown
	}
	return n, acceptsKey(store.Node{Status: string(n.Status), SPKI: n.SPKI, PrevSPKI: n.PrevSPKI}, spki)
}

// RenewRequest is an enrolled node that asks for its next SVID, possibly with an expired one.
type RenewRequest struct {
	ID      identity.ID // proven by the certificate that it presented
	SPKI    [32]byte    // of that certificate
	NewSPKI [32]byte    // of the key in its request; may be the same
	Issue   func(store.Tx, Node) error
}

// Proven retires the key before the current one: the node was seen with the current one, so that the reply which brought
// its certificate was not lost. It writes nothing when there is nothing to retire; callers look at State before.
func (r *Registry) Proven(ctx context.Context, id identity.ID, spki [32]byte) error {
	_, err := r.update(ctx, func(tx store.Tx) error {
		row, err := tx.Node(id.NodeName())
		if err != nil {
			return orSentinel(err, ErrNodeUnknown)
		}
		// Another renewal may have come between: then it is not this key that was proven.
		if row.ID != id.String() || row.SPKI != spki || row.PrevSPKI == [32]byte{} {
			return nil
		}
		row.PrevSPKI = [32]byte{}
		return tx.PutNode(row)
	})
	if err != nil {
		return fmt.Errorf("retire former key: %w", err)
	}
	return nil
}

// Renew registers a node's next key. The presented one stays good until the node is seen with the next: on a stream
// (Proven), or in a renewal.
func (r *Registry) Renew(ctx context.Context, req RenewRequest) (node Node, err error) {
	_, err = r.update(ctx, func(tx store.Tx) error {
		row, err := tx.Node(req.ID.NodeName())
		if err != nil {
			return orSentinel(err, ErrNodeUnknown)
		}
		if row.ID != req.ID.String() {
			return ErrNodeUnknown
		}
		if err := acceptsKey(row, req.SPKI); err != nil {
			return err
		}
		if err := nextKey(tx, &row, req); err != nil {
			return err
		}
		if node, err = nodeFromRow(row); err != nil || req.Issue == nil {
			return err
		}
		return req.Issue(tx, node)
	})
	if err != nil {
		return Node{}, fmt.Errorf("renew: %w", err)
	}
	return node, nil
}

// nextKey registers the key of a renewal. A reply may be lost at any time: then the node asks again, with the key that it
// has, for the same new key or for another one.
func nextKey(tx store.Tx, row *store.Node, req RenewRequest) error {
	switch req.NewSPKI {
	case req.SPKI: // the node keeps its key
		if row.SPKI != req.SPKI || row.PrevSPKI == [32]byte{} {
			return nil
		}
		row.PrevSPKI = [32]byte{}
		return tx.PutNode(*row)
	case row.SPKI: // asked again
		return nil
	}
	owner, err := tx.NodeKey(req.NewSPKI)
	switch {
	case err == nil && owner == row.Name:
		return ErrKeyRetired // a key that was given up may be known to others by now
	case err == nil:
		return ErrKeyTaken
	case !errors.Is(err, store.ErrNotFound):
		return err
	}
	if err := tx.PutNodeKey(req.NewSPKI, row.Name); err != nil {
		return orDuplicate(err, ErrKeyTaken)
	}
	row.PrevSPKI, row.SPKI = req.SPKI, req.NewSPKI
	return tx.PutNode(*row)
}

// orSentinel puts a sentinel in the place of "not found".
func orSentinel(err, sentinel error) error {
	if errors.Is(err, store.ErrNotFound) {
		return sentinel
	}
	return err
}

func orDuplicate(err, sentinel error) error {
	if errors.Is(err, store.ErrDuplicate) {
		return sentinel
	}
	return err
}
