// Package state keeps what an agent must remember: who it is, the last snapshot, where peers were reached, and whether
// it was told to be down.
//
// Every file is sealed with the key of key_file under its own name, and written whole or not at all. What cannot be
// read exactly as it was written is refused with an error that names the file and the remedy: a new identity is never
// made in silence, and a snapshot is only bytes here (proto/codec verifies it).
//
// Start at Open; the identity's form is in identity.go.
package state

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/internal/key"
)

// ErrBroken is wrapped by every refusal of what is on disk.
var ErrBroken = errors.New("state cannot be used")

// ErrNone is returned where nothing was saved yet.
var ErrNone = errors.New("nothing saved yet")

// The files of a state directory. The names are also what they are sealed under.
const (
	fileIdentity = "identity"
	fileSnapshot = "snapshot"
	fileHints    = "endpoints"
	fileSwitch   = "switch"
	fileLock     = "lock"
	tmpSuffix    = ".tmp"
)

// maxFile bounds one sealed file: the largest snapshot with room to spare.
const maxFile = 512 << 20

// Problem is a refusal: which file, what is wrong with it, and what to do.
type Problem struct {
	File    string
	Problem string
	Remedy  string
	cause   error
}

// Error is one plain sentence and the remedy.
func (p *Problem) Error() string { return p.File + " " + p.Problem + ": " + p.Remedy }

// Unwrap gives ErrBroken and the cause.
func (p *Problem) Unwrap() []error {
	if p.cause == nil {
		return []error{ErrBroken}
	}
	return []error{ErrBroken, p.cause}
}

// Dir is an agent's state directory. One process holds it at a time.
type Dir struct {
	path string
	key  key.StateKey
	lock *os.File
}

// Open takes the state directory, and makes it and the key file where this is a first start.
func Open(path, keyFile string) (*Dir, error) {
	if err := checkDir(path); err != nil {
		return nil, err
	}
	lock, err := takeLock(filepath.Join(path, fileLock))
	if err != nil {
		return nil, err
	}
	d := &Dir{path: path, lock: lock}
	if d.key, err = d.loadKey(keyFile); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	for _, name := range []string{fileIdentity, fileSnapshot, fileHints, fileSwitch} {
		// A leftover of a write that a crash cut short. What it was to replace is still whole.
		if err := os.Remove(d.file(name) + tmpSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, errors.Join(fmt.Errorf("remove leftover of %s: %w", name, err), d.Close())
		}
	}
	return d, nil
}

// Close lets another process take the directory.
func (d *Dir) Close() error {
	if err := d.lock.Close(); err != nil {
		return fmt.Errorf("release state directory: %w", err)
	}
	return nil
}

// Path is the directory.
func (d *Dir) Path() string { return d.path }

// LoadSnapshot returns the bytes that SaveSnapshot got, ErrNone, or a Problem.
func (d *Dir) LoadSnapshot() ([]byte, error) {
	return d.load(fileSnapshot, "the agent denies everything until the coordinator has sent a new one")
}

// SaveSnapshot keeps a snapshot. When it returns, a crash does not lose it.
func (d *Dir) SaveSnapshot(b []byte) error { return d.save(fileSnapshot, b) }

// checkDir makes the directory or refuses one that others could have prepared or can look into.
func checkDir(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
		if err := os.Mkdir(path, 0o700); err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
		info, err = os.Lstat(path)
	}
	if err != nil {
		return fmt.Errorf("look at state directory: %w", err)
	}
	bad := func(problem, remedy string) error {
		return &Problem{File: "state directory " + path, Problem: problem, Remedy: remedy}
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		return bad("is a symbolic link", "set state_dir to the directory itself")
	case !info.IsDir():
		return bad("is not a directory", "move it away")
	case owner(info) != os.Geteuid():
		return bad(fmt.Sprintf("belongs to uid %d", owner(info)), fmt.Sprintf("run chown -R %d %s, if nobody else could write there", os.Geteuid(), path))
	case info.Mode().Perm()&0o077 != 0:
		return bad(fmt.Sprintf("has mode %04o, others could look into it", info.Mode().Perm()), "run chmod 700 "+path)
	}
	return nil
}

func owner(info fs.FileInfo) int {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}

func takeLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock of state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, &Problem{File: "state directory " + filepath.Dir(path), Problem: "is in use by another signetd",
			Remedy: "stop that one, or give this one its own state_dir", cause: err}
	}
	return f, nil
}

// loadKey makes a key only where nothing was ever sealed: a new key beside old state would only hide what was lost.
func (d *Dir) loadKey(keyFile string) (key.StateKey, error) {
	k, err := key.LoadStateKey(keyFile)
	if !errors.Is(err, fs.ErrNotExist) {
		if err != nil {
			return k, &Problem{File: "key file " + keyFile, Problem: "cannot be used (" + err.Error() + ")", Remedy: "restore it from a backup, or correct its mode and owner", cause: err}
		}
		return k, nil
	}
	for _, name := range []string{fileIdentity, fileSnapshot} {
		if _, err := os.Lstat(d.file(name)); err == nil {
			return k, &Problem{File: "key file " + keyFile, Problem: "is missing, and " + d.file(name) + " was sealed with it",
				Remedy: "restore the key file, or " + d.anew()}
		}
	}
	if k, err = key.LoadOrCreateStateKey(keyFile); err != nil {
		return k, fmt.Errorf("make key file: %w", err)
	}
	return k, nil
}

func (d *Dir) anew() string {
	return "remove " + d.path + " and enrol this host again with a new join token"
}

func (d *Dir) file(name string) string { return filepath.Join(d.path, name) }

// load reads and opens one sealed file.
func (d *Dir) load(name, remedy string) ([]byte, error) {
	path := d.file(name)
	bad := func(problem string, cause error) error {
		return &Problem{File: path, Problem: problem, Remedy: remedy, cause: cause}
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, ErrNone
	case errors.Is(err, unix.ELOOP):
		return nil, bad("is a symbolic link", err)
	case err != nil:
		return nil, bad("cannot be opened", err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, bad("cannot be read", err)
	case !info.Mode().IsRegular():
		return nil, bad("is not a regular file", nil)
	case owner(info) != os.Geteuid():
		return nil, bad(fmt.Sprintf("belongs to uid %d, not to %d", owner(info), os.Geteuid()), nil)
	case info.Mode().Perm()&0o077 != 0:
		return nil, bad(fmt.Sprintf("has mode %04o, others could have read or written it", info.Mode().Perm()), nil)
	case info.Size() == 0:
		return nil, bad("is empty", nil)
	case info.Size() > maxFile:
		return nil, bad("is too large", nil)
	}
	sealed, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, bad("cannot be read", err)
	}
	plain, err := d.key.Open(name, sealed)
	if err != nil {
		return nil, bad("was changed, was cut short, or was sealed with another key", err)
	}
	return plain, nil
}

// save replaces one file: a reader sees the old content or the new one, also after a crash.
func (d *Dir) save(name string, plain []byte) error {
	sealed, err := d.key.Seal(name, plain)
	if err != nil {
		return fmt.Errorf("save %s: %w", name, err)
	}
	tmp := d.file(name) + tmpSuffix
	if err := writeSynced(tmp, sealed); err != nil {
		return errors.Join(fmt.Errorf("save %s: %w", name, err), os.Remove(tmp))
	}
	if err := os.Rename(tmp, d.file(name)); err != nil {
		return errors.Join(fmt.Errorf("save %s: %w", name, err), os.Remove(tmp))
	}
	dir, err := os.Open(d.path)
	if err != nil {
		return fmt.Errorf("save %s: %w", name, err)
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return fmt.Errorf("save %s: %w", name, err)
	}
	return nil
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	_, werr := f.Write(b)
	if werr == nil {
		werr = f.Sync()
	}
	if err := errors.Join(werr, f.Close()); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}
