package codec_test

import (
	"crypto/sha256"
	"errors"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/signet-overlay/signet/internal/mesh"
	"github.com/signet-overlay/signet/proto/codec"
	"github.com/signet-overlay/signet/proto/signetv1"
)

func section(t *testing.T, name string, m proto.Message) codec.Section {
	t.Helper()
	body, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return codec.Section{Ref: mesh.SectionRef{Name: name, Hash: sha256.Sum256(body)}, Body: body}
}

// TestEntries: an entry that the judge would not take for what was meant is refused with the whole snapshot.
//
//house:allow-long one table of entries
func TestEntries(t *testing.T) {
	w := newWorld(t)
	all := w.sections(t)
	later := protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1)
	one := func(change func(*signetv1.Entry)) []*signetv1.Entry {
		e := &signetv1.Entry{Peer: 301, Proto: 6, Port: 1024, PortBits: 6, Allow: &signetv1.Slot{Rule: 1}}
		change(e)
		if e.PortBits > 0 {
			e.Port |= 1 << 16
		}
		return []*signetv1.Entry{e}
	}
	for name, c := range map[string]struct {
		entries []*signetv1.Entry
		good    bool
	}{
		"range":                    {one(func(*signetv1.Entry) {}), true},
		"range from port 0":        {one(func(e *signetv1.Entry) { e.Port, e.PortBits = 0, 1 }), true},
		"port":                     {one(func(e *signetv1.Entry) { e.PortBits = 0 }), true},
		"every port of sctp":       {one(func(e *signetv1.Entry) { e.Proto, e.Port, e.PortBits = 132, 0, 0 }), true},
		"icmp":                     {one(func(e *signetv1.Entry) { e.Proto, e.Port, e.PortBits = 1, 0, 0 }), true},
		"any":                      {one(func(e *signetv1.Entry) { e.Proto, e.Port, e.PortBits = 0, 0, 0 }), true},
		"allow marked audit":       {one(func(e *signetv1.Entry) { e.Allow.Audit = true }), true},
		"audit alone":              {one(func(e *signetv1.Entry) { e.Allow, e.Audit = nil, &signetv1.Slot{Rule: 2} }), true},
		"port and its range":       {append(one(func(*signetv1.Entry) {}), one(func(e *signetv1.Entry) { e.PortBits = 0 })...), true},
		"two ranges, two ways":     {append(one(func(*signetv1.Entry) {}), one(func(e *signetv1.Entry) { e.PortBits, e.Ingress = 5, true; e.Port = 0 })...), true},
		"no rule":                  {one(func(e *signetv1.Entry) { e.Allow = nil }), false},
		"rule 0":                   {one(func(e *signetv1.Entry) { e.Allow.Rule = 0 }), false},
		"rule 0 beside another":    {one(func(e *signetv1.Entry) { e.Deny = &signetv1.Slot{Audit: true} }), false},
		"deny marked audit":        {one(func(e *signetv1.Entry) { e.Deny = &signetv1.Slot{Rule: 2, Audit: true} }), false},
		"audit marked audit":       {one(func(e *signetv1.Entry) { e.Audit = &signetv1.Slot{Rule: 2, Audit: true} }), false},
		"16 bits":                  {one(func(e *signetv1.Entry) { e.PortBits = 16 }), false},
		"bits that overflow":       {one(func(e *signetv1.Entry) { e.PortBits = 256 + 6 }), false},
		"port that overflows":      {one(func(e *signetv1.Entry) { e.Port = 1<<17 + 1024 }), false},
		"protocol that overflows":  {one(func(e *signetv1.Entry) { e.Proto = 256 + 6 }), false},
		"port inside its range":    {one(func(e *signetv1.Entry) { e.Port = 1025 }), false},
		"range of every protocol":  {one(func(e *signetv1.Entry) { e.Proto, e.Port = 0, 0 }), false},
		"port of every protocol":   {one(func(e *signetv1.Entry) { e.Proto, e.PortBits = 0, 0 }), false},
		"port of icmp":             {one(func(e *signetv1.Entry) { e.Proto, e.PortBits = 1, 0 }), false},
		"icmpv6":                   {one(func(e *signetv1.Entry) { e.Proto, e.Port, e.PortBits = 58, 0, 0 }), false},
		"protocol without rules":   {one(func(e *signetv1.Entry) { e.Proto = 47 }), false},
		"reserved peer":            {one(func(e *signetv1.Entry) { e.Peer = 3 }), false},
		"range within a range":     {append(one(func(*signetv1.Entry) {}), one(func(e *signetv1.Entry) { e.PortBits = 7 })...), false},
		"the same twice":           {append(one(func(*signetv1.Entry) {}), one(func(*signetv1.Entry) {})...), false},
		"unknown field":            {one(func(e *signetv1.Entry) { e.ProtoReflect().SetUnknown(later) }), false},
		"unknown field of a slot":  {one(func(e *signetv1.Entry) { e.Allow.ProtoReflect().SetUnknown(later) }), false},
		"unknown field of another": {one(func(e *signetv1.Entry) { e.Deny = &signetv1.Slot{Rule: 3}; e.Deny.ProtoReflect().SetUnknown(later) }), false},
		"range without its mark":   {[]*signetv1.Entry{{Peer: 301, Proto: 6, Port: 1024, PortBits: 6, Allow: &signetv1.Slot{Rule: 1}}}, false},
		"port with a range's mark": {[]*signetv1.Entry{{Peer: 301, Proto: 6, Port: 1<<16 | 1024, Allow: &signetv1.Slot{Rule: 1}}}, false},
	} {
		s := append([]codec.Section{}, all...)
		s[3] = section(t, s[3].Ref.Name, &signetv1.Ruleset{Number: 300, Entries: c.entries})
		h, err := codec.Apply(nil, w.update(5, s, s...), w.trust("api-1"))
		switch {
		case c.good && (err != nil || len(h.Snapshot.Rulesets[300]) != len(c.entries)):
			t.Errorf("%s: %v", name, err)
		case !c.good && !errors.Is(err, codec.ErrMalformed):
			t.Errorf("%s: accepted, or refused as %v", name, err)
		}
	}
}

// TestSelectorsTogether: a device beside another selector would be matched by half.
func TestSelectorsTogether(t *testing.T) {
	w := newWorld(t)
	all := w.sections(t)
	for name, selectors := range map[string][]string{"none": nil, "two kinds": {"interface:tap0", "uid:1"}, "later kind": {"path:/bin/a"}} {
		m := &signetv1.Workload{Id: w.id(t, "app/api-server").String(), Number: 300, Selectors: selectors}
		for _, a := range addrs(5) {
			m.Addresses = append(m.Addresses, a.AsSlice())
		}
		s := append([]codec.Section{}, all...)
		s[5] = section(t, s[5].Ref.Name, &signetv1.Workloads{Workloads: []*signetv1.Workload{m}})
		if _, err := codec.Apply(nil, w.update(5, s, s...), w.trust("api-1")); !errors.Is(err, codec.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
