package store

import (
	"errors"
	"fmt"
	"time"
)

// Meta reads the store's description.
func (t *tx) Meta() (Meta, error) {
	return one(t, "read meta", func(s scanner) (m Meta, err error) {
		var lease, created int64
		err = s.Scan(&m.TrustDomain, &m.Incarnation, &m.Overlay4, &m.Overlay6, &lease, &created)
		m.Lease, m.Created = time.Duration(lease), fromNanos(created)
		return m, err
	}, "SELECT trust_domain, incarnation, overlay4, overlay6, lease, created FROM meta WHERE one = 1")
}

// SetMeta writes it.
func (t *tx) SetMeta(m Meta) error {
	return t.put("write meta", `INSERT INTO meta (one, trust_domain, incarnation, overlay4, overlay6, lease, created)
		VALUES (1, ?, ?, ?, ?, ?, ?) ON CONFLICT (one) DO UPDATE SET trust_domain = excluded.trust_domain,
		incarnation = excluded.incarnation, overlay4 = excluded.overlay4, overlay6 = excluded.overlay6,
		lease = excluded.lease, created = excluded.created`,
		m.TrustDomain, int64(m.Incarnation), m.Overlay4, m.Overlay6, int64(m.Lease), nanos(m.Created))
}

// Peek reads a counter.
func (t *tx) Peek(c Counter) (uint64, error) {
	n, err := one(t, "read counter "+string(c), scanInt, "SELECT value FROM counters WHERE name = ?", string(c))
	return uint64(n), err
}

// Next takes a value.
func (t *tx) Next(c Counter) (uint64, error) {
	n, err := t.Peek(c)
	if err != nil {
		return 0, err
	}
	return n, t.setCounter(c, n+1)
}

// Advance skips values, as after a restore.
func (t *tx) Advance(c Counter, next uint64) (uint64, error) {
	n, err := t.Peek(c)
	if err != nil || n >= next {
		return n, err
	}
	return next, t.setCounter(c, next)
}

// SetCursor moves the search for a free IPv4 address.
func (t *tx) SetCursor(next uint64) error { return t.setCounter(CounterCursor4, next) }

func (t *tx) setCounter(c Counter, next uint64) error {
	return t.put("write counter "+string(c), "UPDATE counters SET value = ? WHERE name = ?", int64(next), string(c))
}

// maxNumber leaves the highest value free, so that "above every number" can be said in 32 bits.
const maxNumber = 1<<32 - 2

// NumberFor gives an ID its Number.
func (t *tx) NumberFor(id string) (uint32, error) {
	return t.numberFor(CounterNumber, id, "SELECT number FROM numbers WHERE id = ?", "INSERT INTO numbers (id, number) VALUES (?, ?)")
}

// RuleNumberFor gives a rule its number.
func (t *tx) RuleNumberFor(rule string) (uint32, error) {
	return t.numberFor(CounterRule, rule, "SELECT number FROM rule_numbers WHERE rule = ?", "INSERT INTO rule_numbers (rule, number) VALUES (?, ?)")
}

func (t *tx) numberFor(c Counter, name, find, insert string) (uint32, error) {
	n, err := one(t, "read "+string(c), scanInt, find, name)
	if err == nil || !errors.Is(err, ErrNotFound) {
		return uint32(n), err
	}
	next, err := t.Next(c)
	if err != nil {
		return 0, err
	}
	if next > maxNumber {
		return 0, fmt.Errorf("give %s a %s: all %d are taken", name, c, uint64(maxNumber))
	}
	return uint32(next), t.put("write "+string(c), insert, name, int64(next))
}

// Numbers lists IDs with their Numbers.
func (t *tx) Numbers(above uint32) (map[string]uint32, error) {
	return t.numbers("SELECT id, number FROM numbers WHERE number > ?", above)
}

// RuleNumbers lists rules with their numbers.
func (t *tx) RuleNumbers(above uint32) (map[string]uint32, error) {
	return t.numbers("SELECT rule, number FROM rule_numbers WHERE number > ?", above)
}

func (t *tx) numbers(query string, above uint32) (map[string]uint32, error) {
	type pair struct {
		name   string
		number int64
	}
	pairs, err := all(t, "list numbers", func(s scanner) (p pair, err error) {
		err = s.Scan(&p.name, &p.number)
		return p, err
	}, query, int64(above))
	if err != nil {
		return nil, err
	}
	out := make(map[string]uint32, len(pairs))
	for _, p := range pairs {
		out[p.name] = uint32(p.number)
	}
	return out, nil
}
