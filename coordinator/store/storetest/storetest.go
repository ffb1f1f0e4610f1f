// Package storetest is the suite that every implementation of store.Store must pass. A new one joins by calling Run
// from its own tests.
//
// Start at Run.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/signet-overlay/signet/coordinator/store"
)

// Open opens the store with a name; the same name again, after Close, opens the same data.
type Open func(t *testing.T, name string) store.Store

// Run runs the suite.
func Run(t *testing.T, open Open) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Open)
	}{
		{"RevisionsGrowByOne", revisionsGrowByOne},
		{"FailedUpdateLeavesNothing", failedUpdateLeavesNothing},
		{"ConcurrentUpdatesAreSerial", concurrentUpdatesAreSerial},
		{"CrowdIsServed", crowdIsServed},
		{"OneFailureFailsNoOther", oneFailureFailsNoOther},
		{"PanicEndsOnlyItsCaller", panicEndsOnlyItsCaller},
		{"ViewIsConsistent", viewIsConsistent},
		{"ViewCannotWrite", viewCannotWrite},
		{"CancelledContext", cancelledContext},
		{"ClosedStore", closedStore},
		{"EndedTransaction", endedTransaction},
		{"SurvivesReopen", survivesReopen},
		{"Meta", meta},
		{"Numbers", numbers},
		{"Nodes", nodes},
		{"Instances", instances},
		{"Addresses", addresses},
		{"JoinTokens", joinTokens},
		{"APITokens", apiTokens},
		{"Policies", policies},
		{"Revocations", revocations},
		{"Authorities", authorities},
		{"Applied", applied},
		{"Logs", logs},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open) })
	}
}

func ctx() context.Context { return context.Background() }

func update(t *testing.T, s store.Store, fn func(store.Tx) error) uint64 {
	t.Helper()
	rev, err := s.Update(ctx(), fn)
	if err != nil {
		t.Fatalf("Update: %v", err)
	}
	return rev
}

func view(t *testing.T, s store.Store, fn func(store.Tx) error) {
	t.Helper()
	if err := s.View(ctx(), fn); err != nil {
		t.Fatalf("View: %v", err)
	}
}

func same(t *testing.T, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s:\n got %+v\nwant %+v", what, got, want)
	}
}

func fails(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got error %v, want %v", what, err, want)
	}
}

// at is a moment with nanoseconds, which must survive.
var at = time.Date(2026, 3, 4, 5, 6, 7, 89, time.UTC)

func revisionsGrowByOne(t *testing.T, open Open) {
	s := open(t, "a")
	same(t, "first", s.Revision(), uint64(0))
	for want := uint64(1); want <= 5; want++ {
		got := update(t, s, func(tx store.Tx) error {
			same(t, "inside", tx.Revision(), want)
			return nil
		})
		same(t, "returned", got, want)
		same(t, "Revision", s.Revision(), want)
		view(t, s, func(tx store.Tx) error { same(t, "viewed", tx.Revision(), want); return nil })
	}
}

func failedUpdateLeavesNothing(t *testing.T, open Open) {
	s := open(t, "a")
	boom := errors.New("boom")
	_, err := s.Update(ctx(), func(tx store.Tx) error {
		if _, err := tx.NumberFor("x"); err != nil {
			return err
		}
		return boom
	})
	fails(t, "Update", err, boom)
	same(t, "Revision", s.Revision(), uint64(0))
	view(t, s, func(tx store.Tx) error {
		got, err := tx.Numbers(0)
		same(t, "numbers", len(got), 0)
		return err
	})
	same(t, "next revision", update(t, s, func(store.Tx) error { return nil }), uint64(1))
}

func concurrentUpdatesAreSerial(t *testing.T, open Open) {
	s := open(t, "a")
	const writers, each = 20, 10
	var mu sync.Mutex
	seen := map[uint64]bool{}
	values := map[uint64]bool{}
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				var value uint64
				rev, err := s.Update(ctx(), func(tx store.Tx) (err error) {
					value, err = tx.Next(store.CounterHost6)
					return err
				})
				if err != nil {
					t.Errorf("Update: %v", err)
					return
				}
				mu.Lock()
				if seen[rev] || values[value] {
					t.Errorf("revision %d or value %d came twice", rev, value)
				}
				seen[rev], values[value] = true, true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	same(t, "Revision", s.Revision(), uint64(writers*each))
}

// crowdIsServed has more callers waiting at once than any batch takes.
func crowdIsServed(t *testing.T, open Open) {
	s := open(t, "a")
	const crowd = 1500
	var wg sync.WaitGroup
	for range crowd {
		wg.Go(func() {
			if _, err := s.Update(ctx(), func(store.Tx) error { return nil }); err != nil {
				t.Errorf("Update: %v", err)
			}
		})
	}
	wg.Wait()
	same(t, "Revision", s.Revision(), uint64(crowd))
}

func oneFailureFailsNoOther(t *testing.T, open Open) {
	s := open(t, "a")
	boom := errors.New("boom")
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			_, err := s.Update(ctx(), func(tx store.Tx) error {
				if err := tx.PutNodeKey([32]byte{byte(i)}, fmt.Sprint(i)); err != nil {
					return err
				}
				if i%3 == 0 {
					return boom
				}
				if i%3 == 1 { // an SQL error that the function passes on
					return tx.PutNodeKey([32]byte{byte(i)}, "another")
				}
				return nil
			})
			want := [3]error{boom, store.ErrDuplicate, nil}[i%3]
			if !errors.Is(err, want) {
				t.Errorf("update %d: got %v, want %v", i, err, want)
			}
		})
	}
	wg.Wait()
	same(t, "Revision", s.Revision(), uint64(20))
	view(t, s, func(tx store.Tx) error {
		for i := range 60 {
			_, err := tx.NodeKey([32]byte{byte(i)})
			if stands := err == nil; stands != (i%3 == 2) {
				t.Errorf("key %d: %v", i, err)
			}
		}
		return nil
	})
}

func panicEndsOnlyItsCaller(t *testing.T, open Open) {
	s := open(t, "a")
	func() {
		defer func() { same(t, "recovered", recover(), any("ouch")) }()
		_, _ = s.Update(ctx(), func(tx store.Tx) error {
			_, _ = tx.NumberFor("x")
			panic("ouch")
		})
	}()
	same(t, "next", update(t, s, func(tx store.Tx) error {
		got, err := tx.Numbers(0)
		same(t, "numbers", len(got), 0)
		return err
	}), uint64(1))
}

func viewIsConsistent(t *testing.T, open Open) {
	s := open(t, "a")
	update(t, s, func(tx store.Tx) error { _, err := tx.NumberFor("x"); return err })
	view(t, s, func(tx store.Tx) error {
		update(t, s, func(tx store.Tx) error { _, err := tx.NumberFor("y"); return err })
		got, err := tx.Numbers(0)
		same(t, "numbers inside the older view", got, map[string]uint32{"x": 256})
		same(t, "revision inside the older view", tx.Revision(), uint64(1))
		return err
	})
	view(t, s, func(tx store.Tx) error { same(t, "revision after", tx.Revision(), uint64(2)); return nil })
}

func viewCannotWrite(t *testing.T, open Open) {
	s := open(t, "a")
	err := s.View(ctx(), func(tx store.Tx) error { _, err := tx.NumberFor("x"); return err })
	fails(t, "View", err, store.ErrReadOnly)
}

func cancelledContext(t *testing.T, open Open) {
	s := open(t, "a")
	c, cancel := context.WithCancel(ctx())
	holding, release := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = s.Update(ctx(), func(store.Tx) error { close(holding); <-release; return nil })
	})
	<-holding
	wg.Go(func() {
		_, err := s.Update(c, func(store.Tx) error { t.Error("ran"); return nil })
		fails(t, "Update", err, context.Canceled)
		close(release)
	})
	cancel()
	wg.Wait()
	same(t, "Revision", s.Revision(), uint64(1))
}

func closedStore(t *testing.T, open Open) {
	s := open(t, "a")
	if err := s.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatalf("second Close: %v", err)
	}
	_, err := s.Update(ctx(), func(store.Tx) error { return nil })
	fails(t, "Update", err, store.ErrClosed)
	fails(t, "View", s.View(ctx(), func(store.Tx) error { return nil }), store.ErrClosed)
}

func endedTransaction(t *testing.T, open Open) {
	s := open(t, "a")
	var kept store.Tx
	update(t, s, func(tx store.Tx) error { kept = tx; return nil })
	if _, err := kept.NumberFor("x"); err == nil {
		t.Error("a transaction wrote after its function had returned")
	}
}

func survivesReopen(t *testing.T, open Open) {
	s := open(t, "a")
	update(t, s, func(tx store.Tx) error { _, err := tx.NumberFor("x"); return err })
	if err := s.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	s = open(t, "a")
	same(t, "Revision", s.Revision(), uint64(1))
	update(t, s, func(tx store.Tx) error {
		n, err := tx.NumberFor("x")
		same(t, "number of x", n, uint32(256))
		return err
	})
	other := open(t, "b")
	same(t, "another store's Revision", other.Revision(), uint64(0))
}
