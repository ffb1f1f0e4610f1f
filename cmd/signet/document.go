package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// document is a policy document read from disk.
type document struct {
	files []apitypes.File
	local map[string]string // names that are sent to paths as the user knows them
}

// readDocument reads a file, every .yaml and .yml file below a directory, or standard input.
func (a *app) readDocument(path string) (document, error) {
	d := document{local: map[string]string{}}
	if path == "-" {
		data, err := io.ReadAll(io.LimitReader(a.env.In, apitypes.MaxBody+1))
		if err != nil {
			return d, fmt.Errorf("read standard input: %w", err)
		}
		return d, d.add("stdin.yaml", "standard input", data)
	}
	info, err := os.Stat(path)
	if err != nil {
		return d, fmt.Errorf("read policy: %w", err)
	}
	if !info.IsDir() {
		return d, d.read(filepath.Base(path), path)
	}
	err = filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		// Hidden entries are editors' and version control's, and the generations of mounted config maps.
		if p != path && strings.HasPrefix(e.Name(), ".") {
			if e.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		if ext := filepath.Ext(p); e.IsDir() || ext != ".yaml" && ext != ".yml" {
			return nil
		}
		rel, err := filepath.Rel(path, p)
		if err != nil {
			return err
		}
		return d.read(filepath.ToSlash(rel), p)
	})
	if err != nil {
		return d, fmt.Errorf("read policy: %w", err)
	}
	if len(d.files) == 0 {
		return d, withHint(fmt.Errorf("%s has no .yaml or .yml file", path), "name the directory that holds the documents")
	}
	return d, nil
}

func (d *document) read(name, path string) error {
	data, err := readBounded(path, apitypes.MaxBody)
	if err != nil {
		return fmt.Errorf("read policy: %w", err)
	}
	return d.add(name, path, data)
}

// add gives a file a name that every system takes; errors are shown under the path that the user knows.
func (d *document) add(name, path string, data []byte) error {
	plain := strings.Map(func(c rune) rune {
		if c <= ' ' || c > '~' || c == ':' || c == '\\' {
			return '_'
		}
		return c
	}, name)
	for n := 2; d.local[plain] != ""; n++ {
		plain = strconv.Itoa(n) + "-" + plain
	}
	if len(d.files) >= policydoc.MaxFiles {
		return fmt.Errorf("there are more than %d files", policydoc.MaxFiles)
	}
	d.local[plain] = path
	d.files = append(d.files, apitypes.File{Name: plain, Data: string(data)})
	return nil
}

// show puts the user's path in place of the name that was sent, at the start of a line.
func (d document) show(text string) string {
	best := ""
	for name := range d.local {
		if strings.HasPrefix(text, name+":") && len(name) > len(best) {
			best = name
		}
	}
	if best == "" {
		return text
	}
	return d.local[best] + strings.TrimPrefix(text, best)
}

// issues puts the user's paths into a list of faults.
func (d document) issues(list []apitypes.Issue) []apitypes.Issue {
	out := slices.Clone(list)
	for i := range out {
		out[i].Text = d.show(out[i].Text)
		if path, ok := d.local[out[i].File]; ok {
			out[i].File = path
		}
	}
	return out
}

// localised is err with the user's paths in its faults.
func (d document) localised(err error) error {
	var p *apitypes.Problem
	if !errors.As(err, &p) {
		return err
	}
	shown := *p
	shown.Errors = d.issues(p.Errors)
	return &shown
}

func (d document) sources() []policydoc.File {
	out := make([]policydoc.File, 0, len(d.files))
	for _, f := range d.files {
		out = append(out, policydoc.File{Name: f.Name, Data: []byte(f.Data)})
	}
	return out
}
