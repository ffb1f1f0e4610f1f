package vm

import (
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// File types of an archive entry, as in stat(2).
const (
	typeDir     = 0o040000
	typeRegular = 0o100000
	typeSymlink = 0o120000
)

// maxEntry is what the archive's eight hexadecimal digits can say, less than the format's limit so that an int holds it
// everywhere.
const maxEntry = 1<<31 - 1

// cpio writes the archive that the kernel unpacks into its first file system: format "newc" of
// Documentation/driver-api/early-userspace/buffer-format.rst. Everything in it belongs to root. Parent directories are
// added as they are needed; what is written twice is an error, since the kernel would silently keep the later one.
type cpio struct {
	w    io.Writer
	made map[string]bool
	ino  int
}

func newCpio(w io.Writer) *cpio { return &cpio{w: w, made: map[string]bool{".": true}} }

func (c *cpio) dir(name string) error {
	name = clean(name)
	if c.made[name] {
		return nil
	}
	return c.entry(name, typeDir|0o755, nil)
}

func (c *cpio) file(name string, perm uint32, data []byte) error {
	return c.entry(clean(name), typeRegular|perm, data)
}

func (c *cpio) symlink(name, target string) error {
	return c.entry(clean(name), typeSymlink|0o777, []byte(target))
}

// clean makes a name as the archive has it: relative to the root.
func clean(name string) string { return path.Clean(strings.TrimLeft(name, "/")) }

func (c *cpio) entry(name string, mode uint32, data []byte) error {
	if c.made[name] {
		return fmt.Errorf("archive: %s is there already", name)
	}
	if len(data) > maxEntry {
		return fmt.Errorf("archive: %s has %d bytes, more than the format can hold", name, len(data))
	}
	if err := c.dir(path.Dir(name)); err != nil {
		return err
	}
	c.made[name] = true
	c.ino++
	return c.record(name, mode, c.ino, data)
}

// close ends the archive.
func (c *cpio) close() error { return c.record("TRAILER!!!", 0, 0, nil) }

// record writes a header, the name and the data. The header has 110 bytes: a magic number and thirteen fields of eight
// digits. Name and data begin at multiples of four.
func (c *cpio) record(name string, mode uint32, ino int, data []byte) error {
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	head := header + name + "\x00"
	_, err1 := io.WriteString(c.w, head+padding(len(head)))
	_, err2 := c.w.Write(data)
	_, err3 := io.WriteString(c.w, padding(len(data)))
	if err := errors.Join(err1, err2, err3); err != nil {
		return fmt.Errorf("archive %s: %w", name, err)
	}
	return nil
}

func padding(n int) string { return "\x00\x00\x00"[:(4-n%4)%4] }
