package store

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
)

// ErrTampered is wrapped when a hash-chained log does not hold together.
var ErrTampered = errors.New("the log was changed after it was written")

// verifyPage bounds how much of a log is in memory at once.
const verifyPage = 1000

// Each line's hash covers the line before through Prev, so that no line can be changed, left out or put in between
// without every later hash changing. Fields are length-prefixed: moving a byte from one to the next changes the hash.

func (i Issuance) computeHash() [32]byte {
	h := newChainHash("signet-issuance-1", i.Seq, i.Prev)
	h.text(i.Serial)
	h.text(i.ID)
	h.bytes(i.SPKI[:])
	h.number(uint64(nanos(i.NotAfter)))
	h.number(uint64(nanos(i.Time)))
	return h.sum()
}

func (a Audit) computeHash() [32]byte {
	h := newChainHash("signet-audit-1", a.Seq, a.Prev)
	h.number(uint64(nanos(a.Time)))
	for _, s := range []string{a.Who, a.What, a.Object, a.Outcome, a.Detail} {
		h.text(s)
	}
	return h.sum()
}

type chainHash struct{ h hash.Hash }

func newChainHash(purpose string, seq uint64, prev [32]byte) chainHash {
	c := chainHash{sha256.New()}
	c.text(purpose)
	c.number(seq)
	c.bytes(prev[:])
	return c
}

// A hash's Write never fails.
func (c chainHash) number(n uint64) { _, _ = c.h.Write(binary.BigEndian.AppendUint64(nil, n)) }
func (c chainHash) bytes(b []byte)  { c.number(uint64(len(b))); _, _ = c.h.Write(b) }
func (c chainHash) text(s string)   { c.bytes([]byte(s)) }
func (c chainHash) sum() (s [32]byte) {
	c.h.Sum(s[:0])
	return s
}

// Head is the end of a log: how many lines it has and the hash of the last one. A copy kept elsewhere proves later that
// nothing before it was changed.
type Head struct {
	Lines uint64
	Hash  [32]byte
}

// VerifyAudit checks the whole audit log and returns its head.
func VerifyAudit(ctx context.Context, s Store) (head Head, err error) {
	err = s.View(ctx, func(t Tx) error {
		head, err = verifyChain(ctx, t, CounterAudit, t.Audits, func(a Audit) link { return link{a.Seq, a.Prev, a.Hash, a.computeHash()} })
		return err
	})
	return head, err
}

// VerifyIssuance checks the whole issuance log and returns its head.
func VerifyIssuance(ctx context.Context, s Store) (head Head, err error) {
	err = s.View(ctx, func(t Tx) error {
		head, err = verifyChain(ctx, t, CounterIssuance, t.Issuances, func(i Issuance) link { return link{i.Seq, i.Prev, i.Hash, i.computeHash()} })
		return err
	})
	return head, err
}

type link struct {
	seq                  uint64
	prev, hash, computed [32]byte
}

func verifyChain[T any](ctx context.Context, t Tx, c Counter, page func(uint64, int) ([]T, error), linkOf func(T) link) (Head, error) {
	var head Head
	for {
		if err := ctx.Err(); err != nil {
			return Head{}, err
		}
		lines, err := page(head.Lines, verifyPage)
		if err != nil {
			return Head{}, err
		}
		for _, line := range lines {
			l := linkOf(line)
			if l.seq != head.Lines+1 || l.prev != head.Hash || l.hash != l.computed {
				return head, fmt.Errorf("%w: the %s log breaks at line %d", ErrTampered, c, head.Lines+1)
			}
			head = Head{Lines: l.seq, Hash: l.hash}
		}
		if len(lines) < verifyPage {
			break
		}
	}
	next, err := t.Peek(c)
	if err != nil {
		return head, err
	}
	if next != head.Lines+1 {
		return head, fmt.Errorf("%w: the %s log has %d lines, %d were written", ErrTampered, c, head.Lines, next-1)
	}
	return head, nil
}
