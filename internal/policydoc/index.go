package policydoc

import (
	"path"
	"slices"

	"github.com/signet-overlay/signet/internal/identity"
)

// Index finds the workloads of a Document that a Pattern selects, without walking through all of them.
type Index struct {
	doc     *Document
	byID    map[identity.ID]int
	byZone  map[identity.Zone][]int
	byLabel map[[2]string][]int
}

// Index is built once for many look-ups. It shares the Document, which must not change meanwhile.
func (d *Document) Index() *Index {
	ix := &Index{doc: d, byID: make(map[identity.ID]int, len(d.Workloads)), byZone: map[identity.Zone][]int{}, byLabel: map[[2]string][]int{}}
	for i, w := range d.Workloads {
		ix.byID[w.ID] = i
		ix.byZone[w.ID.Zone()] = append(ix.byZone[w.ID.Zone()], i)
		for k, v := range w.Labels {
			ix.byLabel[[2]string{k, v}] = append(ix.byLabel[[2]string{k, v}], i)
		}
	}
	return ix
}

// Workload returns the declaration of id.
func (ix *Index) Workload(id identity.ID) (*Workload, bool) {
	i, ok := ix.byID[id]
	if !ok {
		return nil, false
	}
	return &ix.doc.Workloads[i], true
}

// Match returns positions in Document.Workloads, growing. A pattern that selects nothing, the zero Pattern included,
// gives none. The result is shared: it must not be changed.
func (ix *Index) Match(p Pattern) []int {
	switch {
	case !p.ID.IsZero():
		if i, ok := ix.byID[p.ID]; ok {
			return []int{i}
		}
		return nil
	case !p.Zone.IsZero():
		return ix.byZone[p.Zone]
	}
	return ix.labelled(p.Labels)
}

// labelled walks through the holders of the rarest label.
func (ix *Index) labelled(labels map[string]string) []int {
	var rarest []int
	first := true
	for k, v := range labels {
		if have := ix.byLabel[[2]string{k, v}]; first || len(have) < len(rarest) {
			rarest, first = have, false
		}
	}
	if len(labels) == 1 {
		return rarest
	}
	var out []int
	for _, i := range rarest {
		if (Pattern{Labels: labels}).Matches(&ix.doc.Workloads[i]) {
			out = append(out, i)
		}
	}
	return out
}

// MatchAny is the union over several patterns: growing, each position once.
func (ix *Index) MatchAny(patterns []Pattern) []int {
	if len(patterns) == 1 {
		return ix.Match(patterns[0])
	}
	var out []int
	for _, p := range patterns {
		out = append(out, ix.Match(p)...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Matches reports whether the pattern selects w. The zero Pattern selects nothing, and neither do empty labels.
func (p Pattern) Matches(w *Workload) bool {
	switch {
	case !p.ID.IsZero():
		return p.ID == w.ID
	case !p.Zone.IsZero():
		return p.Zone == w.ID.Zone()
	}
	for k, v := range p.Labels {
		if have, ok := w.Labels[k]; !ok || have != v {
			return false
		}
	}
	return len(p.Labels) > 0
}

// PlacedOn reports whether one of the workload's globs selects the node.
func (w *Workload) PlacedOn(node string) bool {
	for _, glob := range w.Nodes {
		if ok, err := path.Match(glob, node); err == nil && ok {
			return true
		}
	}
	return false
}
