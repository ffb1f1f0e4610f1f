package agent

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestMemoryIsGivenBackOnceABurstIsOver: once for a burst, and never while nothing happens.
func TestMemoryIsGivenBackOnceABurstIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &Agent{facts: facts{grown: make(chan struct{}, 1)}}
		var freed atomic.Int32
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = a.trimMemory(ctx, func() { freed.Add(1) }) }()
		wait := func(d time.Duration) { <-time.After(d); synctest.Wait() }
		wait(time.Hour)
		for range 20 {
			a.took()
			wait(trimAfter / 2)
		}
		if freed.Load() != 0 {
			t.Errorf("freed %d times with nothing or too much to do", freed.Load())
		}
		wait(time.Hour)
		if freed.Load() != 1 {
			t.Errorf("freed %d times after one burst", freed.Load())
		}
	})
}
