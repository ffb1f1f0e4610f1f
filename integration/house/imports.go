package house

import (
	"fmt"
	"slices"
	"strings"
)

// arrows lists which top-level folders each one may import, beside itself.
var arrows = map[string][]string{
	"cmd":         {"agent", "coordinator", "proto", "internal"},
	"agent":       {"dataplane", "proto", "internal"},
	"coordinator": {"proto", "internal"},
	"dataplane":   {"bpf", "internal"},
	"bpf":         {"internal"},
	"proto":       {"internal"},
	"internal":    {},
	"integration": {"cmd", "agent", "coordinator", "dataplane", "bpf", "proto", "internal"},
}

// strangers are folders that never meet, not in their tests either: what joins them is tested in integration.
var strangers = [][2]string{{"agent", "coordinator"}, {"dataplane", "proto"}}

// leaves are the packages of internal that may import something else than the standard library and internal.
var leaves = map[string][]string{
	"internal/policydoc": {"github.com/goccy/go-yaml", "github.com/google/cel-go"}, // the policy document's two languages
	"internal/identity":  {"github.com/go-jose/go-jose"},                           // JWT-SVIDs
}

// heavy is a dependency that one part of the tree has to itself, so that the part can be replaced or faked as a whole.
type heavy struct {
	module    string
	importers []string // package paths; "x/..." is x and everything below it
	reason    string
}

var heavies = []heavy{
	{"github.com/tailscale/wireguard-go", []string{"dataplane/tunnel"}, "kernel and embedded WireGuard behave the same behind one interface"},
	{"golang.zx2c4.com/wireguard/wgctrl", []string{"dataplane/tunnel"}, "the kernel's WireGuard is one of the two engines behind that interface"},
	{"golang.zx2c4.com/wireguard", []string{"integration/probe", "integration/probe/rogue"}, "the original WireGuard engine is what ours is compared and interoperates with, and is in no shipped program"},
	{"github.com/vishvananda/netlink", []string{"dataplane/link", "integration/netlab"}, "links, addresses and routes change in one place that can undo it"},
	{"github.com/cilium/ebpf", []string{"bpf", "dataplane/enforce", "dataplane/revoke", "integration/bench"}, "what is pinned outlives the process, so one owner knows all of it"},
	{"modernc.org/sqlite", []string{"coordinator/store"}, "a second store must be able to join"},
	{"github.com/jackc/pgx", []string{"coordinator/store"}, "the second store"},
	{"github.com/pressly/goose", []string{"coordinator/store"}, "migrations belong to the store"},
	{"google.golang.org/grpc", []string{"proto/signetv1", "agent/session", "agent/session/sessiontest", "coordinator/session"}, "the two ends of the wire and nobody else"},
	{"google.golang.org/protobuf", []string{"proto/..."}, "parsing happens at the border; behind it are values that exist only when valid"},
	{"github.com/hashicorp/memberlist", []string{"agent/gossip"}, "gossip is never believed further than a signature goes"},
	{"github.com/danielgtaylor/huma", []string{"coordinator/api"}, "the web API is a view of the coordinator, not its shape"},
	{"github.com/goccy/go-yaml", []string{"internal/policydoc"}, "one reader of YAML with file, line and column in its errors"},
	{"github.com/spf13/cobra", []string{"cmd/..."}, "flags are the business of main packages"},
	{"github.com/prometheus/client_golang", []string{"agent/metrics", "coordinator/metrics"}, "metrics are collected from plain counters, not sprinkled"},
}

// checkImports keeps the arrows and the heavy dependencies.
func checkImports(packages []goPackage) []finding {
	var out []finding
	for _, p := range packages {
		out = append(out, checkPackageImports(p)...)
	}
	return out
}

func checkPackageImports(p goPackage) []finding {
	path := p.path()
	folder, _, _ := strings.Cut(path, "/")
	if _, known := arrows[folder]; !known {
		return []finding{{file: path, reason: fmt.Sprintf("no import rule for the folder %q; add it to arrows in integration/house/imports.go", folder)}}
	}
	var out []finding
	say := func(format, imported string, args ...any) {
		reason := fmt.Sprintf(format, append([]any{imported}, args...)...)
		out = append(out, finding{file: path, reason: reason, imported: imported})
	}
	for _, imported := range p.Imports {
		if why := checkArrow(path, folder, imported); why != "" {
			say("imports %s: %s", imported, why)
		}
		if why := checkHeavy(path, imported); why != "" {
			say("imports %s: %s", imported, why)
		}
	}
	if folder == "integration" {
		return out
	}
	for _, imported := range slices.Concat(p.TestImports, p.XTestImports) {
		target, _, _ := strings.Cut(strings.TrimPrefix(imported, module+"/"), "/")
		for _, pair := range strangers {
			if strings.HasPrefix(imported, module+"/") && (folder == pair[0] && target == pair[1] || folder == pair[1] && target == pair[0]) {
				say("a test imports %s: %s and %s meet only in integration", imported, pair[0], pair[1])
			}
		}
		if why := checkHeavy(path, imported); why != "" {
			say("a test imports %s: %s", imported, why)
		}
	}
	return out
}

// checkArrow says why a package may not import another, or nothing.
func checkArrow(path, folder, imported string) string {
	target, ours := strings.CutPrefix(imported, module+"/")
	if !ours {
		if folder == "internal" && !standard(imported) && !slices.ContainsFunc(leaves[path], func(m string) bool { return within(imported, m) }) {
			return "internal imports the standard library and itself only, but for the leaves listed in integration/house/imports.go"
		}
		return ""
	}
	target, _, _ = strings.Cut(target, "/")
	if target == folder || slices.Contains(arrows[folder], target) {
		return ""
	}
	return fmt.Sprintf("%s may import %s", folder, strings.Join(append([]string{"itself"}, arrows[folder]...), ", "))
}

func checkHeavy(path, imported string) string {
	for _, h := range heavies {
		if !within(imported, h.module) {
			continue
		}
		if slices.ContainsFunc(h.importers, func(i string) bool { return covers(i, path) }) {
			return "" // the first line that fits counts: a module inside another one's path stands before that
		}
		return fmt.Sprintf("only %s may (%s)", strings.Join(h.importers, ", "), h.reason)
	}
	return ""
}

// within reports whether an import path belongs to a module, with or without a major version in it.
func within(imported, mod string) bool {
	return imported == mod || strings.HasPrefix(imported, mod+"/")
}

func covers(pattern, path string) bool {
	if below, ok := strings.CutSuffix(pattern, "/..."); ok {
		return within(path, below)
	}
	return path == pattern
}

// standard reports whether an import path is of the standard library: its first element has no dot.
func standard(imported string) bool {
	first, _, _ := strings.Cut(imported, "/")
	return !strings.Contains(first, ".")
}
