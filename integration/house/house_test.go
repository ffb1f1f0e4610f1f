package house

import (
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/signet-overlay/signet/agent"
	"github.com/signet-overlay/signet/coordinator"
)

// tree is the repository, read once for all tests.
type tree struct {
	root  string
	names []string
	files []*goFile
	bad   []finding // Go files that do not parse
}

var readTree = sync.OnceValues(func() (*tree, error) {
	root, err := top()
	if err != nil {
		return nil, err
	}
	t := &tree{root: root}
	if t.names, err = listFiles(root); err != nil {
		return nil, err
	}
	for _, name := range t.names {
		if !strings.HasSuffix(name, ".go") || strings.Contains(name, "/testdata/") {
			continue
		}
		src, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return nil, err
		}
		f, err := parseGo(name, src)
		if err != nil {
			t.bad = append(t.bad, finding{file: name, reason: err.Error()})
			continue
		}
		t.files = append(t.files, f)
	}
	return t, nil
})

func loadTree(t *testing.T) *tree {
	t.Helper()
	tr, err := readTree()
	if err != nil {
		t.Fatal(err)
	}
	if len(tr.files) < 5 {
		t.Fatalf("found only %d Go files below %s", len(tr.files), tr.root)
	}
	return tr
}

func report(t *testing.T, all []finding) {
	t.Helper()
	for _, f := range all {
		t.Error(f)
	}
}

// eachFile runs a rule on the contents of every file that the filter takes and returns how many those were.
func (tr *tree) eachFile(t *testing.T, take func(string) bool, rule func(string, []byte) []finding) int {
	t.Helper()
	n := 0
	for _, name := range tr.names {
		if !take(name) {
			continue
		}
		data, err := os.ReadFile(filepath.Join(tr.root, name))
		if err != nil {
			t.Error(err)
			continue
		}
		n++
		report(t, rule(name, data))
	}
	return n
}

func TestImportRules(t *testing.T) {
	tr := loadTree(t)
	packages, err := listPackages(tr.root)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range checkImports(packages) {
		t.Error(f.locate(tr.files))
	}
}

func TestGoParses(t *testing.T) { report(t, loadTree(t).bad) }

func TestPackageDocs(t *testing.T) { report(t, checkPackageDocs(loadTree(t).files)) }

func TestSources(t *testing.T) {
	for _, rule := range []struct {
		name  string
		check func(*goFile) []finding
	}{
		{"exported docs", checkExportedDocs},
		{"no init", checkNoInit},
		{"no sleep in tests", checkNoSleep},
		{"sizes", checkSizes},
		{"wrapped errors", checkWrapped},
	} {
		t.Run(rule.name, func(t *testing.T) {
			for _, f := range loadTree(t).files {
				report(t, rule.check(f))
			}
		})
	}
}

func TestNoTraceOfAMachine(t *testing.T) {
	loadTree(t).eachFile(t, func(string) bool { return true }, checkTraces)
}

func TestLockfiles(t *testing.T) {
	loadTree(t).eachFile(t, func(name string) bool { return path.Base(name) == "package-lock.json" }, checkLockfile)
}

func TestBPFLicense(t *testing.T) {
	loadTree(t).eachFile(t, func(name string) bool { return strings.HasPrefix(name, "bpf/") && strings.HasSuffix(name, ".c") }, checkBPFLicense)
}

func TestDocPaths(t *testing.T) {
	tr := loadTree(t)
	known := map[string]bool{".": true}
	for _, name := range tr.names {
		for ; name != "." && !known[name]; name = path.Dir(name) {
			known[name] = true
		}
	}
	exists := func(name string) bool { return known[name] }
	n := tr.eachFile(t, isDoc, func(name string, data []byte) []finding { return checkDocPaths(name, data, exists) })
	if n == 0 {
		t.Error("no documentation to check")
	}
	for _, name := range []string{"README.md", "SECURITY.md", "LICENSE"} {
		if !known[name] {
			t.Errorf("%s: missing", name)
		}
	}
}

// exampleConfigs says how each annotated example is read. Whoever adds an example adds its reader, which may be of any
// package: integration may import all.
var exampleConfigs = []struct {
	glob string // as path.Match, from the top of the repository
	read func(name string, data []byte) error
}{
	{"deploy/examples/agent.yaml", func(name string, data []byte) error { _, err := agent.ParseConfig(name, data); return err }},
	{"deploy/examples/coordinator.yaml", func(name string, data []byte) error { _, err := coordinator.ParseConfig(name, data); return err }},
}

func TestExampleConfigsParse(t *testing.T) {
	tr := loadTree(t)
	used := make([]int, len(exampleConfigs))
	tr.eachFile(t, isExample, func(name string, data []byte) []finding {
		var out []finding
		matched := false
		for i, e := range exampleConfigs {
			if ok, err := path.Match(e.glob, name); err != nil || !ok {
				continue
			}
			matched = true
			used[i]++
			if err := e.read(name, data); err != nil {
				out = append(out, finding{file: name, reason: err.Error()})
			}
		}
		if !matched {
			out = append(out, finding{file: name, reason: "no row of exampleConfigs in integration/house reads this example"})
		}
		return out
	})
	for i, n := range used {
		if n == 0 {
			t.Errorf("exampleConfigs: %q matches no file", exampleConfigs[i].glob)
		}
	}
}

// isExample goes by the names that the products give their files.
func isExample(name string) bool {
	base := path.Base(name)
	if !strings.HasPrefix(name, "deploy/") || path.Ext(base) != ".yaml" {
		return false
	}
	for _, kind := range []string{"agent", "coordinator", "policy"} {
		if strings.HasPrefix(base, kind) {
			return true
		}
	}
	return false
}
