package session_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/proto/codec"
	"github.com/signet-overlay/signet/proto/signetv1"
)

// BenchmarkPropagation measures a policy change from its commit until the reports of all agents are in: real store,
// compilation, TLS, gRPC, agents. Everything shares one machine and process. "verified" agents check every Binding
// again for each Update, as codec.Apply does; the work of 200 hosts is then done by one. "light" ones only read the
// manifest, so that what is left is the coordinator's part.
func BenchmarkPropagation(b *testing.B) {
	b.Run("verified-20", func(b *testing.B) { propagation(b, 20, (*line).verify) })
	b.Run("light-20", func(b *testing.B) { propagation(b, 20, (*line).skim) })
	b.Run("light-200", func(b *testing.B) { propagation(b, 200, (*line).skim) })
}

func (l *line) verify(u *signetv1.Update) error {
	if err := l.h.hold(u); err != nil {
		return err
	}
	l.ack("")
	return nil
}

func (l *line) skim(u *signetv1.Update) error {
	m := codec.Claimed(u)
	return l.stream.Send(&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Ack{Ack: &signetv1.Ack{Epoch: m.Epoch, PolicyRevision: m.PolicyRevision}}})
}

func propagation(b *testing.B, n int, apply func(*line, *signetv1.Update) error) {
	r := newRig(b)
	hosts, enrolled := many(b, r, n)
	var wg sync.WaitGroup
	var lines []*line
	b.Cleanup(func() {
		for _, l := range lines {
			l.close()
		}
		wg.Wait()
	})
	for _, h := range hosts {
		l := h.connect()
		lines = append(lines, l)
		wg.Go(func() {
			for {
				m, err := l.stream.Recv()
				if err != nil {
					return
				}
				if u := m.GetUpdate(); u != nil {
					if err := apply(l, u); err != nil {
						b.Error(err)
						return
					}
				}
			}
		})
	}
	wake, cancel := r.srv.Watch()
	b.Cleanup(cancel)
	at := func(rev uint64) int {
		done := 0
		for _, rep := range r.srv.Reports() {
			if rep.PolicyRevision >= rev {
				done++
			}
		}
		return done
	}
	r.eventually("all agents hold the first policy", wake, func() bool { return at(1) == n })
	var each []time.Duration
	b.ResetTimer()
	for i := range b.N {
		text := document
		if i%2 == 0 {
			text += hookRule
		}
		start := time.Now()
		rev := r.apply(text + strings.Repeat("#", i%7))
		r.eventually("all agents have the change", wake, func() bool { return at(rev) == n })
		each = append(each, time.Since(start))
	}
	b.StopTimer()
	slices.Sort(each)
	ms := func(q float64) float64 { return float64(each[int(q*float64(len(each)-1))].Microseconds()) / 1000 }
	b.ReportMetric(ms(0.5), "ms/p50")
	b.ReportMetric(ms(0.99), "ms/p99")
	b.ReportMetric(float64(n)/enrolled.Seconds(), "enrolments/s")
	fmt.Printf("{\"name\":\"coordinator/propagation/%s\",\"p50_ms\":%.1f,\"p99_ms\":%.1f,\"max_ms\":%.1f,\"changes\":%d}\n", strings.TrimPrefix(b.Name(), "BenchmarkPropagation/"), ms(0.5), ms(0.99), ms(1), len(each))
}

// many enrols n hosts at once, one in ten of them a database.
func many(b *testing.B, r *rig, n int) ([]*host, time.Duration) {
	secret := r.token(registry.TokenRequest{Node: "*", Uses: uint32(n)})
	var wg sync.WaitGroup
	begin := time.Now()
	hosts := make([]*host, n)
	for i := range n {
		name := fmt.Sprintf("api-%d", i)
		if i%10 == 0 {
			name = fmt.Sprintf("db-%d", i)
		}
		hosts[i] = r.newHost(name)
		wg.Go(func() {
			if _, err := hosts[i].enrol(secret); err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	return hosts, time.Since(begin)
}
