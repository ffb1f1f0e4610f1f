package enforce

import "testing"

// TestBenchEstablished keeps the benchmark working; its figure is make bench's to judge, on a quieter machine.
func TestBenchEstablished(t *testing.T) {
	needRoot(t)
	for _, entries := range []int{10, 100_000} {
		ns, err := BenchEstablished(entries)
		must(t, err, "bench")
		t.Logf("established flow, %d entries: %.1f ns net of the harness", entries, ns)
		if ns <= 0 || ns > 2000 {
			t.Errorf("%.1f ns is no sane figure", ns)
		}
	}
}
