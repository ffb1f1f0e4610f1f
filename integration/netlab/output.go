package netlab

import (
	"bytes"
	"fmt"
	"io"
	"sync"
)

// maxOutput bounds what a Cmd remembers of its program's output; past it the oldest bytes go, and Text says how many.
const maxOutput = 1 << 20

// output keeps the end of what a program wrote and wakes those who wait for a text.
type output struct {
	tee io.Writer // may be nil

	// mu guards what follows.
	mu      sync.Mutex
	buf     []byte
	dropped int
	grown   chan struct{} // closed at the next write, then replaced
}

func newOutput(tee io.Writer) *output { return &output{tee: tee, grown: make(chan struct{})} }

// Write never fails: a tee that does not work must not stop the program that is watched.
func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.buf = append(o.buf, p...)
	// Cutting only at twice the bound keeps the copying in proportion to what is written.
	if len(o.buf) > 2*maxOutput {
		cut := len(o.buf) - maxOutput
		o.dropped += cut
		o.buf = append(o.buf[:0], o.buf[cut:]...)
	}
	close(o.grown)
	o.grown = make(chan struct{})
	if o.tee != nil {
		_, _ = o.tee.Write(p)
	}
	return len(p), nil
}

func (o *output) text() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.dropped > 0 {
		return fmt.Sprintf("[%d bytes before this are gone]\n%s", o.dropped, o.buf)
	}
	return string(o.buf)
}

// lookFor reports whether the text was written, and otherwise what to wait on before the next look.
func (o *output) lookFor(text string) (bool, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return bytes.Contains(o.buf, []byte(text)), o.grown
}
