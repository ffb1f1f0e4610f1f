package house

import (
	"bytes"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
)

// Markdown that the doc rule reads: links with their target, and code in backticks.
var (
	markdownLink = regexp.MustCompile(`\]\(<?([^)\s>]+)>?(?:\s+"[^"]*")?\)|^\s*\[[^\]]+\]:\s*<?([^\s>]+)>?`)
	backticks    = regexp.MustCompile("`([^`]+)`")
	treePath     = regexp.MustCompile(`^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)+/?$`)
	symbolSuffix = regexp.MustCompile(`\.[A-Z]\w*$`)
	lineSuffix   = regexp.MustCompile(`:[0-9]+$`)
	urlScheme    = regexp.MustCompile(`^[a-z][a-z0-9+.-]*:`)
)

// treeFolders are the folders that a path in backticks is taken to be below; app/api-server is an identity, not a path.
var treeFolders = []string{"cmd", "agent", "coordinator", "dataplane", "bpf", "proto", "internal", "integration", "deploy", "docs"}

// fileEndings mark a path in any folder.
var fileEndings = []string{".go", ".c", ".h", ".proto", ".md", ".sh", ".txtar"}

// isDoc reports whether the doc rule reads a file.
func isDoc(name string) bool {
	return strings.HasSuffix(name, ".md") && (!strings.Contains(name, "/") || strings.HasPrefix(name, "docs/") || path.Base(name) == "DESIGN.md")
}

// checkDocPaths wants every relative link and every path in backticks to exist. Code blocks are left alone: they show users'
// machines.
func checkDocPaths(name string, data []byte, exists func(string) bool) []finding {
	var out []finding
	fenced, n := false, 0
	for line := range bytes.Lines(data) {
		n++
		text := strings.TrimRight(string(line), "\r\n")
		if trimmed := strings.TrimSpace(text); strings.HasPrefix(trimmed, "```") || strings.HasPrefix(trimmed, "~~~") {
			fenced = !fenced
			continue
		}
		if fenced {
			continue
		}
		for _, m := range markdownLink.FindAllStringSubmatch(backticks.ReplaceAllString(text, "code"), -1) {
			if target, ok := linkTarget(name, m[1]+m[2]); ok && !exists(target) {
				out = append(out, finding{file: name, line: n, reason: fmt.Sprintf("link to %s, which does not exist", target)})
			}
		}
		for _, m := range backticks.FindAllStringSubmatch(text, -1) {
			if p, ok := codePath(m[1]); ok && !exists(p) && !exists(path.Join(path.Dir(name), p)) {
				out = append(out, finding{file: name, line: n, reason: fmt.Sprintf("names %s, which does not exist", p)})
			}
		}
	}
	return out
}

// linkTarget is where a relative link leads, from the top of the repository; others are not ours to check.
func linkTarget(from, link string) (string, bool) {
	link, _, _ = strings.Cut(link, "#")
	link, _, _ = strings.Cut(link, "?")
	if link == "" || urlScheme.MatchString(link) || strings.HasPrefix(link, "//") {
		return "", false
	}
	if plain, err := url.PathUnescape(link); err == nil {
		link = plain
	}
	if strings.HasPrefix(link, "/") {
		return path.Clean(link[1:]), true
	}
	return path.Join(path.Dir(from), link), true
}

// codePath reads code as a path of the tree: below one of our folders, or with the ending of a source file.
func codePath(code string) (string, bool) {
	code = strings.TrimSuffix(strings.TrimPrefix(lineSuffix.ReplaceAllString(code, ""), "./"), "/...")
	if !treePath.MatchString(code) {
		return "", false
	}
	folder, _, _ := strings.Cut(code, "/")
	if slices.Contains(treeFolders, folder) {
		return path.Clean(symbolSuffix.ReplaceAllString(code, "")), true
	}
	return code, slices.Contains(fileEndings, path.Ext(code))
}
