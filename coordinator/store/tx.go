package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"
)

// session is one connection with its prepared statements.
type session struct {
	conn     *sql.Conn
	stmts    map[string]*sql.Stmt
	mapError func(error) error
}

// exec runs statements without arguments or results, such as BEGIN.
func (s *session) exec(statements string) error {
	_, err := s.conn.ExecContext(context.Background(), statements)
	return s.mapError(err)
}

// prepare caches: the set of statements is the fixed one of this package.
func (s *session) prepare(query string) (*sql.Stmt, error) {
	if st, ok := s.stmts[query]; ok {
		return st, nil
	}
	st, err := s.conn.PrepareContext(context.Background(), query)
	if err != nil {
		return nil, s.mapError(err)
	}
	s.stmts[query] = st
	return st, nil
}

func (s *session) readRevision() (uint64, error) {
	st, err := s.prepare("SELECT value FROM revision WHERE one = 1")
	if err != nil {
		return 0, err
	}
	var rev int64
	if err := st.QueryRow().Scan(&rev); err != nil {
		return 0, s.mapError(err)
	}
	return uint64(rev), nil
}

func (s *session) writeRevision(rev uint64) error {
	st, err := s.prepare("UPDATE revision SET value = ? WHERE one = 1")
	if err != nil {
		return err
	}
	_, err = st.Exec(int64(rev))
	return s.mapError(err)
}

func (s *session) close() error {
	for _, st := range s.stmts {
		st.Close()
	}
	return s.conn.Close()
}

// tx is the one implementation of Tx. Its statements are plain SQL that PostgreSQL reads too, but for the placeholders.
type tx struct {
	s        *session
	revision uint64
	readOnly bool
	ended    bool
}

var _ Tx = (*tx)(nil)

// Revision is that of the state read, or the one that this transaction will have.
func (t *tx) Revision() uint64 { return t.revision }

var errEnded = errors.New("internal error: a transaction was used after its function returned")

// write runs one changing statement and returns how many rows it changed.
func (t *tx) write(what, query string, args ...any) (int64, error) {
	if t.ended {
		return 0, errEnded
	}
	if t.readOnly {
		return 0, fmt.Errorf("%s: %w", what, ErrReadOnly)
	}
	st, err := t.s.prepare(query)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	res, err := st.Exec(args...)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, t.s.mapError(err))
	}
	n, err := res.RowsAffected()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	return n, nil
}

func (t *tx) put(what, query string, args ...any) error {
	_, err := t.write(what, query, args...)
	return err
}

type scanner interface{ Scan(...any) error }

// one reads one row, or ErrNotFound.
func one[T any](t *tx, what string, scan func(scanner) (T, error), query string, args ...any) (T, error) {
	var zero T
	if t.ended {
		return zero, errEnded
	}
	st, err := t.s.prepare(query)
	if err != nil {
		return zero, fmt.Errorf("%s: %w", what, err)
	}
	v, err := scan(st.QueryRow(args...))
	if errors.Is(err, sql.ErrNoRows) {
		return zero, fmt.Errorf("%s: %w", what, ErrNotFound)
	}
	if err != nil {
		return zero, fmt.Errorf("%s: %w", what, t.s.mapError(err))
	}
	return v, nil
}

// all reads every row.
func all[T any](t *tx, what string, scan func(scanner) (T, error), query string, args ...any) (_ []T, err error) {
	if t.ended {
		return nil, errEnded
	}
	st, err := t.s.prepare(query)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	rows, err := st.Query(args...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, t.s.mapError(err))
	}
	defer rows.Close()
	var out []T
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, t.s.mapError(err))
		}
		out = append(out, v)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", what, t.s.mapError(err))
	}
	return out, nil
}

func scanString(s scanner) (v string, err error) { err = s.Scan(&v); return }
func scanInt(s scanner) (v int64, err error)     { err = s.Scan(&v); return }

// nanos is the column form of a time.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// fromNanos reads it back, in UTC.
func fromNanos(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// fixed copies a column of fixed length; the schema guarantees the length.
func fixed[T [16]byte | [32]byte](b []byte) (v T) {
	switch p := any(&v).(type) {
	case *[16]byte:
		copy(p[:], b)
	case *[32]byte:
		copy(p[:], b)
	}
	return v
}
