package policydoc

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Limits of one source; beyond any of them it is refused with the place where it was exceeded. They are checked on
// bytes and tokens, before the library's recursive parser runs.
const (
	maxBytes  = 4 << 20 // over all files of a document
	maxTokens = 600_000 // in one file: about 22,000 rules; keeps its syntax tree near 256 MiB
	maxDepth  = 32      // nested lists and mappings; the parser recurses
	maxKeys   = 256     // in one mapping; the parser is quadratic in it
)

type kind uint8

const (
	kindNull kind = iota
	kindText
	kindNumber
	kindBool
	kindList
	kindMap
)

var kindNames = [...]string{"nothing", "a text", "a number", "true or false", "a list", "a mapping"}

// String is the noun in errors.
func (k kind) String() string { return kindNames[k] }

// node is YAML without its surprises: no anchors, tags, merges or number formats; a scalar is its source text.
type node struct {
	kind  kind
	text  string
	at    Position
	items []*node
	pairs []pair
}

type pair struct{ key, value *node }

// value is what an error quotes: the text of a scalar.
func (n *node) value() string { return n.text }

// readYAML reads one source. It returns nil for an empty one, and nil with errors added to p for one it refuses.
func readYAML(file string, data []byte, p *problems) *node {
	y := &yamlReader{file: file, p: p}
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	if !y.checkBytes(data) {
		return nil
	}
	tokens, root := y.load(data)
	if root == nil {
		return nil
	}
	before := len(p.list)
	n := y.convert(root)
	// A scalar that the parser saw and the tree lacks was dropped in silence; what is left may not be what was written.
	if len(p.list) == before && y.nodes != tokens {
		y.fail(Position{File: file, Line: 1, Column: 1}, "", "the file cannot be read in one way only", "plain YAML", "indent with spaces, two for each level")
	}
	if len(p.list) > before {
		return nil
	}
	return n
}

type yamlReader struct {
	file  string
	p     *problems
	nodes int // scalars in the tree, keys included, nulls not
}

func (y *yamlReader) fail(at Position, value, problem, want, hint string) {
	y.p.add(Error{Pos: at, Value: value, Problem: problem, Want: want, Hint: hint})
}

// checkBytes refuses what is not printable text.
func (y *yamlReader) checkBytes(data []byte) bool {
	at := Position{File: y.file, Line: 1, Column: 1}
	if len(data) > maxBytes {
		y.fail(Position{File: y.file}, "", fmt.Sprintf("the file has %d bytes", len(data)), fmt.Sprintf("at most %d", maxBytes), "")
		return false
	}
	for len(data) > 0 {
		c, size := utf8.DecodeRune(data)
		switch {
		case c == utf8.RuneError && size <= 1:
			y.fail(at, "", "the file is not UTF-8 text from here on", "UTF-8", "")
			return false
		case c < ' ' && c != '\n' && c != '\r' && c != '\t', c == 0x7f, c >= 0x80 && c < 0xa0, c == 0x2028, c == 0x2029, c == 0xfeff:
			y.fail(at, string(c), "is a control character", "printable text", "")
			return false
		case c == '\n':
			at.Line, at.Column = at.Line+1, 0
		}
		at.Column++
		data = data[size:]
	}
	return true
}

// load runs the library. A panic in it is a refusal of the document: what people send must not stop a coordinator.
func (y *yamlReader) load(data []byte) (scalars int, root ast.Node) {
	defer func() {
		if r := recover(); r != nil {
			y.fail(Position{File: y.file, Line: 1, Column: 1}, "", fmt.Sprintf("the file is not valid YAML (%.100v)", r), "plain YAML", "")
			scalars, root = 0, nil
		}
	}()
	s := &shape{y: y}
	tokens, ok := s.scan(string(data))
	if !ok {
		return 0, nil
	}
	// Duplicate keys are reported by convert, all of them.
	f, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		y.syntax(err)
		return 0, nil
	}
	for _, d := range f.Docs {
		if d == nil || d.Body == nil {
			continue
		}
		if root != nil {
			y.fail(y.position(d.Body.GetToken()), "", "this is a second YAML document", "one document in each file", "")
			return 0, nil
		}
		root = d.Body
	}
	return s.scalars, root
}

func (y *yamlReader) syntax(err error) {
	var at interface {
		GetToken() *token.Token
		GetMessage() string
	}
	if !errors.As(err, &at) || at.GetToken() == nil {
		y.fail(Position{File: y.file, Line: 1, Column: 1}, "", "the file is not valid YAML", "plain YAML", "")
		return
	}
	y.invalid(at.GetToken(), at.GetMessage())
}

// invalid repeats the library's words about a token.
func (y *yamlReader) invalid(tk *token.Token, why string) {
	value, problem, hint := strings.TrimSpace(tk.Value), "is not valid YAML here: ", ""
	if value == "" {
		problem = "this " + problem
	}
	if strings.Contains(tk.Value, "\t") {
		hint = "indent with spaces"
	}
	y.fail(y.position(tk), value, problem+strings.ReplaceAll(why, "\t", "TAB"), "", hint)
}

func (y *yamlReader) position(tk *token.Token) Position {
	if tk == nil || tk.Position == nil {
		return Position{File: y.file, Line: 1, Column: 1}
	}
	return Position{File: y.file, Line: max(tk.Position.Line, 1), Column: max(tk.Position.Column, 1)}
}

func (y *yamlReader) convert(n ast.Node) *node {
	switch n := n.(type) {
	case *ast.MappingNode:
		return y.mapping(n.GetToken(), n.Values)
	case *ast.MappingValueNode:
		return y.mapping(n.Key.GetToken(), []*ast.MappingValueNode{n})
	case *ast.SequenceNode:
		out := &node{kind: kindList, at: y.position(n.GetToken()), items: make([]*node, 0, len(n.Values))}
		for _, v := range n.Values {
			out.items = append(out.items, y.convert(v))
		}
		return out
	case *ast.StringNode:
		return y.scalar(kindText, n.Value, n.GetToken())
	case *ast.LiteralNode:
		return y.scalar(kindText, n.Value.Value, n.GetToken())
	case *ast.IntegerNode:
		return y.scalar(kindNumber, n.GetToken().Value, n.GetToken())
	case *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return y.scalar(kindNumber, n.GetToken().Value, n.GetToken())
	case *ast.BoolNode:
		return y.scalar(kindBool, n.GetToken().Value, n.GetToken())
	case *ast.NullNode:
		return &node{kind: kindNull, at: y.position(n.GetToken())}
	}
	out := &node{kind: kindNull, at: Position{File: y.file, Line: 1, Column: 1}}
	if n != nil {
		out.at = y.position(n.GetToken())
	}
	y.fail(out.at, "", "this is a kind of YAML that Signet does not read", "texts, numbers, lists and mappings", "")
	return out
}

func (y *yamlReader) scalar(k kind, text string, tk *token.Token) *node {
	y.nodes++
	return &node{kind: k, text: text, at: y.position(tk)}
}

func (y *yamlReader) mapping(start *token.Token, values []*ast.MappingValueNode) *node {
	out := &node{kind: kindMap, pairs: make([]pair, 0, len(values))}
	seen := make(map[string]Position, len(values))
	for _, v := range values {
		k := y.convert(v.Key)
		if k.kind != kindText {
			y.fail(k.at, k.text, "is not a key", "a text", "put it in quotes")
			continue
		}
		if first, ok := seen[k.text]; ok {
			y.fail(k.at, k.text, "is a duplicate key", "each key once", fmt.Sprintf("it stands at line %d already", first.Line))
		}
		seen[k.text] = k.at
		out.pairs = append(out.pairs, pair{k, y.convert(v.Value)})
	}
	// The library's position of a block mapping is its first colon.
	out.at = y.position(start)
	if len(out.pairs) > 0 {
		out.at = out.pairs[0].key.at
	}
	return out
}
