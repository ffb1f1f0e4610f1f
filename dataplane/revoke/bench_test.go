package revoke

import (
	"context"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
)

// BenchmarkSweep visits 100,000 established sockets, once all allowed and in the overlay, once all outside it.
func BenchmarkSweep(b *testing.B) {
	const sockets = 100_000
	for _, c := range []struct{ name, at string }{{"overlay", "198.18.0.5"}, {"outside", "127.0.0.1"}} {
		for _, k := range kinds {
			b.Run(c.name+"/"+string(k), func(b *testing.B) {
				l := newLab(b)
				l.enforce()
				v := l.view()
				permit(v, 11, numA, numA, flow.TCP, 0)
				l.apply(v)
				const processes = 10 // each has its limit of open files
				for i := range processes {
					l.start("a").want("ok", "many %d %s:%d", sockets/2/processes, c.at, 80+i)
				}
				r := l.revoker(k)
				for b.Loop() {
					if n, err := r.Sweep(context.Background()); n != 0 || err != nil {
						b.Fatalf("sweep ended %d sockets: %v", n, err)
					}
				}
				b.StopTimer()
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/sockets, "ns/socket")
				l.apply(l.view())
				began := time.Now()
				n, err := r.Sweep(context.Background())
				b.Logf("everything taken back: %d sockets ended in %v, %v", n, time.Since(began), err)
			})
		}
	}
}
