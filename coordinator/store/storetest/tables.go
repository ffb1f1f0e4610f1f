package storetest

import (
	"errors"
	"testing"
	"time"

	"github.com/signet-overlay/signet/coordinator/store"
)

func meta(t *testing.T, open Open) {
	s := open(t, "a")
	update(t, s, func(tx store.Tx) error {
		_, err := tx.Meta()
		fails(t, "Meta", err, store.ErrNotFound)
		return nil
	})
	for _, lease := range []time.Duration{time.Hour, 2 * time.Hour} {
		want := store.Meta{TrustDomain: "x.example", Incarnation: 4_000_000_000, Overlay4: "198.18.0.0/15", Overlay6: "fd00::/48", Lease: lease, Created: at}
		update(t, s, func(tx store.Tx) error { return tx.SetMeta(want) })
		view(t, s, func(tx store.Tx) error {
			got, err := tx.Meta()
			same(t, "Meta", got, want)
			return err
		})
	}
}

func numbers(t *testing.T, open Open) {
	s := open(t, "a")
	update(t, s, func(tx store.Tx) error {
		for i, id := range []string{"a", "b", "a", "c"} {
			n, err := tx.NumberFor(id)
			same(t, "NumberFor "+id, n, []uint32{256, 257, 256, 258}[i])
			r, rerr := tx.RuleNumberFor(id)
			same(t, "RuleNumberFor "+id, r, []uint32{1, 2, 1, 3}[i])
			if err := errors.Join(err, rerr); err != nil {
				return err
			}
		}
		now, err := tx.Advance(store.CounterNumber, 1000)
		same(t, "Advance", now, uint64(1000))
		if err != nil {
			return err
		}
		now, err = tx.Advance(store.CounterNumber, 500)
		same(t, "Advance backwards", now, uint64(1000))
		if err != nil {
			return err
		}
		n, err := tx.NumberFor("d")
		same(t, "NumberFor after Advance", n, uint32(1000))
		return err
	})
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Numbers(256)
		same(t, "Numbers above 256", got, map[string]uint32{"b": 257, "c": 258, "d": 1000})
		rules, rerr := tx.RuleNumbers(2)
		same(t, "RuleNumbers above 2", rules, map[string]uint32{"c": 3})
		return errors.Join(err, rerr)
	})
	_, err := s.Update(ctx(), func(tx store.Tx) error {
		if _, err := tx.Advance(store.CounterNumber, 1<<32-1); err != nil {
			return err
		}
		_, err := tx.NumberFor("one too many")
		return err
	})
	if err == nil {
		t.Error("a number beyond 32 bits was given")
	}
}

func node(name string, b byte) store.Node {
	return store.Node{Name: name, ID: "spiffe://x.example/signet/node/" + name, Number: 256 + uint32(b), Status: "active",
		Key: make32(b), SPKI: [32]byte{b}, PrevSPKI: [32]byte{b, 1}, IPv4: "198.18.0." + string('0'+b), IPv6: "fd00::" + string('0'+b),
		Ephemeral: b == 1, Created: at, Bound: 7}
}

func make32(b byte) []byte { return append(make([]byte, 31), b) }

func nodes(t *testing.T, open Open) {
	s := open(t, "a")
	a, b := node("a", 1), node("b", 2)
	update(t, s, func(tx store.Tx) error { return tx.PutNode(a) })
	update(t, s, func(tx store.Tx) error { return tx.PutNode(b) })
	a.Revision, b.Revision = 1, 2
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Node("a")
		same(t, "Node", got, a)
		byKey, kerr := tx.NodeByWireGuard(b.Key)
		same(t, "NodeByWireGuard", byKey, b)
		all, aerr := tx.Nodes(0)
		same(t, "Nodes(0)", all, []store.Node{a, b})
		since, serr := tx.Nodes(1)
		same(t, "Nodes(1)", since, []store.Node{b})
		_, missing := tx.Node("c")
		fails(t, "Node", missing, store.ErrNotFound)
		return errors.Join(err, kerr, aerr, serr)
	})
	a.Status = "revoked"
	update(t, s, func(tx store.Tx) error { return tx.PutNode(a) })
	view(t, s, func(tx store.Tx) error {
		a.Revision = 3
		since, err := tx.Nodes(2)
		same(t, "Nodes(2)", since, []store.Node{a})
		return err
	})
	thief := node("c", 3)
	thief.Key = b.Key
	_, err := s.Update(ctx(), func(tx store.Tx) error { return tx.PutNode(thief) })
	fails(t, "PutNode with another's WireGuard key", err, store.ErrDuplicate)
	update(t, s, func(tx store.Tx) error {
		err := errors.Join(tx.PutNodeKey([32]byte{9}, "a"), tx.PutNodeKey([32]byte{9}, "a"))
		fails(t, "PutNodeKey of another", tx.PutNodeKey([32]byte{9}, "b"), store.ErrDuplicate)
		owner, oerr := tx.NodeKey([32]byte{9})
		same(t, "NodeKey", owner, "a")
		return errors.Join(err, oerr)
	})
}

func instances(t *testing.T, open Open) {
	s := open(t, "a")
	i := store.Instance{Workload: "spiffe://x.example/app/a", Number: 300, Node: "a", IPv4: "198.18.0.9", IPv6: "fd00::9"}
	update(t, s, func(tx store.Tx) error { return errors.Join(tx.PutNode(node("a", 1)), tx.PutInstance(i)) })
	i.Revision = 1
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Instances(0)
		same(t, "Instances", got, []store.Instance{i})
		on, oerr := tx.InstancesOn("b")
		same(t, "InstancesOn", len(on), 0)
		return errors.Join(err, oerr)
	})
	i.Revoked, i.Removed = true, at
	update(t, s, func(tx store.Tx) error { return tx.PutInstance(i) })
	i.Revision = 2
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Instances(1)
		same(t, "Instances(1)", got, []store.Instance{i})
		return err
	})
	update(t, s, func(tx store.Tx) error { return tx.PruneInstances(at) })
	update(t, s, func(tx store.Tx) error {
		got, err := tx.InstancesOn("a")
		same(t, "not pruned yet", len(got), 1)
		return errors.Join(err, tx.PruneInstances(at.Add(1)))
	})
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Instances(0)
		same(t, "pruned", len(got), 0)
		return err
	})
	_, err := s.Update(ctx(), func(tx store.Tx) error {
		return tx.PutInstance(store.Instance{Workload: "w", Node: "nobody", IPv4: "1", IPv6: "2"})
	})
	if err == nil {
		t.Error("an instance on a node that does not exist was accepted")
	}
}

func addresses(t *testing.T, open Open) {
	s := open(t, "a")
	take := func(tx store.Tx, owner string, now time.Time, want bool) {
		t.Helper()
		got, err := tx.TakeAddress("198.18.0.1", owner, now)
		if err != nil || got != want {
			t.Errorf("TakeAddress by %s at %v: %t %v, want %t", owner, now, got, err, want)
		}
	}
	update(t, s, func(tx store.Tx) error {
		take(tx, "a", at, true)
		take(tx, "a", at, false)
		take(tx, "b", at, false)
		if err := tx.ReleaseAddress("198.18.0.1", at.Add(time.Hour)); err != nil {
			return err
		}
		take(tx, "b", at.Add(time.Hour-1), false)
		take(tx, "a", at.Add(time.Hour-1), false)
		back, err := tx.ReclaimAddress("198.18.0.1", "b")
		same(t, "ReclaimAddress by another", back, false)
		if err != nil {
			return err
		}
		if back, err = tx.ReclaimAddress("198.18.0.1", "a"); err != nil {
			return err
		}
		same(t, "ReclaimAddress", back, true)
		if err := tx.ReleaseAddress("198.18.0.1", at.Add(time.Hour)); err != nil {
			return err
		}
		take(tx, "b", at.Add(time.Hour), true)
		got, err := tx.Addresses()
		same(t, "Addresses", got, []store.Address{{Address: "198.18.0.1", Owner: "b"}})
		return errors.Join(err, tx.ReleaseAddress("198.18.0.77", at))
	})
}

func joinTokens(t *testing.T, open Open) {
	s := open(t, "a")
	j := store.JoinToken{ID: [16]byte{1}, SecretHash: [32]byte{2}, Node: "api-*", MaxUses: 2, Ephemeral: true, Replace: true,
		Created: at, Expires: at.Add(time.Hour), By: "ada"}
	update(t, s, func(tx store.Tx) error { return tx.PutJoinToken(j) })
	consume := func(spki byte, now time.Time, want bool) {
		t.Helper()
		update(t, s, func(tx store.Tx) error {
			got, err := tx.ConsumeJoinToken(j.ID, [32]byte{spki}, "api-1", now)
			same(t, "ConsumeJoinToken", got, want)
			return err
		})
	}
	consume(1, at.Add(time.Hour), false) // expired
	consume(1, at, true)
	revoked := j
	revoked.Revoked = true
	update(t, s, func(tx store.Tx) error { return tx.PutJoinToken(revoked) })
	consume(2, at, false)
	update(t, s, func(tx store.Tx) error { return tx.PutJoinToken(j) })
	consume(2, at, true)
	consume(3, at, false) // used up
	view(t, s, func(tx store.Tx) error {
		got, err := tx.JoinToken(j.ID)
		j.Uses = 2
		same(t, "JoinToken", got, j)
		list, lerr := tx.JoinTokens()
		same(t, "JoinTokens", list, []store.JoinToken{j})
		who, uerr := tx.JoinUse(j.ID, [32]byte{2})
		same(t, "JoinUse", who, "api-1")
		_, missing := tx.JoinUse(j.ID, [32]byte{3})
		fails(t, "JoinUse", missing, store.ErrNotFound)
		_, missing = tx.JoinToken([16]byte{9})
		fails(t, "JoinToken", missing, store.ErrNotFound)
		return errors.Join(err, lerr, uerr)
	})
}

func apiTokens(t *testing.T, open Open) {
	s := open(t, "a")
	a := store.APIToken{ID: "t1", Name: "ci", Role: "owner", Hash: [32]byte{1}, Created: at, Expires: at.Add(time.Hour), By: "init"}
	update(t, s, func(tx store.Tx) error { return tx.PutAPIToken(a) })
	_, err := s.Update(ctx(), func(tx store.Tx) error { return tx.PutAPIToken(a) })
	fails(t, "PutAPIToken twice", err, store.ErrDuplicate)
	update(t, s, func(tx store.Tx) error {
		fails(t, "RevokeAPIToken", tx.RevokeAPIToken("t9", at), store.ErrNotFound)
		return errors.Join(tx.RevokeAPIToken("t1", at), tx.RevokeAPIToken("t1", at.Add(1)))
	})
	a.Revoked = at
	view(t, s, func(tx store.Tx) error {
		got, err := tx.APITokenByHash(a.Hash)
		same(t, "APITokenByHash", got, a)
		list, lerr := tx.APITokens()
		same(t, "APITokens", list, []store.APIToken{a})
		_, missing := tx.APITokenByHash([32]byte{2})
		fails(t, "APITokenByHash", missing, store.ErrNotFound)
		return errors.Join(err, lerr)
	})
}

func policies(t *testing.T, open Open) {
	s := open(t, "a")
	p := store.Policy{Files: []store.SourceFile{{Name: "b.yaml", Data: []byte("b")}, {Name: "a.yaml", Data: []byte{}}}, AppliedAt: at, By: "ada", Comment: "first"}
	for want := uint64(1); want <= 2; want++ {
		update(t, s, func(tx store.Tx) error {
			got, err := tx.AddPolicy(p)
			same(t, "AddPolicy", got, want)
			return err
		})
	}
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Policy(2)
		p.Revision = 2
		p.Files[1].Data = nil // empty bytes come back as nil
		same(t, "Policy", got, p)
		list, lerr := tx.Policies()
		same(t, "Policies", []uint64{list[0].Revision, list[1].Revision, uint64(len(list[0].Files))}, []uint64{2, 1, 0})
		newest, nerr := tx.PolicyRevision()
		same(t, "PolicyRevision", newest, uint64(2))
		_, missing := tx.Policy(3)
		fails(t, "Policy", missing, store.ErrNotFound)
		return errors.Join(err, lerr, nerr)
	})
}

func revocations(t *testing.T, open Open) {
	s := open(t, "a")
	r := store.Revocation{Kind: "workload", Subject: "spiffe://x.example/app/a", Time: at, By: "ada"}
	update(t, s, func(tx store.Tx) error { return tx.PutRevocation(r) })
	later := r
	later.Time = at.Add(1)
	update(t, s, func(tx store.Tx) error { return tx.PutRevocation(later) })
	r.Revision = 1
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Revocations()
		same(t, "Revocations", got, []store.Revocation{r})
		return err
	})
	update(t, s, func(tx store.Tx) error {
		return errors.Join(tx.DeleteRevocation(r.Kind, r.Subject, ""), tx.DeleteRevocation(r.Kind, r.Subject, ""))
	})
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Revocations()
		same(t, "Revocations", len(got), 0)
		return err
	})
}

func authorities(t *testing.T, open Open) {
	s := open(t, "a")
	a := store.Authority{Kind: "root", Slot: "current", Serial: "01", Cert: []byte{1}, Sealed: []byte{2}, Created: at, NotAfter: at.Add(time.Hour)}
	update(t, s, func(tx store.Tx) error { return tx.PutAuthority(a) })
	b := a
	b.Serial, b.Created = "02", at.Add(1)
	_, err := s.Update(ctx(), func(tx store.Tx) error { return tx.PutAuthority(b) })
	fails(t, "two in one slot", err, store.ErrDuplicate)
	a.Slot, a.Sealed = "retired", []byte{}
	update(t, s, func(tx store.Tx) error { return errors.Join(tx.PutAuthority(a), tx.PutAuthority(b)) })
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Authorities()
		a.Sealed = nil // empty bytes come back as nil
		same(t, "Authorities", got, []store.Authority{a, b})
		return err
	})
}

func applied(t *testing.T, open Open) {
	s := open(t, "a")
	a := store.Applied{Node: "a", PolicyRevision: 1, Epoch: 1<<32 + 5, Time: at}
	update(t, s, func(tx store.Tx) error { return tx.PutApplied(a) })
	a.Epoch, a.Error = 1<<40, "no BPF"
	update(t, s, func(tx store.Tx) error { return tx.PutApplied(a) })
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Applied()
		same(t, "Applied", got, []store.Applied{a})
		return err
	})
}

func logs(t *testing.T, open Open) {
	s := open(t, "a")
	check := func(lines uint64) {
		t.Helper()
		issued, err := store.VerifyIssuance(ctx(), s)
		audited, aerr := store.VerifyAudit(ctx(), s)
		if err := errors.Join(err, aerr); err != nil || issued.Lines != lines || audited.Lines != lines {
			t.Errorf("logs: %d and %d lines, %v; want %d", issued.Lines, audited.Lines, err, lines)
		}
	}
	check(0)
	for i := range 3 {
		update(t, s, func(tx store.Tx) error {
			_, err := tx.AppendIssuance(store.Issuance{Serial: string('a' + rune(i)), ID: "spiffe://x.example/app/a", SPKI: [32]byte{1}, NotAfter: at, Time: at})
			_, aerr := tx.AppendAudit(store.Audit{Time: at, Who: "ada", What: "node.approve", Object: "a", Outcome: "ok", Detail: "d"})
			return errors.Join(err, aerr)
		})
	}
	check(3)
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Audits(1, 1)
		if len(got) != 1 || got[0].Seq != 2 || got[0].Who != "ada" || !got[0].Time.Equal(at) {
			t.Errorf("Audits(1, 1) = %+v", got)
		}
		return err
	})
}
