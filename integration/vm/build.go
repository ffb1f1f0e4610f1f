package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// Binary is the test binary of one package.
type Binary struct {
	Package string   // path below the module, for example "dataplane/enforce"
	Path    string   // of the binary
	Dir     string   // the package's sources; what a test may read of them comes along
	Args    []string // beside those that Run adds, for example "-test.short"
}

// Build makes static test binaries of packages of the module at root, given by their paths below it, and puts them into
// the directory out.
func Build(ctx context.Context, root, out string, packages ...string) ([]Binary, error) {
	made := make([]Binary, 0, len(packages))
	for _, p := range packages {
		b := Binary{Package: p, Path: filepath.Join(out, strings.ReplaceAll(p, "/", "-")+".test"), Dir: filepath.Join(root, p)}
		cmd := exec.CommandContext(ctx, "go", "test", "-c", "-ldflags=-s -w", "-o", b.Path, "./"+p)
		cmd.Dir = root
		cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
		if text, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build tests of %s: %w: %s", p, err, text)
		}
		// go test says nothing and writes nothing for a package without tests.
		if _, err := os.Stat(b.Path); errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("build tests of %s: the package has none", p)
		} else if err != nil {
			return nil, fmt.Errorf("build tests of %s: %w", p, err)
		}
		made = append(made, b)
	}
	return made, nil
}

// guestDir is where the package's directory is in the guest. Relative paths from one package to another hold there too.
func (b Binary) guestDir() string { return path.Join("/signet/src", b.Package) }

// sources lists the files that a test of the package may read, relative to its directory: all of the directory itself and
// of those below it that are not packages.
func (b Binary) sources() ([]string, error) {
	var out []string
	err := filepath.WalkDir(b.Dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return b.skipPackage(file)
		}
		if d.Type().IsRegular() {
			rel, err := filepath.Rel(b.Dir, file)
			if err != nil {
				return err
			}
			out = append(out, rel)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list sources of %s: %w", b.Package, err)
	}
	return out, nil
}

// skipPackage leaves out directories with Go files of their own. What is below testdata may hold such files and is never
// a package.
func (b Binary) skipPackage(dir string) error {
	below := strings.TrimPrefix(dir, b.Dir)
	if below == "" || slices.Contains(strings.Split(below, string(filepath.Separator)), "testdata") {
		return nil
	}
	found, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err == nil && len(found) > 0 {
		return fs.SkipDir
	}
	return err
}
