package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// FileName is the database's name in the data folder.
const FileName = "signet.db"

const (
	readers       = 4    // views that run at once; more wait
	maxBatch      = 256  // updates that share one disk write; more wait for the next
	busyTimeoutMS = 5000 // only a backup tool can hold a lock, since the lock file keeps other coordinators out
)

// SQLite is a Store in one file, in WAL mode with a full sync at each commit.
type SQLite struct {
	path     string
	db       *sql.DB
	lock     *os.File
	requests chan *update
	views    chan *session
	revision atomic.Uint64

	closeOnce sync.Once
	closing   chan struct{}
	done      chan struct{} // closed when the writer has ended
	closeErr  error
}

var _ Store = (*SQLite)(nil)

// OpenSQLite opens the database in a folder, or makes both. The folder gets mode 0700 and the files 0600; a folder that
// others may write to is refused, because they could put another database in its place.
func OpenSQLite(ctx context.Context, dir string) (_ *SQLite, err error) {
	if err := prepareFolder(dir); err != nil {
		return nil, err
	}
	s := &SQLite{
		path:     filepath.Join(dir, FileName),
		requests: make(chan *update),
		views:    make(chan *session, readers),
		closing:  make(chan struct{}),
		done:     make(chan struct{}),
	}
	if s.lock, err = lockFile(s.path + ".lock"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.release()
		}
	}()
	if err := createFile(s.path); err != nil {
		return nil, err
	}
	if s.db, err = sql.Open("sqlite", dsn(s.path)); err != nil {
		return nil, fmt.Errorf("open database %s: %w", s.path, err)
	}
	if err := s.check(ctx); err != nil {
		return nil, err
	}
	if err := migrate(ctx, s.db); err != nil {
		return nil, fmt.Errorf("open database %s: %w", s.path, s.mapError(err))
	}
	writer, err := s.openSessions(ctx)
	if err != nil {
		return nil, err
	}
	go s.routineWriter(writer)
	return s, nil
}

// check reads the whole file's structure, so that damage is named at start instead of in the middle of an enrolment.
func (s *SQLite) check(ctx context.Context) error {
	var verdict string
	if err := s.db.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&verdict); err != nil {
		return fmt.Errorf("check database: %w", s.mapError(err))
	}
	if verdict != "ok" {
		return fmt.Errorf("check database: %w: %s: %s", ErrCorrupt, s.path, verdict)
	}
	return nil
}

func (s *SQLite) openSessions(ctx context.Context) (*session, error) {
	for range readers {
		v, err := s.newSession(ctx, "PRAGMA query_only = 1")
		if err != nil {
			return nil, err
		}
		s.views <- v
	}
	w, err := s.newSession(ctx, "PRAGMA query_only = 0")
	if err != nil {
		return nil, err
	}
	rev, err := w.readRevision()
	if err != nil {
		return nil, fmt.Errorf("read store revision: %w", s.mapError(err))
	}
	s.revision.Store(rev)
	return w, nil
}

func (s *SQLite) newSession(ctx context.Context, setup string) (*session, error) {
	conn, err := s.db.Conn(ctx)
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", s.path, s.mapError(err))
	}
	if _, err := conn.ExecContext(ctx, setup); err != nil {
		return nil, fmt.Errorf("open database %s: %w", s.path, s.mapError(err))
	}
	return &session{conn: conn, stmts: map[string]*sql.Stmt{}, mapError: s.mapError}, nil
}

// Revision is the last durable one.
func (s *SQLite) Revision() uint64 { return s.revision.Load() }

// View runs fn in a read transaction: it sees one revision throughout.
func (s *SQLite) View(ctx context.Context, fn func(Tx) error) (err error) {
	var v *session
	select {
	case v = <-s.views:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.closing:
		return ErrClosed
	}
	defer func() { s.views <- v }()
	if err := v.exec("BEGIN"); err != nil {
		return fmt.Errorf("begin view: %w", err)
	}
	t := &tx{s: v, readOnly: true}
	defer func() {
		t.ended = true
		// Nothing was written; an error here could only repeat the one that fn saw.
		_ = v.exec("ROLLBACK")
	}()
	if t.revision, err = v.readRevision(); err != nil {
		return fmt.Errorf("begin view: %w", err)
	}
	return fn(t)
}

// Close ends the writer after the batch at hand, waits for views, and releases the file. Waiting updates get ErrClosed.
func (s *SQLite) Close() error {
	s.closeOnce.Do(func() {
		close(s.closing)
		<-s.done
		for range readers {
			v := <-s.views
			s.closeErr = errors.Join(s.closeErr, v.close())
		}
		s.closeErr = errors.Join(s.closeErr, s.release())
	})
	return s.closeErr
}

func (s *SQLite) release() error {
	var err error
	if s.db != nil {
		err = s.db.Close()
	}
	return errors.Join(err, s.lock.Close())
}

// mapError names what callers must tell apart.
func (s *SQLite) mapError(err error) error {
	var se *sqlite.Error
	if !errors.As(err, &se) {
		return err
	}
	switch se.Code() {
	case sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
		return fmt.Errorf("%w: %w", ErrDuplicate, err)
	}
	switch se.Code() & 0xff { // the low byte is the primary code
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return fmt.Errorf("%w: %s: restore it from a backup: %w", ErrCorrupt, s.path, err)
	case sqlite3.SQLITE_READONLY:
		return fmt.Errorf("%w: %w", ErrReadOnly, err)
	}
	return err
}

func dsn(path string) string {
	q := url.Values{"_pragma": {
		fmt.Sprintf("busy_timeout(%d)", busyTimeoutMS),
		"journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)", "trusted_schema(0)", "journal_size_limit(67108864)",
	}}
	return (&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String()
}

func prepareFolder(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make data folder: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("open data folder: %w", err)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("data folder %s has mode %v, so that others may write to it: run chmod 700 %s", dir, info.Mode().Perm(), dir)
	}
	return nil
}

// createFile makes the file with its mode before SQLite does; the WAL and shared-memory files inherit the mode.
func createFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open database: %w", err)
	}
	defer f.Close()
	if err := f.Chmod(0o600); err != nil {
		return fmt.Errorf("open database: %w", err)
	}
	return nil
}

// lockFile keeps a second coordinator out. The kernel drops the lock with the process, however that ends.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s: is signet-coordinator running already?", ErrLocked, path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// Exists reports whether a folder holds a database.
func Exists(dir string) (bool, error) {
	info, err := os.Stat(filepath.Join(dir, FileName))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for database: %w", err)
	}
	return info.Size() > 0, nil
}
