package task_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/signet-overlay/signet/internal/task"
)

func TestFirstErrorEndsTheGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := task.New(t.Context())
		want := errors.New("broken")
		ended := false
		g.Go("waiter", func(ctx context.Context) error { <-ctx.Done(); ended = true; return ctx.Err() })
		g.Go("breaker", func(context.Context) error { return want })
		err := g.Wait()
		if !errors.Is(err, want) {
			t.Errorf("Wait gave %v", err)
		}
		if !ended {
			t.Error("Wait did not wait for every task")
		}
	})
}

func TestPanicIsAnError(t *testing.T) {
	g := task.New(t.Context())
	g.Go("bug", func(context.Context) error { panic("no") })
	var p *task.PanicError
	if err := g.Wait(); !errors.As(err, &p) || len(p.Stack) == 0 {
		t.Errorf("Wait gave %v", err)
	}
}

func TestStopAndParentAreOrderly(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	for _, end := range []func(*task.Group){func(g *task.Group) { g.Stop(nil) }, func(*task.Group) { cancel() }} {
		g := task.New(ctx)
		g.Go("waiter", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
		end(g)
		if err := g.Wait(); err != nil {
			t.Errorf("Wait gave %v", err)
		}
	}
}

func TestNilLeavesTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := task.New(t.Context())
		g.Go("short", func(context.Context) error { return nil })
		synctest.Wait()
		if g.Context().Err() != nil {
			t.Error("a task that ended well ended the group")
		}
		g.Stop(nil)
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
}
