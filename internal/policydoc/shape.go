package policydoc

import (
	"errors"
	"fmt"
	"io"

	"github.com/goccy/go-yaml/scanner"
	"github.com/goccy/go-yaml/token"
)

// shape follows the nesting of a token stream without recursion, so that a bomb is refused before it is parsed.
type shape struct {
	y       *yamlReader
	tokens  int
	scalars int
	blocks  []frame // block style: by column, growing
	flows   []frame // flow style: [ and {
	content bool    // something other than comments was seen
	header  bool
	ended   bool
}

type frame struct{ column, keys int }

// scan is the library's lexer, stopped at the first token that is refused.
func (s *shape) scan(src string) (tokens token.Tokens, ok bool) {
	var in scanner.Scanner
	in.Init(src)
	for {
		found, err := in.Scan()
		for _, tk := range found {
			tokens.Add(tk)
			if !s.next(tk) {
				return nil, false
			}
		}
		if errors.Is(err, io.EOF) {
			return tokens, true
		}
		if err != nil { // it comes with an invalid token, which next refuses; this is for the day that it does not
			s.y.syntax(err)
			return nil, false
		}
	}
}

// next takes one token, and reports whether the stream is still acceptable.
func (s *shape) next(tk *token.Token) bool {
	at := s.y.position(tk)
	if s.tokens++; s.tokens > maxTokens {
		s.y.fail(at, "", "the file is too large", fmt.Sprintf("at most %d words and signs", maxTokens), "use zones and labels instead of lists")
		return false
	}
	if !s.permitted(tk, at) {
		return false
	}
	s.follow(tk)
	if len(s.blocks)+len(s.flows) > maxDepth {
		s.y.fail(at, "", "this is nested too deeply", fmt.Sprintf("at most %d levels", maxDepth), "")
		return false
	}
	if s.top().keys > maxKeys {
		s.y.fail(at, "", "this mapping has too many keys", fmt.Sprintf("at most %d", maxKeys), "")
		return false
	}
	return true
}

// permitted refuses the parts of YAML that make one text mean another, or little text much.
func (s *shape) permitted(tk *token.Token, at Position) bool {
	const plain = "put the value in quotes if it is meant as a text"
	switch tk.Type {
	case token.InvalidType:
		s.y.invalid(tk, tk.Error)
	case token.AnchorType, token.AliasType:
		s.y.fail(at, tk.Value, "begins an anchor or alias, which is refused", "plain values", plain)
	case token.TagType:
		s.y.fail(at, tk.Value, "is a tag, which is refused", "plain values", plain)
	case token.DirectiveType:
		s.y.fail(at, tk.Value, "begins a directive, which is refused", "plain values", plain)
	case token.MappingKeyType:
		s.y.fail(at, tk.Value, "begins a complex key, which is refused", "key: value", plain)
	case token.MergeKeyType:
		s.y.fail(at, tk.Value, "is a merge key, which is refused", "plain keys", "")
	case token.CommentType:
		return true
	case token.DocumentHeaderType:
		if s.content || s.header {
			s.y.fail(at, tk.Value, "begins a second YAML document", "one document in each file", "")
			return false
		}
		s.header = true
		return true
	case token.DocumentEndType:
		s.ended = true
		return true
	default:
		if s.ended {
			s.y.fail(at, tk.Value, "follows the end of the document", "one document in each file", "")
			return false
		}
		s.content = true
		return true
	}
	return false
}

func (s *shape) follow(tk *token.Token) {
	switch tk.Type {
	case token.SequenceStartType, token.MappingStartType:
		s.flows = append(s.flows, frame{})
	case token.SequenceEndType, token.MappingEndType:
		if len(s.flows) > 0 {
			s.flows = s.flows[:len(s.flows)-1]
		}
	case token.SequenceEntryType:
		if len(s.flows) == 0 {
			s.block(tk.Position.Column)
		}
	case token.MappingValueType:
		switch {
		case len(s.flows) > 0:
			s.flows[len(s.flows)-1].keys++
		case tk.Prev != nil && tk.Prev.Position.Line == tk.Position.Line:
			s.block(tk.Prev.Position.Column)
			s.top().keys++
		default:
			s.block(tk.Position.Column)
			s.top().keys++
		}
	case token.StringType, token.SingleQuoteType, token.DoubleQuoteType, token.BoolType, token.IntegerType, token.FloatType,
		token.BinaryIntegerType, token.OctetIntegerType, token.HexIntegerType, token.InfinityType, token.NanType:
		s.scalars++
	}
}

// block enters the block that begins at column and leaves those that were further in.
func (s *shape) block(column int) {
	for len(s.blocks) > 0 && s.blocks[len(s.blocks)-1].column > column {
		s.blocks = s.blocks[:len(s.blocks)-1]
	}
	if len(s.blocks) == 0 || s.blocks[len(s.blocks)-1].column < column {
		s.blocks = append(s.blocks, frame{column: column})
	}
}

func (s *shape) top() *frame {
	switch {
	case len(s.flows) > 0:
		return &s.flows[len(s.flows)-1]
	case len(s.blocks) > 0:
		return &s.blocks[len(s.blocks)-1]
	}
	return &frame{}
}
