package policydoc

import (
	"encoding"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// DecodeStrict reads a configuration file into the struct that into points to. What the file does not mention keeps
// the value it has. Fields are named by their yaml tag; one with the option notbuilt is refused by name unless it is
// empty. The error is an Errors. Panics when into is no pointer to a struct, which is a bug in this process.
//
// It reads texts, truths, whole numbers, durations ("24h"), Bytes ("1GiB"), Strings, encoding.TextUnmarshaler, and
// structs, pointers, lists and mappings of them.
func DecodeStrict(name string, data []byte, into any) error {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		panic(fmt.Sprintf("internal error: policydoc: decode %s into %T", name, into))
	}
	d := &decoder{}
	if root := readYAML(name, data, &d.problems); root != nil && root.kind != kindNull {
		d.structure(root, v.Elem(), "the file")
	}
	return d.err(nil)
}

// Strings is a list that may also be written as its only item.
type Strings []string

// Bytes is a size: a number with B, KiB, MiB, GiB, TiB or kB, MB, GB, TB.
type Bytes int64

var byteUnits = [...]struct {
	suffix string
	factor int64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1}, {"", 1},
}

// ParseBytes reads a size.
func ParseBytes(s string) (Bytes, error) {
	for _, u := range byteUnits {
		digits, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimRight(digits, " "), 10, 63)
		if err != nil || int64(n) > math.MaxInt64/u.factor {
			break
		}
		return Bytes(int64(n) * u.factor), nil
	}
	return 0, fmt.Errorf("%w: %q is not a size such as 1GiB", ErrDocument, s)
}

// String is the largest binary unit that gives a whole number.
func (b Bytes) String() string {
	for i := 3; i >= 0; i-- {
		if u := byteUnits[i]; b != 0 && int64(b)%u.factor == 0 {
			return strconv.FormatInt(int64(b)/u.factor, 10) + u.suffix
		}
	}
	return strconv.FormatInt(int64(b), 10) + "B"
}

// MarshalText writes the form of String.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText is ParseBytes.
func (b *Bytes) UnmarshalText(text []byte) (err error) {
	*b, err = ParseBytes(string(text))
	return err
}

type decoder struct{ problems }

// structure fills the fields that n mentions.
func (d *decoder) structure(n *node, v reflect.Value, what string) {
	k := keys{what: what}
	fields := map[string]reflect.Value{}
	for i := range v.NumField() {
		tag, ok := v.Type().Field(i).Tag.Lookup("yaml")
		name, option, _ := strings.Cut(tag, ",")
		if !ok || name == "" || name == "-" {
			continue
		}
		k.known = append(k.known, name)
		if option == "notbuilt" {
			k.later = append(k.later, name)
			continue
		}
		fields[name] = v.Field(i)
	}
	if n.kind != kindMap {
		d.wrong(n, "a mapping with the keys of "+what, "")
		return
	}
	for _, p := range n.pairs {
		f, ok := fields[p.key.text]
		switch {
		case ok:
			d.value(p.value, f, p.key.text)
		case !slices.Contains(k.later, p.key.text):
			d.unknownKey(p.key, k)
		case p.value.kind == kindNull || len(p.value.items)+len(p.value.pairs)+len(p.value.text) == 0:
		default:
			d.later(p.key, "the key "+quote(p.key.text)+" of "+what, "remove it")
		}
	}
}

// value decodes n into v; what names it in errors.
func (d *decoder) value(n *node, v reflect.Value, what string) {
	if d.full() {
		return
	}
	if n.kind == kindNull && v.Kind() != reflect.Interface {
		d.wrong(n, "a value for "+what, "remove the key to keep its default")
		return
	}
	if d.special(n, v) {
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		e := reflect.New(v.Type().Elem())
		d.value(n, e.Elem(), what)
		v.Set(e)
	case reflect.Struct:
		d.structure(n, v, what)
	case reflect.Slice:
		d.slice(n, v, what)
	case reflect.Map:
		d.mapping(n, v, what)
	case reflect.Interface:
		if x := plain(n); x != nil {
			v.Set(reflect.ValueOf(x))
		}
	case reflect.String:
		if n.kind == kindText { // an empty text is a value here: it turns features off
			v.SetString(n.text)
			return
		}
		d.wrong(n, "a text for "+what, "")
	case reflect.Bool:
		if n.kind != kindBool {
			d.wrong(n, "true or false for "+what, "true and false are written without quotes")
			return
		}
		v.SetBool(strings.EqualFold(n.text, "true"))
	default:
		d.number(n, v, what)
	}
}

// special decodes the types that are written in one way of their own.
func (d *decoder) special(n *node, v reflect.Value) bool {
	switch p := v.Addr().Interface().(type) {
	case *time.Duration:
		dur, err := time.ParseDuration(n.text)
		if n.kind != kindText && n.kind != kindNumber {
			d.wrong(n, "a duration such as 24h, 5m or 30s", "")
		} else if err != nil || dur < 0 {
			d.bad(n, "is not a duration", "one such as 24h, 5m or 30s", "")
		} else {
			*p = dur
		}
	case *Bytes:
		size, err := ParseBytes(n.text)
		if n.kind != kindText && n.kind != kindNumber {
			d.wrong(n, "a size such as 1GiB", "")
		} else if err != nil {
			d.bad(n, "is not a size", "one such as 512MiB or 1GiB", "")
		} else {
			*p = size
		}
	case *Strings:
		if n.kind != kindText {
			return false
		}
		*p = Strings{n.text}
	case encoding.TextUnmarshaler:
		if s, ok := d.text(n, "a text"); ok {
			if err := p.UnmarshalText([]byte(s)); err != nil {
				d.bad(n, "is not valid: "+err.Error(), "", "")
			}
		}
	default:
		return false
	}
	return true
}

// slice and mapping replace what was there: a list in a file is the whole list.
func (d *decoder) slice(n *node, v reflect.Value, what string) {
	if n.kind != kindList {
		d.wrong(n, "a list for "+what, "")
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.items), len(n.items))
	for i, item := range n.items {
		d.value(item, out.Index(i), what)
	}
	v.Set(out)
}

func (d *decoder) mapping(n *node, v reflect.Value, what string) {
	if n.kind != kindMap || v.Type().Key().Kind() != reflect.String {
		d.wrong(n, "a mapping for "+what, "")
		return
	}
	out := reflect.MakeMapWithSize(v.Type(), len(n.pairs))
	for _, p := range n.pairs {
		e := reflect.New(v.Type().Elem()).Elem()
		d.value(p.value, e, p.key.text)
		out.SetMapIndex(reflect.ValueOf(p.key.text).Convert(v.Type().Key()), e)
	}
	v.Set(out)
}

// number reads decimal digits only: 010 and 0x10 mean different things to different readers.
func (d *decoder) number(n *node, v reflect.Value, what string) {
	want := "a whole number for " + what
	if n.kind != kindNumber {
		d.wrong(n, want, "numbers are written without quotes")
		return
	}
	switch {
	case v.CanInt():
		i, err := strconv.ParseInt(n.text, 10, v.Type().Bits())
		if err == nil && strconv.FormatInt(i, 10) == n.text {
			v.SetInt(i)
			return
		}
	case v.CanUint():
		i, err := strconv.ParseUint(n.text, 10, v.Type().Bits())
		if err == nil && strconv.FormatUint(i, 10) == n.text {
			v.SetUint(i)
			return
		}
	case v.CanFloat():
		f, err := strconv.ParseFloat(n.text, 64)
		if err == nil && !math.IsNaN(f) && !math.IsInf(f, 0) {
			v.SetFloat(f)
			return
		}
		want = "a number for " + what
	default:
		panic(fmt.Sprintf("internal error: policydoc: no rule for %v", v.Type()))
	}
	d.bad(n, "is not valid", want+" that fits", "")
}

// plain is the value of n where any value will do.
func plain(n *node) any {
	switch n.kind {
	case kindText:
		return n.text
	case kindBool:
		return strings.EqualFold(n.text, "true")
	case kindNumber:
		if i, err := strconv.ParseInt(n.text, 10, 64); err == nil {
			return i
		}
		if f, err := strconv.ParseFloat(n.text, 64); err == nil {
			return f
		}
		return n.text
	case kindList:
		out := make([]any, 0, len(n.items))
		for _, item := range n.items {
			out = append(out, plain(item))
		}
		return out
	case kindMap:
		out := make(map[string]any, len(n.pairs))
		for _, p := range n.pairs {
			out[p.key.text] = plain(p.value)
		}
		return out
	}
	return nil
}
