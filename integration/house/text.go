package house

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"
)

// trace is text that tells where a change was written or built, and not what it is.
type trace struct {
	pattern *regexp.Regexp
	what    string
}

// traces are put together from pieces so that this file does not match itself.
var traces = []trace{
	{host("proxy", "golang", "org"), "the host of a module proxy"},
	{host("sum", "golang", "org"), "the host of a checksum database"},
	{host("goproxy", "(io|cn)"), "the host of a module proxy"},
	{host("registry", "npmjs", "org"), "the host of a package registry"},
	{host("registry", "yarnpkg", "com"), "the host of a package registry"},
	{host("(deb|security|snapshot|ftp|cdn-aws)", "debian", "org"), "the host of a Debian mirror"},
	{host("ftp", "[a-z]{2}", "debian", "org"), "the host of a Debian mirror"},
	{regexp.MustCompile(`(^|[^A-Za-z0-9_.)}-])/(wo` + `rk|fa` + `rm)/`), "a path of one machine"},
}

func host(parts ...string) *regexp.Regexp {
	return regexp.MustCompile(`(?i)\b` + strings.Join(parts, `\.`) + `\b`)
}

// isText goes by what git goes by: no zero byte near the start.
func isText(data []byte) bool { return bytes.IndexByte(data[:min(len(data), 8000)], 0) < 0 }

// checkTraces refuses names of machines and registries in any text file.
func checkTraces(name string, data []byte) []finding {
	if !isText(data) {
		return nil
	}
	var out []finding
	n := 0
	for line := range bytes.Lines(data) {
		n++
		for _, t := range traces {
			if m := t.pattern.Find(line); m != nil {
				out = append(out, finding{file: name, line: n, reason: fmt.Sprintf("%q is %s", m, t.what)})
			}
		}
	}
	return out
}

// checkLockfile refuses addresses in npm's lock file: integrity hashes pin what is used, addresses pin from where.
func checkLockfile(name string, data []byte) []finding {
	var out []finding
	n := 0
	for line := range bytes.Lines(data) {
		n++
		if bytes.Contains(line, []byte(`"resolved"`)) {
			out = append(out, finding{file: name, line: n, reason: `a "resolved" address; install with npm's omit-lockfile-registry-resolved`})
		}
	}
	return out
}

// bpfLicense is what the kernel reads, by section and not by name; some helpers are refused to programs without it.
var bpfLicense = regexp.MustCompile(`(?m)^\s*(const\s+)?char\s+\w+\[\]\s+SEC\("license"\)\s*=\s*"Dual BSD/GPL";`)

// checkBPFLicense wants the licence in every BPF program; headers get theirs from the program.
func checkBPFLicense(name string, data []byte) []finding {
	if bpfLicense.Match(data) {
		return nil
	}
	return []finding{{file: name, reason: `no line: char _license[] SEC("license") = "Dual BSD/GPL";`}}
}
