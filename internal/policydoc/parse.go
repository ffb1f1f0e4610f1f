package policydoc

import (
	"fmt"
	"slices"

	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/policy"
)

// Limits of one document. Beyond any of them it is refused, with the place of the first item too many.
const (
	MaxFiles     = 1_000
	MaxZones     = 1_000
	MaxWorkloads = 10_000
	MaxRules     = 100_000
	MaxTests     = 10_000

	maxSelectors = 16    // of one workload
	maxGlobs     = 1_000 // of one workload
	maxLabels    = 64    // of one workload or pattern
	maxServices  = 1_000 // of one rule, and of serves
	maxPatterns  = 10_000
)

// File is one source of a document.
type File struct {
	Name string // as errors should call it
	Data []byte
}

// Parse reads several files as one document: what one declares, another may use. The error is an Errors.
func Parse(td identity.TrustDomain, files []File) (*Document, []Warning, error) {
	if td.IsZero() {
		return nil, nil, fmt.Errorf("%w: no trust domain was given to read it in", ErrDocument)
	}
	r := newReader(td)
	order := make(map[string]int, len(files))
	total, empty := 0, true
	for i, f := range files {
		order[f.Name] = i
		total += len(f.Data)
	}
	at := Position{}
	if len(files) > 0 {
		at.File = files[0].Name
	}
	if total > maxBytes || len(files) > MaxFiles {
		r.add(Error{Pos: at, Problem: fmt.Sprintf("the document has %d files with %d bytes", len(files), total),
			Want: fmt.Sprintf("at most %d files with %d bytes", MaxFiles, maxBytes)})
		return nil, nil, r.err(order)
	}
	readable := true
	for _, f := range files {
		before := len(r.list)
		root := readYAML(f.Name, f.Data, &r.problems)
		readable = readable && len(r.list) == before
		if root != nil {
			empty = false
			r.document(root)
		}
	}
	if empty && readable {
		// An empty file is what an interrupted copy leaves behind; applied, it would cut every flow.
		r.add(Error{Pos: at, Problem: "the document is empty", Want: "zones, workloads and rules", Hint: "write rules: [] to deny everything"})
	}
	if readable {
		r.resolve()
	}
	if err := r.err(order); err != nil {
		return nil, nil, err
	}
	return r.doc, r.warnings(), nil
}

// reader builds a Document and collects what is wrong with it.
type reader struct {
	problems
	td        identity.TrustDomain
	doc       *Document
	zones     map[identity.Zone]Position
	workloads map[identity.ID]Position
	rules     map[string]Position
	refs      []ref
	parsed    map[string]policy.Service // by text: documents repeat few of them many times
}

// ref is a name that must be declared somewhere in the document.
type ref struct {
	id   identity.ID   // a workload, or
	zone identity.Zone // a zone
	at   *node
}

func newReader(td identity.TrustDomain) *reader {
	return &reader{td: td, doc: &Document{}, zones: map[identity.Zone]Position{}, workloads: map[identity.ID]Position{},
		rules: map[string]Position{}, parsed: map[string]policy.Service{}}
}

// keys lists what a mapping may hold.
type keys struct {
	what  string
	known []string
	later []string // of the contract, refused by name
}

func documentKeys() keys {
	return keys{what: "a policy", known: []string{"zones", "workloads", "rules", "tests"}}
}

func (r *reader) document(root *node) {
	r.object(root, documentKeys(), func(key string, v *node) {
		if v.kind == kindNull { // a section with nothing but comments below it
			return
		}
		switch key {
		case "zones":
			r.section(v, key, MaxZones, len(r.doc.Zones), r.zone)
		case "workloads":
			r.section(v, key, MaxWorkloads, len(r.doc.Workloads), r.workload)
		case "rules":
			r.section(v, key, MaxRules, len(r.doc.Rules), r.rule)
		case "tests":
			r.section(v, key, MaxTests, len(r.doc.Tests), r.test)
		}
	})
}

func (r *reader) section(v *node, key string, limit, have int, read func(*node)) {
	for _, item := range r.listOf(v, key, limit-have) {
		if r.full() {
			return
		}
		read(item)
	}
}

// object calls read for each key that is known, in the order of the source. It reports whether n is a mapping.
func (r *reader) object(n *node, k keys, read func(key string, v *node)) bool {
	if n.kind != kindMap {
		r.wrong(n, "a mapping with the keys of "+k.what, "")
		return false
	}
	for _, p := range n.pairs {
		switch name := p.key.text; {
		case slices.Contains(k.known, name):
			read(name, p.value)
		case slices.Contains(k.later, name):
			r.later(p.key, "the key "+quote(name)+" of "+k.what, "remove it")
		default:
			r.unknownKey(p.key, k)
		}
	}
	return true
}

func (p *problems) unknownKey(key *node, k keys) {
	all := slices.Sorted(slices.Values(k.known))
	p.add(Error{Pos: key.at, Value: key.text, Problem: "is an unknown key of " + k.what, Want: "one of " + join(all), Hint: near(key.text, all)})
}

func join(words []string) string {
	out := ""
	for i, w := range words {
		if i > 0 {
			out += ", "
		}
		out += w
	}
	return out
}

// wrong reports a node of the wrong type.
func (p *problems) wrong(n *node, want, hint string) {
	problem := "is " + n.kind.String()
	if n.text == "" {
		problem = "this " + problem
	}
	if hint == "" && (n.kind == kindNumber || n.kind == kindBool) {
		hint = "put it in quotes if it is meant as a text"
	}
	p.add(Error{Pos: n.at, Value: n.value(), Problem: problem, Want: want, Hint: hint})
}

// bad reports a scalar that is of the right type and not valid.
func (p *problems) bad(n *node, problem, want, hint string) {
	p.add(Error{Pos: n.at, Value: n.value(), Problem: problem, Want: want, Hint: hint})
}

// later refuses by name what the contract promises and this version does not do. Ignoring it would enforce less than
// what was written.
func (p *problems) later(n *node, what, hint string) {
	p.add(Error{Pos: n.at, Problem: what + " is not built yet", Hint: hint, kind: policy.ErrNotBuilt})
}

// text reads a scalar that is a text; numbers and truths must be quoted, so that nobody wonders about 0x10 or 1e3.
func (p *problems) text(n *node, want string) (string, bool) {
	if n.kind != kindText {
		p.wrong(n, want, "")
		return "", false
	}
	if n.text == "" {
		p.bad(n, "an empty text", want, "")
		return "", false
	}
	return n.text, true
}

// listOf reads a list of at most limit items; the first one too many is named.
func (p *problems) listOf(n *node, what string, limit int) []*node {
	if n.kind != kindList {
		hint := ""
		if n.kind == kindText {
			hint = "write [" + quote(n.text) + "]"
		}
		p.wrong(n, "a list of "+what, hint)
		return nil
	}
	if len(n.items) > limit {
		p.bad(n.items[max(limit, 0)], "is one item too many", fmt.Sprintf("at most %d %s", limit, what), "")
		return nil
	}
	return n.items
}

// filled is listOf with at least one item.
func (p *problems) filled(n *node, what string, limit int) []*node {
	items := p.listOf(n, what, limit)
	if n.kind == kindList && len(n.items) == 0 {
		p.bad(n, "an empty list", "at least one of "+what, "")
	}
	return items
}

// missing reports a key that must be there.
func (p *problems) missing(n *node, key, of string) {
	p.add(Error{Pos: n.at, Problem: of + " has no key " + quote(key)})
}

func earlier(p Position) string { return "the first one stands at " + p.String() }

// resolve checks that everything that is named is declared, once all files are read.
func (r *reader) resolve() {
	zones := make([]string, 0, len(r.zones))
	for z := range r.zones {
		zones = append(zones, z.String())
	}
	slices.Sort(zones)
	var ids []string
	for _, f := range r.refs {
		if f.id.IsZero() {
			if _, ok := r.zones[f.zone]; !ok {
				r.bad(f.at, "names a zone that is not declared", "a zone of the document", near(f.zone.String(), zones))
			}
			continue
		}
		if _, ok := r.workloads[f.id]; ok {
			continue
		}
		if ids == nil {
			for id := range r.workloads {
				ids = append(ids, id.Short())
			}
			slices.Sort(ids)
		}
		r.bad(f.at, "names a workload that is not declared", "a workload of the document", near(f.id.Short(), ids))
		if r.full() {
			return
		}
	}
}
