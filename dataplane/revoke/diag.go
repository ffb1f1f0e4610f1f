package revoke

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/bpf"
	"github.com/signet-overlay/signet/internal/flow"
)

// maxCondemned bounds what one listing collects; where more is to go, the rest is listed again.
const maxCondemned = 1 << 16

// maxRounds bounds how often one sweep lists. It is reached only where more than four million sockets are to go.
const maxRounds = 64

// diag lists sockets over netlink, and asks a Judge.
type diag struct {
	cfg            Config
	conns4, conns6 *ebpf.Map
}

// tables are what is listed.
var tables = []struct {
	family uint8
	proto  flow.Proto
	states uint32
}{
	{unix.AF_INET, flow.TCP, tcpStates}, {unix.AF_INET6, flow.TCP, tcpStates},
	{unix.AF_INET, flow.UDP, udpStates}, {unix.AF_INET6, flow.UDP, udpStates},
}

// openDiag makes sure that this kernel destroys sockets of both protocols and that this process may ask for it.
func openDiag(cfg Config) (sweeper, error) {
	if cfg.Judge == nil {
		return nil, errors.New("nobody judges in Go")
	}
	nl, err := dial()
	if err != nil {
		return nil, err
	}
	defer nl.close()
	for _, proto := range []flow.Proto{flow.TCP, flow.UDP} {
		// A listing of no state is empty where the kernel lists the protocol (it may load a module for it).
		if err := nl.dump(context.Background(), unix.AF_INET, proto, 0, func(*listed) error { return nil }); err != nil {
			return nil, fmt.Errorf("list %v sockets: %w", proto, err)
		}
		// No socket has port 0 at both ends: a kernel that can destroy says that there is none.
		nobody := listed{family: unix.AF_INET, proto: proto}
		if _, err := nl.destroy(&nobody); err != nil {
			return nil, fmt.Errorf("%v sockets: %w", proto, err)
		}
	}
	// Without the judge's own table every connection would look like one that it does not track.
	d := &diag{cfg: cfg}
	for name, to := range map[string]**ebpf.Map{bpf.RevokeMapConns4: &d.conns4, bpf.RevokeMapConns6: &d.conns6} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(cfg.Maps, name), &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open the judge's map %s: %w", name, err), d.close())
		}
		*to = m
	}
	return d, nil
}

func (d *diag) close() error { return errors.Join(d.conns4.Close(), d.conns6.Close()) }

func (d *diag) sweep(ctx context.Context) (int, error) {
	nl, err := dial()
	if err != nil {
		return 0, err
	}
	defer nl.close()
	total := 0
	for range maxRounds {
		condemned, more, err := d.condemned(ctx, nl)
		if err != nil {
			return total, err
		}
		n, err := end(ctx, nl, condemned)
		total += n
		if err != nil || !more {
			return total, err
		}
		if n == 0 {
			break
		}
	}
	return total, errors.New("more sockets are to go than one sweep can end")
}

// condemned lists the sockets that are to go; more says that there was no room for all of them. Nothing is destroyed
// meanwhile, because the kernel counts how far a listing has come.
func (d *diag) condemned(ctx context.Context, nl *netlink) (out []listed, more bool, err error) {
	for _, t := range tables {
		err := nl.dump(ctx, t.family, t.proto, t.states, func(l *listed) error {
			ok, err := d.allowed(l)
			if err != nil || ok {
				return err
			}
			if len(out) < maxCondemned {
				out = append(out, *l)
			} else {
				more = true
			}
			return nil
		})
		if err != nil {
			return nil, false, fmt.Errorf("list %v sockets: %w", t.proto, err)
		}
	}
	return out, more, nil
}

// allowed asks the Judge about sockets that are its business.
func (d *diag) allowed(l *listed) (bool, error) {
	t := l.tuple()
	if t.Dst.Port() == 0 || t.Dst.Addr().IsUnspecified() || t.Src.Addr().IsUnspecified() || l.left() {
		return true, nil
	}
	if !d.cfg.inOverlay(t.Src.Addr()) && !d.cfg.inOverlay(t.Dst.Addr()) {
		return true, nil
	}
	opener, err := d.opener(t)
	if err != nil {
		return false, err
	}
	return d.cfg.Judge(Socket{Tuple: t, Opener: opener, Opening: t.Proto == flow.UDP || l.state == stateSynSent, UID: l.uid}), nil
}

// opener asks the judge's table who opened a flow.
func (d *diag) opener(t flow.Tuple) (Opener, error) {
	canonical, swapped := t.Canonical()
	c, err := d.lookup(canonical)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return OpenerUnknown, nil
	}
	if err != nil {
		return OpenerUnknown, fmt.Errorf("look up %v: %w", t, err)
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return OpenerUnknown, fmt.Errorf("read the clock: %w", err)
	}
	switch {
	case uint32(now.Nano()>>bpf.ConnStep) >= c.Deadline:
		return OpenerUnknown, nil
	case c.State&bpf.ConnSwapped != 0 == swapped:
		return OpenerLocal, nil
	}
	return OpenerRemote, nil
}

// lookup finds a canonical tuple in the table of its family.
func (d *diag) lookup(t flow.Tuple) (c bpf.JudgeConn, err error) {
	src, dst := words(t.Src.Addr()), words(t.Dst.Addr())
	if t.Src.Addr().Is4() {
		k := bpf.JudgeTuple4{Src: src[3], Dst: dst[3], Sport: t.Src.Port(), Dport: t.Dst.Port(), Proto: uint8(t.Proto)}
		err = d.conns4.Lookup(k, &c)
		return c, err //nolint:wrapcheck // the caller names the tuple
	}
	k := bpf.JudgeTuple{Sport: t.Src.Port(), Dport: t.Dst.Port(), Proto: uint8(t.Proto)}
	k.Src.W, k.Dst.W = src, dst
	err = d.conns6.Lookup(k, &c)
	return c, err //nolint:wrapcheck // the caller names the tuple
}

// end destroys the sockets that are there still.
func end(ctx context.Context, nl *netlink, all []listed) (destroyed int, err error) {
	var errs []error
	for i := range all {
		if err := ctx.Err(); err != nil {
			return destroyed, err
		}
		gone, err := nl.destroy(&all[i])
		if err != nil && len(errs) < 8 { // the rest would say the same
			errs = append(errs, fmt.Errorf("end %v: %w", all[i].tuple(), err))
		}
		if gone {
			destroyed++
		}
	}
	return destroyed, errors.Join(errs...)
}
