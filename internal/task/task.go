// Package task starts goroutines that have an owner, a name and an end.
//
// A Group owns every goroutine that it starts: the first one that fails ends the others, and Wait returns when all have
// ended. A panic becomes an error, so that the owner can stop in order. The name of a task stands in profiles (label
// "task") and in its error.
package task

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"runtime/pprof"
	"sync"
)

// Group is a set of goroutines that live and end together.
type Group struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup
}

// PanicError is the error of a task that panicked.
type PanicError struct {
	Task  string // the name that Go was given
	Value any
	Stack []byte
}

// Error names the panic; the stack is in the field.
func (e *PanicError) Error() string {
	return fmt.Sprintf("internal error: panic in %s: %v", e.Task, e.Value)
}

// New makes a Group whose tasks end when parent does.
func New(parent context.Context) *Group {
	ctx, cancel := context.WithCancelCause(parent)
	return &Group{ctx: ctx, cancel: cancel}
}

// Context ends when the group does.
func (g *Group) Context() context.Context { return g.ctx }

// Go starts f. When it returns an error other than the group's own end, the whole group ends with that error; when it
// returns nil, the others go on. Go must not be called after Wait.
func (g *Group) Go(name string, f func(ctx context.Context) error) {
	g.wg.Go(func() {
		pprof.Do(g.ctx, pprof.Labels("task", name), func(ctx context.Context) {
			if err := run(ctx, name, f); err != nil && !(ctx.Err() != nil && errors.Is(err, ctx.Err())) {
				g.cancel(err)
			}
		})
	})
}

// Stop ends the group; err nil is an orderly end.
func (g *Group) Stop(err error) {
	if err == nil {
		err = errStopped
	}
	g.cancel(err)
}

// Wait returns when every task has ended: the first error, or nil when the group was stopped or its parent ended.
func (g *Group) Wait() error {
	g.wg.Wait()
	cause := context.Cause(g.ctx)
	g.cancel(errStopped)
	if cause == nil || errors.Is(cause, errStopped) || errors.Is(cause, context.Canceled) || errors.Is(cause, context.DeadlineExceeded) {
		return nil
	}
	return cause
}

var errStopped = errors.New("stopped")

func run(ctx context.Context, name string, f func(context.Context) error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = &PanicError{Task: name, Value: r, Stack: debug.Stack()}
		}
	}()
	return f(ctx)
}
