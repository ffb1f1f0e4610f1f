package store

import (
	"errors"
	"time"
)

const nodeColumns = "name, id, number, status, wg_key, spki, prev_spki, ipv4, ipv6, ephemeral, created, bound, revision"

func scanNode(s scanner) (n Node, err error) {
	var spki, prev []byte
	var created, bound, rev int64
	err = s.Scan(&n.Name, &n.ID, &n.Number, &n.Status, &n.Key, &spki, &prev, &n.IPv4, &n.IPv6, &n.Ephemeral, &created, &bound, &rev)
	n.SPKI, n.PrevSPKI = fixed[[32]byte](spki), fixed[[32]byte](prev)
	n.Created, n.Bound, n.Revision = fromNanos(created), uint64(bound), uint64(rev)
	return n, err
}

// PutNode writes a node as of this transaction.
func (t *tx) PutNode(n Node) error {
	return t.put("write node "+n.Name, "INSERT INTO nodes ("+nodeColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (name) DO UPDATE SET id = excluded.id, number = excluded.number, status = excluded.status,
		wg_key = excluded.wg_key, spki = excluded.spki, prev_spki = excluded.prev_spki, ipv4 = excluded.ipv4,
		ipv6 = excluded.ipv6, ephemeral = excluded.ephemeral, created = excluded.created,
		bound = excluded.bound, revision = excluded.revision`,
		n.Name, n.ID, int64(n.Number), n.Status, n.Key, n.SPKI[:], n.PrevSPKI[:], n.IPv4, n.IPv6, n.Ephemeral,
		nanos(n.Created), int64(n.Bound), int64(t.revision))
}

// Node reads one.
func (t *tx) Node(name string) (Node, error) {
	return one(t, "read node "+name, scanNode, "SELECT "+nodeColumns+" FROM nodes WHERE name = ?", name)
}

// Nodes lists those that changed after a revision.
func (t *tx) Nodes(since uint64) ([]Node, error) {
	return all(t, "list nodes", scanNode, "SELECT "+nodeColumns+" FROM nodes WHERE revision > ? ORDER BY name", int64(since))
}

// NodeByWireGuard finds the node with a WireGuard key.
func (t *tx) NodeByWireGuard(key []byte) (Node, error) {
	return one(t, "find node by WireGuard key", scanNode, "SELECT "+nodeColumns+" FROM nodes WHERE wg_key = ?", key)
}

// PutNodeKey remembers a key. Repeating it for the same node is harmless.
func (t *tx) PutNodeKey(spki [32]byte, node string) error {
	n, err := t.write("write node key", `INSERT INTO node_keys (spki, node) VALUES (?, ?)
		ON CONFLICT (spki) DO UPDATE SET node = excluded.node WHERE node = excluded.node`, spki[:], node)
	if err == nil && n == 0 {
		return ErrDuplicate
	}
	return err
}

// NodeKey finds the node that has or had a key.
func (t *tx) NodeKey(spki [32]byte) (string, error) {
	return one(t, "find node by key", scanString, "SELECT node FROM node_keys WHERE spki = ?", spki[:])
}

const instanceColumns = "workload, node, number, ipv4, ipv6, revoked, removed, revision"

func scanInstance(s scanner) (i Instance, err error) {
	var removed, rev int64
	err = s.Scan(&i.Workload, &i.Node, &i.Number, &i.IPv4, &i.IPv6, &i.Revoked, &removed, &rev)
	i.Removed, i.Revision = fromNanos(removed), uint64(rev)
	return i, err
}

// PutInstance writes an instance as of this transaction.
func (t *tx) PutInstance(i Instance) error {
	return t.put("write instance", "INSERT INTO instances ("+instanceColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (workload, node) DO UPDATE SET number = excluded.number, ipv4 = excluded.ipv4, ipv6 = excluded.ipv6,
		revoked = excluded.revoked, removed = excluded.removed, revision = excluded.revision`,
		i.Workload, i.Node, int64(i.Number), i.IPv4, i.IPv6, i.Revoked, nanos(i.Removed), int64(t.revision))
}

// Instances lists those that changed after a revision.
func (t *tx) Instances(since uint64) ([]Instance, error) {
	return all(t, "list instances", scanInstance, "SELECT "+instanceColumns+" FROM instances WHERE revision > ? ORDER BY workload, node", int64(since))
}

// InstancesOn lists one node's.
func (t *tx) InstancesOn(node string) ([]Instance, error) {
	return all(t, "list instances", scanInstance, "SELECT "+instanceColumns+" FROM instances WHERE node = ? ORDER BY workload", node)
}

// PruneInstances forgets those removed before a time.
func (t *tx) PruneInstances(removedBefore time.Time) error {
	return t.put("prune instances", "DELETE FROM instances WHERE removed > 0 AND removed < ?", nanos(removedBefore))
}

// TakeAddress takes a free address, or one whose quarantine is over.
func (t *tx) TakeAddress(addr, owner string, now time.Time) (bool, error) {
	n, err := t.write("take address "+addr, `INSERT INTO addresses (address, owner, free_after) VALUES (?, ?, 0)
		ON CONFLICT (address) DO UPDATE SET owner = excluded.owner, free_after = 0
		WHERE free_after > 0 AND free_after <= ?`, addr, owner, nanos(now))
	return n == 1, err
}

// ReclaimAddress gives a resting address back to the owner that had it.
func (t *tx) ReclaimAddress(addr, owner string) (bool, error) {
	n, err := t.write("reclaim address "+addr, "UPDATE addresses SET free_after = 0 WHERE address = ? AND owner = ? AND free_after > 0", addr, owner)
	return n == 1, err
}

// ReleaseAddress puts an address in quarantine. Releasing what is not there is success.
func (t *tx) ReleaseAddress(addr string, freeAfter time.Time) error {
	return t.put("release address "+addr, "UPDATE addresses SET free_after = ? WHERE address = ?", nanos(freeAfter), addr)
}

// Addresses lists all in use or in quarantine.
func (t *tx) Addresses() ([]Address, error) {
	return all(t, "list addresses", func(s scanner) (a Address, err error) {
		var free int64
		err = s.Scan(&a.Address, &a.Owner, &free)
		a.FreeAfter = fromNanos(free)
		return a, err
	}, "SELECT address, owner, free_after FROM addresses ORDER BY address")
}

// PutApplied writes a node's report.
func (t *tx) PutApplied(a Applied) error {
	return t.put("write report of "+a.Node, `INSERT INTO applied (node, policy_revision, epoch, time, error) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (node) DO UPDATE SET policy_revision = excluded.policy_revision, epoch = excluded.epoch,
		time = excluded.time, error = excluded.error`, a.Node, int64(a.PolicyRevision), int64(a.Epoch), nanos(a.Time), a.Error)
}

// Applied lists every node's.
func (t *tx) Applied() ([]Applied, error) {
	return all(t, "list reports", func(s scanner) (a Applied, err error) {
		var rev, epoch, at int64
		err = s.Scan(&a.Node, &rev, &epoch, &at, &a.Error)
		a.PolicyRevision, a.Epoch, a.Time = uint64(rev), uint64(epoch), fromNanos(at)
		return a, err
	}, "SELECT node, policy_revision, epoch, time, error FROM applied ORDER BY node")
}

const joinColumns = "id, secret_hash, node, max_uses, uses, ephemeral, replace_ok, revoked, created, expires, made_by"

func scanJoinToken(s scanner) (j JoinToken, err error) {
	var id, hash []byte
	var created, expires int64
	err = s.Scan(&id, &hash, &j.Node, &j.MaxUses, &j.Uses, &j.Ephemeral, &j.Replace, &j.Revoked, &created, &expires, &j.By)
	j.ID, j.SecretHash = fixed[[16]byte](id), fixed[[32]byte](hash)
	j.Created, j.Expires = fromNanos(created), fromNanos(expires)
	return j, err
}

// PutJoinToken writes a token; its uses are counted by ConsumeJoinToken alone.
func (t *tx) PutJoinToken(j JoinToken) error {
	return t.put("write join token", `INSERT INTO join_tokens (id, secret_hash, node, max_uses, ephemeral, replace_ok, revoked, created, expires, made_by)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET revoked = excluded.revoked, expires = excluded.expires`,
		j.ID[:], j.SecretHash[:], j.Node, int64(j.MaxUses), j.Ephemeral, j.Replace, j.Revoked, nanos(j.Created), nanos(j.Expires), j.By)
}

// JoinToken reads one.
func (t *tx) JoinToken(id [16]byte) (JoinToken, error) {
	return one(t, "read join token", scanJoinToken, "SELECT "+joinColumns+" FROM join_tokens WHERE id = ?", id[:])
}

// JoinTokens lists them, oldest first.
func (t *tx) JoinTokens() ([]JoinToken, error) {
	return all(t, "list join tokens", scanJoinToken, "SELECT "+joinColumns+" FROM join_tokens ORDER BY created, id")
}

// ConsumeJoinToken takes a use in one statement: the row changes exactly when a use was left.
func (t *tx) ConsumeJoinToken(id [16]byte, spki [32]byte, node string, now time.Time) (bool, error) {
	n, err := t.write("consume join token", `UPDATE join_tokens SET uses = uses + 1
		WHERE id = ? AND revoked = 0 AND uses < max_uses AND expires > ?`, id[:], nanos(now))
	if err != nil || n != 1 {
		return false, err
	}
	err = t.put("record use of join token", "INSERT INTO join_uses (token, spki, node, time) VALUES (?, ?, ?, ?)", id[:], spki[:], node, nanos(now))
	return err == nil, err
}

// JoinUse finds the node that a key enrolled with a token.
func (t *tx) JoinUse(id [16]byte, spki [32]byte) (string, error) {
	return one(t, "read use of join token", scanString, "SELECT node FROM join_uses WHERE token = ? AND spki = ?", id[:], spki[:])
}

const apiColumns = "id, name, role, hash, created, expires, revoked, made_by"

func scanAPIToken(s scanner) (a APIToken, err error) {
	var hash []byte
	var created, expires, revoked int64
	err = s.Scan(&a.ID, &a.Name, &a.Role, &hash, &created, &expires, &revoked, &a.By)
	a.Hash, a.Created, a.Expires, a.Revoked = fixed[[32]byte](hash), fromNanos(created), fromNanos(expires), fromNanos(revoked)
	return a, err
}

// PutAPIToken adds a token; one with the same ID or hash is ErrDuplicate.
func (t *tx) PutAPIToken(a APIToken) error {
	return t.put("write API token", "INSERT INTO api_tokens ("+apiColumns+") VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
		a.ID, a.Name, a.Role, a.Hash[:], nanos(a.Created), nanos(a.Expires), nanos(a.Revoked), a.By)
}

// APITokenByHash finds the token with a secret.
func (t *tx) APITokenByHash(hash [32]byte) (APIToken, error) {
	return one(t, "find API token", scanAPIToken, "SELECT "+apiColumns+" FROM api_tokens WHERE hash = ?", hash[:])
}

// APITokens lists them, oldest first.
func (t *tx) APITokens() ([]APIToken, error) {
	return all(t, "list API tokens", scanAPIToken, "SELECT "+apiColumns+" FROM api_tokens ORDER BY created, id")
}

// RevokeAPIToken ends a token.
func (t *tx) RevokeAPIToken(id string, at time.Time) error {
	if _, err := one(t, "find API token", scanString, "SELECT id FROM api_tokens WHERE id = ?", id); errors.Is(err, ErrNotFound) || err != nil {
		return err
	}
	return t.put("revoke API token", "UPDATE api_tokens SET revoked = ? WHERE id = ? AND revoked = 0", nanos(at), id)
}
