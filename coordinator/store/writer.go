package store

import (
	"context"
	"errors"
	"fmt"
)

// Group commit. A full sync costs far more than a transaction's statements, so one writer runs the updates that wait
// one after another inside one SQL transaction, each in a savepoint with a revision of its own, and commits them
// together. The function itself runs in its caller's goroutine while the writer waits: a panic or runtime.Goexit in it
// ends the caller, never the writer.

// errAborted stands for a function that did not return.
var errAborted = errors.New("the update's function did not return")

// update is one call of Update on its way through the writer.
type update struct {
	turn   chan *tx     // the writer gives the transaction; closed when it could not begin
	result chan error   // what the function returned
	done   chan outcome // after the commit; buffered, so that a caller that panicked holds nobody up
}

type outcome struct {
	revision uint64
	err      error
}

// Update waits for its turn, runs fn, and returns when the commit is on disk.
func (s *SQLite) Update(ctx context.Context, fn func(Tx) error) (uint64, error) {
	u := &update{turn: make(chan *tx), result: make(chan error, 1), done: make(chan outcome, 1)}
	select {
	case s.requests <- u:
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-s.closing:
		return 0, ErrClosed
	}
	// From here on the context no longer counts: giving up now would leave the caller in doubt about the outcome.
	if t, ok := <-u.turn; ok {
		u.run(fn, t)
	}
	out := <-u.done
	return out.revision, out.err
}

func (u *update) run(fn func(Tx) error, t *tx) {
	err := errAborted
	defer func() {
		t.ended = true
		u.result <- err
	}()
	err = fn(t)
}

// routineWriter owns the writing session.
func (s *SQLite) routineWriter(w *session) {
	defer close(s.done)
	defer w.close()
	for {
		select {
		case u := <-s.requests:
			s.runBatch(w, u)
		case <-s.closing:
			return
		}
	}
}

// runBatch runs first and whatever else waits, and commits once.
func (s *SQLite) runBatch(w *session, first *update) {
	if err := w.exec("BEGIN IMMEDIATE"); err != nil {
		close(first.turn)
		first.done <- outcome{err: fmt.Errorf("begin transaction: %w", err)}
		return
	}
	b := batch{session: w, revision: s.revision.Load()}
	b.runOne(first)
	// An update that is taken from the channel must be run: nobody else would answer it. So the limit comes first.
	for size := 1; size < maxBatch && b.broken == nil; size++ {
		u := s.waiting()
		if u == nil {
			break
		}
		b.runOne(u)
	}
	err := b.finish()
	if err == nil {
		s.revision.Store(b.revision)
	}
	for _, p := range b.passed {
		if err != nil {
			p.outcome = outcome{err: err}
		}
		p.update.done <- p.outcome
	}
}

// waiting returns an update whose caller waits now, or nil. The channel is unbuffered: only a blocked sender is there.
func (s *SQLite) waiting() *update {
	select {
	case u := <-s.requests:
		return u
	default:
		return nil
	}
}

// batch is one SQL transaction.
type batch struct {
	session  *session
	revision uint64 // of the last update that passed
	passed   []passed
	broken   error // the SQL transaction itself is lost, for instance because the disk is full
}

type passed struct {
	update  *update
	outcome outcome
}

func (b *batch) runOne(u *update) {
	if err := b.session.exec("SAVEPOINT one"); err != nil {
		b.broken = err
		close(u.turn)
		u.done <- outcome{err: fmt.Errorf("begin transaction: %w", err)}
		return
	}
	t := &tx{s: b.session, revision: b.revision + 1}
	u.turn <- t
	err := <-u.result
	if err == nil {
		err = b.session.writeRevision(t.revision)
	}
	if err == nil {
		err = b.session.exec("RELEASE one")
	}
	if err == nil {
		b.revision = t.revision
		b.passed = append(b.passed, passed{u, outcome{revision: t.revision}})
		return
	}
	// SQLite rolls the whole transaction back by itself on some errors; then the savepoint is gone with it.
	if rerr := b.session.exec("ROLLBACK TO one; RELEASE one"); rerr != nil {
		b.broken = errors.Join(err, rerr)
	}
	u.done <- outcome{err: err}
}

// finish commits when something passed.
func (b *batch) finish() error {
	if b.broken == nil && len(b.passed) > 0 {
		err := b.session.exec("COMMIT")
		if err == nil {
			return nil
		}
		b.broken = err
	}
	// When SQLite has rolled back by itself this fails, and there is nothing left to undo.
	_ = b.session.exec("ROLLBACK")
	if b.broken != nil {
		return fmt.Errorf("commit: %w", b.broken)
	}
	return nil
}
