package store

import "fmt"

// AddPolicy gives the document the next policy revision.
func (t *tx) AddPolicy(p Policy) (uint64, error) {
	last, err := t.PolicyRevision()
	if err != nil {
		return 0, err
	}
	rev := last + 1
	if err := t.put("write policy", "INSERT INTO policies (revision, applied_at, applied_by, comment) VALUES (?, ?, ?, ?)",
		int64(rev), nanos(p.AppliedAt), p.By, p.Comment); err != nil {
		return 0, err
	}
	for i, f := range p.Files {
		data := f.Data
		if data == nil {
			data = []byte{} // nil would be NULL
		}
		if err := t.put("write policy", "INSERT INTO policy_files (revision, position, name, data) VALUES (?, ?, ?, ?)", int64(rev), int64(i), f.Name, data); err != nil {
			return 0, err
		}
	}
	return rev, nil
}

// PolicyRevision is the newest, 0 when none was applied.
func (t *tx) PolicyRevision() (uint64, error) {
	n, err := one(t, "read policy revision", scanInt, "SELECT COALESCE(MAX(revision), 0) FROM policies")
	return uint64(n), err
}

func scanPolicy(s scanner) (p Policy, err error) {
	var rev, at int64
	err = s.Scan(&rev, &at, &p.By, &p.Comment)
	p.Revision, p.AppliedAt = uint64(rev), fromNanos(at)
	return p, err
}

// Policy reads one with its files.
func (t *tx) Policy(revision uint64) (Policy, error) {
	what := fmt.Sprintf("read policy %d", revision)
	p, err := one(t, what, scanPolicy, "SELECT revision, applied_at, applied_by, comment FROM policies WHERE revision = ?", int64(revision))
	if err != nil {
		return p, err
	}
	p.Files, err = all(t, what, func(s scanner) (f SourceFile, err error) {
		err = s.Scan(&f.Name, &f.Data)
		return f, err
	}, "SELECT name, data FROM policy_files WHERE revision = ? ORDER BY position", int64(revision))
	return p, err
}

// Policies lists them without files, newest first.
func (t *tx) Policies() ([]Policy, error) {
	return all(t, "list policies", scanPolicy, "SELECT revision, applied_at, applied_by, comment FROM policies ORDER BY revision DESC")
}

// PutRevocation writes a tombstone; the first time stays.
func (t *tx) PutRevocation(r Revocation) error {
	return t.put("write revocation", `INSERT INTO revocations (kind, subject, node, time, made_by, revision) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT (kind, subject, node) DO NOTHING`, r.Kind, r.Subject, r.Node, nanos(r.Time), r.By, int64(t.revision))
}

// DeleteRevocation forgets one. Deleting what is not there is success.
func (t *tx) DeleteRevocation(kind, subject, node string) error {
	return t.put("delete revocation", "DELETE FROM revocations WHERE kind = ? AND subject = ? AND node = ?", kind, subject, node)
}

// Revocations lists them all.
func (t *tx) Revocations() ([]Revocation, error) {
	return all(t, "list revocations", func(s scanner) (r Revocation, err error) {
		var at, rev int64
		err = s.Scan(&r.Kind, &r.Subject, &r.Node, &at, &r.By, &rev)
		r.Time, r.Revision = fromNanos(at), uint64(rev)
		return r, err
	}, "SELECT kind, subject, node, time, made_by, revision FROM revocations ORDER BY kind, subject, node")
}

// PutAuthority writes a signing key; its slot changes later, and its sealed bytes, which retiring wipes. Two in one slot, retired apart, are ErrDuplicate.
func (t *tx) PutAuthority(a Authority) error {
	return t.put("write authority", `INSERT INTO authorities (kind, serial, slot, cert, sealed, created, not_after) VALUES (?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (kind, serial) DO UPDATE SET slot = excluded.slot, sealed = excluded.sealed`, a.Kind, a.Serial, a.Slot, a.Cert, a.Sealed, nanos(a.Created), nanos(a.NotAfter))
}

// Authorities lists them, oldest first.
func (t *tx) Authorities() ([]Authority, error) {
	return all(t, "list authorities", func(s scanner) (a Authority, err error) {
		var created, notAfter int64
		err = s.Scan(&a.Kind, &a.Serial, &a.Slot, &a.Cert, &a.Sealed, &created, &notAfter)
		a.Created, a.NotAfter = fromNanos(created), fromNanos(notAfter)
		return a, err
	}, "SELECT kind, serial, slot, cert, sealed, created, not_after FROM authorities ORDER BY created, kind, serial")
}

// chainHead reads the hash of the last line of a log, and checks that no line is missing at the end: the counter, in
// another table, says how many there were.
func (t *tx) chainHead(c Counter, query string) (seq uint64, prev [32]byte, err error) {
	if seq, err = t.Next(c); err != nil || seq == 1 {
		return seq, prev, err
	}
	hash, err := one(t, "read head of "+string(c)+" log", func(s scanner) (b []byte, err error) {
		err = s.Scan(&b)
		return b, err
	}, query, int64(seq-1))
	if err != nil {
		return 0, prev, fmt.Errorf("%w: the %s log lacks line %d: %w", ErrTampered, c, seq-1, err)
	}
	return seq, fixed[[32]byte](hash), nil
}

// AppendIssuance adds a line to the issuance log.
func (t *tx) AppendIssuance(i Issuance) (_ Issuance, err error) {
	if i.Seq, i.Prev, err = t.chainHead(CounterIssuance, "SELECT hash FROM issuance WHERE seq = ?"); err != nil {
		return Issuance{}, err
	}
	i.NotAfter, i.Time = i.NotAfter.UTC(), i.Time.UTC()
	i.Hash = i.computeHash()
	return i, t.put("append to issuance log", "INSERT INTO issuance (seq, prev, hash, serial, id, spki, not_after, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
		int64(i.Seq), i.Prev[:], i.Hash[:], i.Serial, i.ID, i.SPKI[:], nanos(i.NotAfter), nanos(i.Time))
}

// Issuances lists lines in order.
func (t *tx) Issuances(after uint64, limit int) ([]Issuance, error) {
	return all(t, "list issuance log", func(s scanner) (i Issuance, err error) {
		var prev, hash, spki []byte
		var seq, notAfter, at int64
		err = s.Scan(&seq, &prev, &hash, &i.Serial, &i.ID, &spki, &notAfter, &at)
		i.Seq, i.Prev, i.Hash, i.SPKI = uint64(seq), fixed[[32]byte](prev), fixed[[32]byte](hash), fixed[[32]byte](spki)
		i.NotAfter, i.Time = fromNanos(notAfter), fromNanos(at)
		return i, err
	}, "SELECT seq, prev, hash, serial, id, spki, not_after, time FROM issuance WHERE seq > ? ORDER BY seq LIMIT ?", int64(after), limit)
}

// AppendAudit adds a line to the audit log.
func (t *tx) AppendAudit(a Audit) (_ Audit, err error) {
	if a.Seq, a.Prev, err = t.chainHead(CounterAudit, "SELECT hash FROM audit WHERE seq = ?"); err != nil {
		return Audit{}, err
	}
	a.Time = a.Time.UTC()
	a.Hash = a.computeHash()
	return a, t.put("append to audit log", "INSERT INTO audit (seq, prev, hash, time, who, what, object, outcome, detail) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
		int64(a.Seq), a.Prev[:], a.Hash[:], nanos(a.Time), a.Who, a.What, a.Object, a.Outcome, a.Detail)
}

// Audits lists lines in order.
func (t *tx) Audits(after uint64, limit int) ([]Audit, error) {
	return all(t, "list audit log", func(s scanner) (a Audit, err error) {
		var prev, hash []byte
		var seq, at int64
		err = s.Scan(&seq, &prev, &hash, &at, &a.Who, &a.What, &a.Object, &a.Outcome, &a.Detail)
		a.Seq, a.Prev, a.Hash, a.Time = uint64(seq), fixed[[32]byte](prev), fixed[[32]byte](hash), fromNanos(at)
		return a, err
	}, "SELECT seq, prev, hash, time, who, what, object, outcome, detail FROM audit WHERE seq > ? ORDER BY seq LIMIT ?", int64(after), limit)
}
