package netlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// pipeGrace is how long Wait goes on for output after the program has ended, when a child of it holds the pipe open.
const pipeGrace = time.Second

// Opts says how a program is run on a host. The zero value is root, in the host's root cgroup, with this process's
// environment and directory and no input.
type Opts struct {
	Cgroup string    // path below the host's root, made if it is not there; empty is the root itself
	UID    int       // zero is root
	GID    int       // used only with a UID
	Env    []string  // the whole environment; nil means that of this process
	Dir    string    // working directory; empty means that of this process
	Stdin  io.Reader // nil means /dev/null
	Stdout io.Writer // gets a copy of output and errors as they come; may be nil
}

// Cmd is one run of a program on a host. Like exec.Cmd it runs once; unlike it, Wait may be called from several goroutines
// and more than once.
type Cmd struct {
	host   *Host
	name   string
	cgroup string
	cmd    *exec.Cmd
	out    *output
	used   atomic.Bool
	done   chan struct{} // closed when the program has ended and err is set
	err    error
}

// Command prepares a program. When ctx ends before the program does, the program is killed.
func (h *Host) Command(ctx context.Context, o Opts, name string, args ...string) *Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	out := newOutput(o.Stdout)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = o.Stdin, out, out
	cmd.Env, cmd.Dir, cmd.WaitDelay = o.Env, o.Dir, pipeGrace
	// A process group of its own: Ctrl-C at the terminal of a demo must stop the demo, which then stops its hosts in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, UseCgroupFD: true}
	if o.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(o.UID), Gid: uint32(o.GID)}
	}
	return &Cmd{host: h, name: name, cgroup: o.Cgroup, cmd: cmd, out: out, done: make(chan struct{})}
}

// Start starts the program. The kernel makes the process inside the cgroup (clone3 with CLONE_INTO_CGROUP), and a child has
// the namespace of the thread that made it: at no moment is it anywhere else.
func (c *Cmd) Start() error {
	if c.used.Swap(true) {
		return fmt.Errorf("run %s on %s: started before", c.name, c.host.name)
	}
	if err := c.start(); err != nil {
		c.err = fmt.Errorf("run %s on %s: %w", c.name, c.host.name, err)
		close(c.done)
		return c.err
	}
	go c.reap()
	return nil
}

func (c *Cmd) start() error {
	dir := c.host.cgroup
	if c.cgroup != "" {
		var err error
		if dir, err = c.host.Cgroup(c.cgroup); err != nil {
			return err
		}
	}
	cgroup, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer cgroup.Close()
	c.cmd.SysProcAttr.CgroupFD = int(cgroup.Fd())
	return c.host.Do(func() error {
		l := c.host.lab
		// Held over the start: a process is either known to Close or refused.
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.closed {
			return ErrClosed
		}
		if err := c.cmd.Start(); err != nil {
			return err
		}
		l.cmds[c] = struct{}{}
		return nil
	})
}

// reap is the one goroutine of a Cmd; it ends with the program, and Lab.Close waits for it.
func (c *Cmd) reap() {
	err := c.cmd.Wait()
	// The program itself succeeded; only a daemon that it left behind still has its output open.
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	if err != nil {
		c.err = fmt.Errorf("%s on %s: %w%s", c.name, c.host.name, err, lastLine(c.out.text()))
	}
	c.host.lab.mu.Lock()
	delete(c.host.lab.cmds, c)
	c.host.lab.mu.Unlock()
	close(c.done)
}

func lastLine(text string) string {
	text = strings.TrimSpace(text)
	if text == "" {
		return ""
	}
	return ": " + text[strings.LastIndexByte(text, '\n')+1:]
}

// Wait waits for the program's end. The error holds an *exec.ExitError when it did not exit with 0, and its last line of
// output.
func (c *Cmd) Wait() error {
	if !c.used.Load() {
		return fmt.Errorf("%s on %s: not started", c.name, c.host.name)
	}
	<-c.done
	return c.err
}

// Run is Start and Wait.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the program and returns what it wrote, output and errors together.
func (c *Cmd) Output() (string, error) {
	err := c.Run()
	return c.Text(), err
}

// Text is what the program has written so far, output and errors together; of more than a megabyte, the end.
func (c *Cmd) Text() string { return c.out.text() }

// Done is closed when the program has ended.
func (c *Cmd) Done() <-chan struct{} { return c.done }

// PID is the process id, 0 before Start.
func (c *Cmd) PID() int {
	if c.cmd.Process == nil {
		return 0
	}
	return c.cmd.Process.Pid
}

// Kill sends a signal to the process, and to no other that may have got its number since. It fails with os.ErrProcessDone
// when the process has ended.
func (c *Cmd) Kill(sig syscall.Signal) error {
	if c.cmd.Process == nil {
		return os.ErrProcessDone
	}
	return c.cmd.Process.Signal(sig)
}

// WaitFor waits until the program has written the text. It fails when the program ends without it or ctx ends.
func (c *Cmd) WaitFor(ctx context.Context, text string) error {
	for {
		found, grown := c.out.lookFor(text)
		if found {
			return nil
		}
		select {
		case <-grown:
		case <-c.done:
			if found, _ := c.out.lookFor(text); found {
				return nil
			}
			return fmt.Errorf("%s on %s ended without writing %q%s", c.name, c.host.name, text, lastLine(c.Text()))
		case <-ctx.Done():
			return fmt.Errorf("wait for %s on %s to write %q: %w%s", c.name, c.host.name, text, ctx.Err(), lastLine(c.Text()))
		}
	}
}
