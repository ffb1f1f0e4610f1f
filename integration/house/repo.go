package house

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// module is the import path of the repository.
const module = "github.com/signet-overlay/signet"

// finding is one place where a rule is broken. Line 0 means the file as a whole.
type finding struct {
	file   string // relative to the top of the repository
	line   int
	reason string

	imported string // for the import rules, which know packages only: what locate looks for
}

// locate turns a finding about a package into one about the first of its lines that has the import.
func (f finding) locate(files []*goFile) finding {
	if f.imported == "" {
		return f
	}
	for _, g := range files {
		if path.Dir(g.name) != f.file {
			continue
		}
		for _, spec := range g.ast.Imports {
			if spec.Path.Value == strconv.Quote(f.imported) {
				f.file, f.line = g.name, g.line(spec.Pos())
				return f
			}
		}
	}
	return f
}

func (f finding) String() string {
	if f.line == 0 {
		return f.file + ": " + f.reason
	}
	return fmt.Sprintf("%s:%d: %s", f.file, f.line, f.reason)
}

// goPackage is what the rules need of one line of "go list".
type goPackage struct {
	ImportPath   string
	Dir          string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

// path is the import path below the module: "agent/session", or "" for the module's own root.
func (p goPackage) path() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
}

// top finds the top of the repository.
func top() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("ask go for the module: %w", err)
	}
	mod := strings.TrimSpace(string(out))
	if mod == "" || mod == os.DevNull {
		return "", errors.New("not inside a module")
	}
	return filepath.Dir(mod), nil
}

// listPackages asks the go command, which also lists packages that do not compile.
func listPackages(root string) ([]goPackage, error) {
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w: %s", err, stderr.String())
	}
	var all []goPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("read go list: %w", err)
		}
		all = append(all, p)
	}
}

// listFiles names every file that is tracked or would be, relative to root. Outside a git checkout (an unpacked release)
// it is every file but build results.
func listFiles(root string) ([]string, error) {
	cmd := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		return walkFiles(root)
	}
	var files []string
	for name := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		// A file that was deleted and not yet committed is still listed.
		if info, err := os.Lstat(filepath.Join(root, name)); err == nil && info.Mode().IsRegular() {
			files = append(files, name)
		}
	}
	return files, nil
}

func walkFiles(root string) ([]string, error) {
	var files []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if base := d.Name(); name == "bin" || base == ".git" || base == "node_modules" {
				return filepath.SkipDir
			}
			return nil
		}
		if d.Type().IsRegular() {
			files = append(files, filepath.ToSlash(name))
		}
		return nil
	})
	return files, err
}
