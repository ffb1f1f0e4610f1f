package bpf

import (
	"reflect"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// TestLayout compares the Go structs, field by field, with the type information of the object that they are read from.
func TestLayout(t *testing.T) {
	spec, err := LoadJudge()
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]any{
		"tuple": JudgeTuple{}, "settings": JudgeSettings{}, "view": JudgeView{}, "addr_key": JudgeAddrKey{}, "addr": JudgeAddr{},
		"local_key": JudgeLocalKey{}, "own_key": JudgeOwnKey{}, "own": JudgeOwn{}, "entry_key": JudgeEntryKey{}, "entry": JudgeEntry{},
		"ruleset": JudgeRuleset{}, "conn": JudgeConn{}, "event": JudgeEvent{}, "prefixes": JudgePrefixes{}, "range_key": JudgeRangeKey{},
		"window": JudgeWindow{}, "iface_key": JudgeIfaceKey{}, "tuple4": JudgeTuple4{}, "fragment_key": JudgeFragmentKey{}, "fragment": JudgeFragment{},
	} {
		var c *btf.Struct
		if err := spec.Types.TypeByName(name, &c); err != nil {
			t.Errorf("struct %s: %v", name, err)
			continue
		}
		compareLayout(t, "struct "+name, reflect.TypeOf(v), c)
	}
	for name, m := range spec.Maps {
		if m.Key != nil && m.Value != nil && m.KeySize == 0 {
			t.Errorf("map %s has no key", name)
		}
	}
}

func compareLayout(t *testing.T, where string, g reflect.Type, c *btf.Struct) {
	t.Helper()
	if g.Size() != uintptr(c.Size) {
		t.Errorf("%s has %d bytes in Go and %d in C", where, g.Size(), c.Size)
	}
	for _, m := range c.Members {
		f, ok := g.FieldByNameFunc(func(n string) bool { return strings.EqualFold(n, strings.ReplaceAll(m.Name, "_", "")) })
		if !ok {
			t.Errorf("%s.%s is not in Go", where, m.Name)
			continue
		}
		if f.Offset != uintptr(m.Offset.Bytes()) {
			t.Errorf("%s.%s is at %d in Go and at %d in C", where, m.Name, f.Offset, m.Offset.Bytes())
		}
		size, err := btf.Sizeof(m.Type)
		if err != nil {
			t.Fatal(err)
		}
		if f.Type.Size() != uintptr(size) {
			t.Errorf("%s.%s has %d bytes in Go and %d in C", where, m.Name, f.Type.Size(), size)
		}
		if inner, ok := btf.UnderlyingType(m.Type).(*btf.Struct); ok {
			compareLayout(t, where+"."+m.Name, f.Type, inner)
		}
	}
}
