package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

const (
	// maxPort bounds what is kept of one serial port. What a guest says beyond it ends the run: a test that prints
	// without end would fill this machine's memory.
	maxPort = 64 << 20
	// bootLimit is what a guest may take to boot, load its modules and power off, beside the binaries.
	bootLimit = 2 * time.Minute
	// afterKill is how long the pipes of a killed emulator are waited for.
	afterKill = 5 * time.Second
)

// Options says how a guest is run. The zero value is one processor, 1024 MiB of memory and ten minutes for each binary.
type Options struct {
	CPUs   int           // virtual processors
	Memory int           // MiB; the image and everything that tests write has to fit
	Limit  time.Duration // of each binary

	// Console and Output get copies of the two serial ports as they come, the kernel's messages and what the binaries
	// write; either may be nil. What they fail to take ends the run.
	Console, Output io.Writer
}

func (o Options) withDefaults() Options {
	if o.CPUs <= 0 {
		o.CPUs = 1
	}
	if o.Memory <= 0 {
		o.Memory = 1024
	}
	if o.Limit <= 0 {
		o.Limit = 10 * time.Minute
	}
	if o.Console == nil {
		o.Console = io.Discard
	}
	if o.Output == nil {
		o.Output = io.Discard
	}
	return o
}

// Run boots a kernel with an image, lets it run all binaries one after the other, and reads what they said. The guest
// ends when it has powered off, when ctx ends, or after the limits of all binaries plus two minutes.
//
// The Report is complete or says what is missing: a binary that did not come to its end, or was never begun, is in it.
// When the guest itself failed (it did not boot, a module did not load, the kernel panicked) there is an error too, with
// the last lines of the console, and the Report has what was known until then.
func Run(ctx context.Context, k Kernel, img Image, o Options) (*Report, error) {
	o = o.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, bootLimit+time.Duration(len(img.Binaries))*(o.Limit+killAfter))
	defer cancel()
	dir, err := os.MkdirTemp("", "signet-vm-")
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", k.Release, err)
	}
	defer os.RemoveAll(dir)
	initrd := filepath.Join(dir, "initrd")
	if err := writeImage(ctx, initrd, k, img, o.Limit); err != nil {
		return nil, err
	}
	began := time.Now()
	console, results, runErr := emulate(ctx, k, initrd, o)
	report := &Report{Kernel: k, Elapsed: time.Since(began), Console: console}
	if err := report.read(ctx, results, img.Binaries); err != nil {
		return report, fmt.Errorf("run %s: %w", k.Release, err)
	}
	if err := errors.Join(runErr, report.broken); err != nil {
		return report, fmt.Errorf("run %s: %w; the console ends with:\n%s", k.Release, err, tail(console, 20))
	}
	return report, nil
}

func writeImage(ctx context.Context, name string, k Kernel, img Image, limit time.Duration) error {
	f, err := os.Create(name)
	if err != nil {
		return fmt.Errorf("make image for %s: %w", k.Release, err)
	}
	return errors.Join(img.write(ctx, f, k, limit), f.Close())
}

// emulate runs the emulator to its end and returns what came out of the guest's two serial ports. Both are pipes that
// the emulator opens as files.
func emulate(ctx context.Context, k Kernel, initrd string, o Options) (console, results []byte, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", qemuArgs(k, initrd, o)...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &said, &said, afterKill
	// Ctrl-C goes to the test, which then ends the guest; a test that is killed takes its guest along.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	ports := make([]*port, 2)
	for i, copied := range []io.Writer{o.Console, o.Output} {
		p, err := newPort(copied, cancel)
		if err != nil {
			return nil, nil, errors.Join(err, closePorts(ports[:i]))
		}
		ports[i] = p
		cmd.ExtraFiles = append(cmd.ExtraFiles, p.writer)
	}
	err = cmd.Run()
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	if err != nil {
		err = fmt.Errorf("qemu-system-x86_64: %w%s", err, lastLine(said.String()))
	}
	err = errors.Join(err, closePorts(ports))
	return ports[0].data, ports[1].data, err
}

// qemuArgs is a machine without disk and network. File descriptors 3 and 4 are the ports' pipes.
func qemuArgs(k Kernel, initrd string, o Options) []string {
	return []string{
		"-accel", "tcg", "-cpu", "max", "-smp", strconv.Itoa(o.CPUs), "-m", strconv.Itoa(o.Memory),
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
		"-serial", "file:/dev/fd/3", "-serial", "file:/dev/fd/4",
		"-kernel", k.Image, "-initrd", initrd,
		// panic=-1 resets at once, and -no-reboot turns that into the end. What is less than a warning is left out.
		"-append", "console=ttyS0 panic=-1 loglevel=5 lsm=landlock,bpf",
	}
}

// port collects what comes out of one serial port.
type port struct {
	writer *os.File // the emulator's end
	reader *os.File
	done   chan struct{} // closed when data and err are final
	data   []byte
	err    error
}

var errTooMuch = fmt.Errorf("the guest wrote more than %d MiB to a serial port", maxPort>>20)

// newPort begins to read. Too much to keep, or a copy that fails, cancels the run; the rest is then read and dropped, so that the emulator never
// waits for a reader.
func newPort(copied io.Writer, cancel context.CancelCauseFunc) (*port, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p := &port{writer: w, reader: r, done: make(chan struct{})}
	go p.collect(copied, cancel)
	return p, nil
}

// collect is the one goroutine of a port; closePorts waits for it.
func (p *port) collect(copied io.Writer, cancel context.CancelCauseFunc) {
	defer close(p.done)
	p.data, p.err = io.ReadAll(io.TeeReader(io.LimitReader(p.reader, maxPort), copied))
	if len(p.data) == maxPort {
		p.err = errTooMuch
	}
	if p.err != nil {
		cancel(p.err)
		_, _ = io.Copy(io.Discard, p.reader)
	}
}

// closePorts is called when the emulator has ended, and nobody else can have the writing ends.
func closePorts(ports []*port) error {
	var errs []error
	for _, p := range ports {
		errs = append(errs, p.writer.Close())
		<-p.done
		errs = append(errs, p.err, p.reader.Close())
	}
	return errors.Join(errs...)
}

// tail is the last n lines of text.
func tail(text []byte, n int) []byte {
	lines := bytes.Split(bytes.TrimRight(text, "\r\n"), []byte("\n"))
	return bytes.Join(lines[max(len(lines)-n, 0):], []byte("\n"))
}
