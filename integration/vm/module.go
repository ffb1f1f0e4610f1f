package vm

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// maxModules bounds the modules of one image; a kernel with all it may need for a host has below a hundred.
const maxModules = 500

// module is one kernel module, ready for insmod.
type module struct {
	name string
	data []byte // uncompressed
}

// modules is a kernel's modules by name.
type modules struct {
	files   map[string]string // name to path
	builtin map[string]bool   // in the kernel itself
}

// moduleName is the kernel's name of a module's file: without directory and endings, and with underscores, which tools
// and files do not tell apart from hyphens.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModules lists the modules of an unpacked kernel. The package has no list of dependencies: Debian makes it when the
// package is installed.
func readModules(dir string) (*modules, error) {
	m := &modules{files: map[string]string{}, builtin: map[string]bool{}}
	err := filepath.WalkDir(filepath.Join(dir, "kernel"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.Contains(d.Name(), ".ko") {
			m.files[moduleName(path)] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list kernel modules: %w", err)
	}
	list, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("list what is built into the kernel: %w", err)
	}
	for line := range strings.Lines(string(list)) {
		m.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	return m, nil
}

// load reads the wanted modules and all that they depend on, in an order in which each finds what it needs. What is
// built into the kernel needs no module.
func (m *modules) load(ctx context.Context, want []string) ([]module, error) {
	var out []module
	seen := map[string]bool{}
	var add func(name, because string) error
	add = func(name, because string) error {
		name = moduleName(name)
		if seen[name] || m.builtin[name] {
			return nil
		}
		// Marked before its dependencies, so that a circle ends.
		seen[name] = true
		if len(seen) > maxModules {
			return fmt.Errorf("more than %d kernel modules", maxModules)
		}
		path, ok := m.files[name]
		if !ok {
			return fmt.Errorf("kernel module %s%s is not in the package", name, because)
		}
		data, err := readModule(ctx, path)
		if err != nil {
			return fmt.Errorf("read kernel module %s: %w", name, err)
		}
		needs, err := dependencies(data)
		if err != nil {
			return fmt.Errorf("read kernel module %s: %w", name, err)
		}
		for _, n := range needs {
			if err := add(n, ", which "+name+" needs,"); err != nil {
				return err
			}
		}
		out = append(out, module{name: name, data: data})
		return nil
	}
	for _, name := range want {
		if err := add(name, ""); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// readModule returns a module's file as insmod wants it.
func readModule(ctx context.Context, path string) ([]byte, error) {
	switch filepath.Ext(path) {
	case ".ko":
		return os.ReadFile(path)
	case ".xz":
		return output(ctx, "", "xz", "-dc", path)
	case ".zst":
		return output(ctx, "", "zstd", "-dcq", path)
	}
	return nil, fmt.Errorf("%s: unknown compression", path)
}

// dependencies are the names after "depends=" in a module's section .modinfo, which holds texts that end with a zero
// byte.
func dependencies(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for text := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := bytes.CutPrefix(text, []byte("depends=")); ok {
			names := strings.Split(string(list), ",")
			return slices.DeleteFunc(names, func(n string) bool { return n == "" }), nil
		}
	}
	return nil, nil
}
