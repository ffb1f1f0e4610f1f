package house

import (
	"fmt"
	"strings"
	"testing"
)

// expect compares findings with the pieces of text that they should hold, in order.
func expect(t *testing.T, got []finding, want ...string) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("got %d findings, want %d:\n%v", len(got), len(want), got)
		return
	}
	for i, f := range got {
		if !strings.Contains(f.String(), want[i]) {
			t.Errorf("finding %d is %q, want %q in it", i, f, want[i])
		}
	}
}

func TestCheckImports(t *testing.T) {
	const m = module + "/"
	for _, c := range []struct {
		path  string
		imp   string // imported by the package
		test  string // imported by its tests
		wants string // "" for no finding
	}{
		{path: "cmd/signetd", imp: m + "agent"},
		{path: "cmd/signet/cli", imp: "github.com/spf13/cobra"},
		{path: "cmd/signetd", imp: m + "dataplane", wants: "cmd may import itself, agent"},
		{path: "agent/session", imp: m + "proto/codec"},
		{path: "agent/session", imp: m + "coordinator/store", wants: "agent may import"},
		{path: "coordinator", imp: m + "agent/session", wants: "coordinator may import"},
		{path: "coordinator", imp: m + "dataplane/link", wants: "coordinator may import"},
		{path: "dataplane", imp: m + "bpf"},
		{path: "dataplane", imp: m + "proto/signetv1", wants: "dataplane may import"},
		{path: "dataplane/link", imp: "google.golang.org/protobuf/proto", wants: "only proto/..."},
		{path: "bpf", imp: m + "dataplane", wants: "bpf may import"},
		{path: "proto/codec", imp: m + "internal/mesh"},
		{path: "proto/codec", imp: m + "agent", wants: "proto may import"},
		{path: "internal/mesh", imp: m + "internal/key"},
		{path: "internal/mesh", imp: "net/netip"},
		{path: "internal/mesh", imp: m + "proto/codec", wants: "internal may import itself"},
		{path: "internal/mesh", imp: "golang.org/x/sys/unix", wants: "standard library"},
		{path: "internal/policydoc", imp: "github.com/goccy/go-yaml/ast"},
		{path: "internal/policydoc", imp: "golang.org/x/sys/unix", wants: "standard library"},
		{path: "internal/mesh", test: "pgregory.net/rapid"},
		{path: "integration/scenario", imp: m + "agent"},
		{path: "integration/netlab", imp: "github.com/vishvananda/netlink"},
		{path: "integration/scenario", imp: "github.com/vishvananda/netlink", wants: "only dataplane/link"},
		{path: "dataplane/link", imp: "github.com/vishvananda/netlink"},
		{path: "dataplane/link/sub", imp: "github.com/vishvananda/netlink/nl", wants: "only dataplane/link"},
		{path: "agent", test: "github.com/cilium/ebpf", wants: "a test imports github.com/cilium/ebpf"},
		{path: "agent", test: m + "integration/netlab"},
		{path: "agent", test: m + "coordinator/store", wants: "meet only in integration"},
		{path: "coordinator", test: m + "agent", wants: "meet only in integration"},
		{path: "dataplane", test: m + "proto/codec", wants: "meet only in integration"},
		{path: "integration/scenario", test: m + "coordinator/store"},
		{path: "coordinator/store", imp: "modernc.org/sqlite"},
		{path: "coordinator/api", imp: "github.com/danielgtaylor/huma/v2/humatest"},
		{path: "coordinator/audit", imp: "github.com/danielgtaylor/huma/v2", wants: "only coordinator/api"},
		{path: "util", imp: "fmt", wants: `no import rule for the folder "util"`},
	} {
		p := goPackage{ImportPath: m + c.path}
		if c.imp != "" {
			p.Imports = []string{c.imp}
		}
		if c.test != "" {
			p.XTestImports = []string{c.test}
		}
		t.Run(c.path+" imports "+c.imp+c.test, func(t *testing.T) {
			var want []string
			if c.wants != "" {
				want = append(want, c.wants)
			}
			expect(t, checkImports([]goPackage{p}), want...)
		})
	}
}

func TestLocate(t *testing.T) {
	files := []*goFile{source(t, "a/b/x.go", "package b\nimport \"fmt\"\n"), source(t, "a/b/y.go", "package b\n\nimport x \"os\"\n")}
	for _, c := range []struct{ in, want string }{{"os", "a/b/y.go:3: r"}, {"io", "a/b: r"}, {"", "a/b: r"}} {
		if got := (finding{file: "a/b", reason: "r", imported: c.in}).locate(files).String(); got != c.want {
			t.Errorf("%q: %s, want %s", c.in, got, c.want)
		}
	}
}

func source(t *testing.T, name, text string) *goFile {
	t.Helper()
	f, err := parseGo(name, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestCheckPackageDocs(t *testing.T) {
	expect(t, checkPackageDocs([]*goFile{
		source(t, "a/a.go", "package a"), source(t, "a/doc.go", "// Package a is one.\npackage a"),
		source(t, "b/b.go", "\n\npackage b"), source(t, "b/b_test.go", "// Package b is a test.\npackage b"),
		source(t, "c/c_test.go", "package c"),
		source(t, "d/d.go", "//go:build linux\n\npackage d"),
	}), "b/b.go:3: package b has no package comment", "d/d.go:3")
}

func TestCheckExportedDocs(t *testing.T) {
	const text = `package a
func F() {}
// G is documented.
func G() {}
func h() {}
type T struct{}
func (T) M() {}
type u struct{}
func (*u) M() {}
type G2[X any] struct{} // documented
func (*G2[X]) M() {}
const (
	A = 1 // documented
	B = 2
)
// Group is documented.
const (
	C = 1
	D = 2
)
var e, E int
`
	expect(t, checkExportedDocs(source(t, "a.go", text)),
		"a.go:2: exported func F", "a.go:6: exported type T", "a.go:7: exported func M", "a.go:11: exported func M",
		"a.go:14: exported const B", "a.go:21: exported var E")
	expect(t, checkExportedDocs(source(t, "a_test.go", text)))
	expect(t, checkExportedDocs(source(t, "a.go", "// Code generated by x. DO NOT EDIT.\n\n"+text)))
}

func TestCheckNoInit(t *testing.T) {
	const text = "package a\nfunc init() {}\ntype t int\nfunc (t) init() {}\n"
	expect(t, checkNoInit(source(t, "a_test.go", text)), "a_test.go:2: func init")
	expect(t, checkNoInit(source(t, "a.go", "// Code generated by x. DO NOT EDIT.\n\n"+text)))
}

func TestCheckNoSleep(t *testing.T) {
	const text = "package a\nimport clock \"time\"\nfunc f() { clock.Sleep(1)\n g(clock.Sleep) }\ntype x struct{}\nvar time x\nfunc h() { time.Sleep() }\n"
	expect(t, checkNoSleep(source(t, "a_test.go", text)), "a_test.go:3: time.Sleep", "a_test.go:4: time.Sleep")
	expect(t, checkNoSleep(source(t, "a.go", text)))
}

func TestCheckSizes(t *testing.T) {
	long := func(comment string, n int) string {
		return comment + "func f() {\n" + strings.Repeat("\n", n-2) + "}\n"
	}
	for name, c := range map[string]struct{ text, want string }{
		"at the ceiling":  {"package a\n" + long("", maxFuncLines), ""},
		"long":            {"package a\n" + long("", maxFuncLines+1), "a.go:2: func f has 71 lines"},
		"allowed":         {"package a\n" + long("// f is long.\n//\n//house:allow-long a table of packets\n", maxFuncLines+1), ""},
		"without reason":  {"package a\n" + long("//house:allow-long \n", maxFuncLines+1), "a.go:3: func f"},
		"not above":       {"package a\n//house:allow-long reason\n\n" + long("", maxFuncLines+1), "func f"},
		"generated":       {"// Code generated by x. DO NOT EDIT.\n\npackage a\n" + long("", maxFuncLines+1), ""},
		"long file":       {"package a\n" + strings.Repeat("\n", maxFileLines), "a.go:1: 601 lines"},
		"allowed file":    {"//house:allow-long a case table\n\npackage a\n" + strings.Repeat("\n", maxFileLines), ""},
		"file, too late":  {"package a\n//house:allow-long reason\n" + strings.Repeat("\n", maxFileLines), "a.go:1:"},
		"file at ceiling": {"package a" + strings.Repeat("\n", maxFileLines-1), ""},
	} {
		t.Run(name, func(t *testing.T) {
			var want []string
			if c.want != "" {
				want = append(want, c.want)
			}
			expect(t, checkSizes(source(t, "a.go", c.text)), want...)
		})
	}
}

func TestCheckWrapped(t *testing.T) {
	const text = `package a
import "fmt"
func f(err, readErr error, e int) {
	fmt.Errorf("x: %w", err)
	fmt.Errorf("x: %v", err)
	fmt.Errorf("x: %s", err.Error())
	fmt.Errorf("x: " + "%v %d", e, readErr)
	fmt.Errorf("x %d", e)
	fmt.Errorf("x: %v", err) //house:allow-nowrap the cause is a secret
	//house:allow-nowrap the cause is a secret
	fmt.Errorf("x: %v", err)
	//house:allow-nowrap
	fmt.Errorf("x: %v", err)
	fmt.Sprintf("x: %v", err)
}
`
	expect(t, checkWrapped(source(t, "a.go", text)), "a.go:5: fmt.Errorf", "a.go:6: ", "a.go:7: ", "a.go:13: ")
	expect(t, checkWrapped(source(t, "a_test.go", text)))
}

func TestCheckTraces(t *testing.T) {
	dir := "/" + "work/"
	for text, want := range map[string]int{
		"export GOPROXY=https://proxy." + "golang.org": 1,
		"sum." + "golang.org and " + dir + "main":      2,
		"golang.org/x/sys":                             0,
		"registry." + "npmjs.org/x":                    1,
		"http://DEB." + "debian.org/debian":            1,
		"ftp.de." + "debian.org":                       1,
		"www.debian.org":                               0,
		"cd " + dir + "main":                           1,
		dir + "x":                                      1,
		"\"" + dir + "x\"":                             1,
		"frame" + dir + "x":                            0,
		"GET /api/v1/workloads":                        0,
		"\x00" + dir:                                   0,
	} {
		if got := checkTraces("f", []byte("ok\n"+text+"\n")); len(got) != want || want > 0 && got[0].line != 2 {
			t.Errorf("%q: %v, want %d", text, got, want)
		}
	}
}

func TestCheckLockfile(t *testing.T) {
	expect(t, checkLockfile("package-lock.json", []byte("{\n\"resolved\": \"x\"\n}")), "package-lock.json:2:")
	expect(t, checkLockfile("package-lock.json", []byte("{\n\"integrity\": \"x\"\n}")))
}

func TestCheckBPFLicense(t *testing.T) {
	expect(t, checkBPFLicense("bpf/a.c", []byte("int x;\nchar _license[] SEC(\"license\") = \"Dual BSD/GPL\";\n")))
	expect(t, checkBPFLicense("bpf/a.c", []byte("char LICENSE[] SEC(\"license\") = \"Dual BSD/GPL\";\n")))
	expect(t, checkBPFLicense("bpf/a.c", []byte("char _license[] SEC(\"license\") = \"GPL\";\n")), "bpf/a.c: no line")
	expect(t, checkBPFLicense("bpf/a.c", []byte("// char _license[] SEC(\"license\") = \"Dual BSD/GPL\";\n")), "bpf/a.c: no line")
}

func TestCheckDocPaths(t *testing.T) {
	there := map[string]bool{"docs": true, "docs/a.md": true, "agent/x.go": true, "internal/policy": true, "integration": true, "agent/DESIGN.md": true}
	for i, c := range []struct {
		name, text string
		want       []string
	}{
		{"docs/b.md", "[a](a.md) [b](a.md#part) [c](../agent/x.go) [d](https://x/y) [e](#part) [f](mailto:a@b) [g](/docs/a.md)", nil},
		{"docs/b.md", "[a](c.md)", []string{"docs/b.md:1: link to docs/c.md"}},
		{"docs/b.md", "x\n\n[a]: nowhere.md \"title\"", []string{"docs/b.md:3: link to docs/nowhere.md"}},
		{"docs/b.md", "`agent/x.go` `agent/x.go:12` `./agent/x.go` `internal/policy.Judge` `integration/...`", nil},
		{"docs/b.md", "`app/api-server` `tcp/5432` `-o json` `/etc/signet/agent.yaml` `signet down` `a.go` `bin/signet`", nil},
		{"docs/b.md", "`agent/y.go` and `docs/z`", []string{"names agent/y.go", "names docs/z"}},
		{"docs/b.md", "`other/y.go`", []string{"names other/y.go"}},
		{"agent/DESIGN.md", "`x.go` [x](x.go) [y](y.go)", []string{"link to agent/y.go"}},
		{"docs/b.md", "```\n[a](c.md) `agent/y.go`\n```\n[a](c.md)", []string{"docs/b.md:4:"}},
		{"docs/b.md", "`[a](c.md)` is how a link is written", nil},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			expect(t, checkDocPaths(c.name, []byte(c.text), func(p string) bool { return there[p] }), c.want...)
		})
	}
	for name, want := range map[string]bool{"README.md": true, "docs/a/b.md": true, "agent/DESIGN.md": true, "agent/notes.md": false, "docs/a.txt": false} {
		if isDoc(name) != want {
			t.Errorf("isDoc(%q) = %v", name, !want)
		}
	}
}
