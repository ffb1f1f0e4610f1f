package attack

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

// Kinds of attack.
const (
	Socket = "socket" // a TCP or UDP socket with tricks
	Raw    = "raw"    // raw IP sockets, whose packets are made by the sender
	Packet = "packet" // a packet socket on a device
	XDP    = "xdp"    // AF_XDP
	Cage   = "cage"   // any of these from a user and network namespace of its own
)

// Tricks of the kind Socket, in the order in which they are done.
const (
	FreeBind    = "freebind"
	Transparent = "transparent"
	Device      = "device"    // SO_BINDTODEVICE
	Mark        = "mark"      // SO_MARK
	ReusePort   = "reuseport" // SO_REUSEPORT
	Route       = "route"     // IP_OPTIONS with a loose source route by way of Via
	Bind        = "bind"      // to Src
	Connect     = "connect"
	Dissolve    = "dissolve" // connect to Before, then AF_UNSPEC, before all else
	PacketInfo  = "pktinfo"  // Src as ancillary data
	FastOpen    = "fastopen" // data in the SYN
	Bypass      = "bypass"   // PACKET_QDISC_BYPASS, of the kind Packet
)

// Spec is one attack.
type Spec struct {
	Kind   string         `json:"kind"`
	Proto  string         `json:"proto,omitempty"`  // tcp, udp, mptcp or ping
	V6     bool           `json:"v6,omitempty"`     // an IPv6 socket; IPv4 addresses are then mapped
	Tricks []string       `json:"tricks,omitempty"` // see the constants
	Src    netip.AddrPort `json:"src,omitzero"`
	Dst    netip.AddrPort `json:"dst,omitzero"`
	Before netip.AddrPort `json:"before,omitzero"` // of Dissolve
	Via    netip.Addr     `json:"via,omitzero"`    // of Route
	// Device is of the trick of that name, and of the kind Packet; MAC is where the latter sends to.
	Device string `json:"device,omitempty"`
	MAC    []byte `json:"mac,omitempty"`
	// Frame makes Packet send whole Ethernet frames, and Claim is the protocol that it tells the kernel they are of: the
	// kernel takes its word for it on the way out, and reads the frame on the way in. Tags puts the packet behind so many
	// VLAN tags of identifier 0, which receivers take off.
	Frame bool   `json:"frame,omitempty"`
	Claim uint16 `json:"claim,omitempty"`
	Tags  int    `json:"tags,omitempty"`
	Mark  int    `json:"mark,omitempty"`
	// Packets are sent as they are by Raw and Packet.
	Packets [][]byte `json:"packets,omitempty"`
	Payload string   `json:"payload,omitempty"`
	// Drop gives up the rights that make a root process the host itself (see Boundary).
	Drop bool `json:"drop,omitempty"`
	// Wait is how many milliseconds a TCP connection may take; at 0 its outcome is not waited for.
	Wait int `json:"wait,omitempty"`
	// Hold waits for a line of input between opening the socket and using it.
	Hold bool `json:"hold,omitempty"`
	// Give hands the opened socket over at this path of a Unix socket; Take takes one from there.
	Give string `json:"give,omitempty"`
	Take string `json:"take,omitempty"`
	// Setup are commands that Cage runs inside before the attacks that come on its input.
	Setup [][]string `json:"setup,omitempty"`
}

// Boundary are the capabilities whose holder is the host itself, so that no judge can hold it: those that change the
// network and programs, and those that reach into other processes or the kernel. CAP_NET_RAW is not among them.
var Boundary = []int{
	unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_SYS_PTRACE, unix.CAP_SYS_MODULE,
	unix.CAP_SYS_RAWIO, unix.CAP_SYS_BOOT, unix.CAP_MAC_ADMIN,
}

// Main runs the attack that the JSON text describes; for a dash, those that come on standard input, one a line.
func Main(ctx context.Context, text string) error {
	if text == "-" {
		return many(ctx, bufio.NewReader(os.Stdin), os.Stdout)
	}
	var s Spec
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return fmt.Errorf("read attack: %w", err)
	}
	return Run(ctx, s, os.Stdin, os.Stdout)
}

// many runs attacks until the input ends. An attack that could not be tried is told and does not end the others.
func many(ctx context.Context, in *bufio.Reader, out io.Writer) error {
	for {
		line, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the next attack: %w", err)
		}
		var s Spec
		if err := json.Unmarshal(line, &s); err != nil {
			return fmt.Errorf("read the next attack: %w", err)
		}
		if err := Run(ctx, s, in, out); err != nil {
			fmt.Fprintf(out, "failed %v\nend\n", err)
		}
	}
}

// Run runs the attack on a thread of its own, so that the rights it gives up are only that thread's. The error is of an
// attack that could not even be tried; a refusal is a line of the output.
func Run(ctx context.Context, s Spec, in io.Reader, out io.Writer) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- run(ctx, s, in, out)
	}()
	return <-done
}

// Here is Run on the calling thread, which the caller may have taken into another namespace.
func Here(ctx context.Context, s Spec, in io.Reader, out io.Writer) error {
	return run(ctx, s, in, out)
}

func run(ctx context.Context, s Spec, in io.Reader, out io.Writer) error {
	a := &attacker{Spec: s, in: bufio.NewReader(in), out: out, fd: -1}
	defer a.close()
	if s.Drop {
		if err := drop(); err != nil {
			return err
		}
	}
	var err error
	switch s.Kind {
	case Socket:
		err = a.socket()
	case Raw:
		err = a.raw()
	case Packet:
		err = a.packet()
	case XDP:
		err = a.xdp()
	case Cage:
		err = a.cage(ctx)
	default:
		err = fmt.Errorf("unknown attack %q", s.Kind)
	}
	if err != nil && !errors.Is(err, errRefused) {
		return err
	}
	fmt.Fprintln(out, "end")
	return nil
}

// errRefused ends an attack whose refusal was told.
var errRefused = errors.New("refused")

type attacker struct {
	Spec
	in  *bufio.Reader
	out io.Writer
	fd  int
}

func (a *attacker) close() {
	if a.fd >= 0 {
		unix.Close(a.fd)
	}
}

func (a *attacker) does(trick string) bool { return slices.Contains(a.Tricks, trick) }

// step tells the outcome of a system call.
func (a *attacker) step(name string, err error) error {
	if err == nil {
		fmt.Fprintln(a.out, "step", name, "ok")
		return nil
	}
	text := err.Error()
	var errno unix.Errno
	if errors.As(err, &errno) {
		text = unix.ErrnoName(errno)
	}
	fmt.Fprintln(a.out, "step", name, text)
	return errRefused
}

// hold waits for the caller where the Spec says so.
func (a *attacker) hold() error {
	if !a.Hold {
		return nil
	}
	fmt.Fprintln(a.out, "opened")
	if _, err := a.in.ReadString('\n'); err != nil {
		return fmt.Errorf("wait for the word to go on: %w", err)
	}
	return nil
}

// drop gives up the Boundary, for the calling thread.
func drop() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for _, c := range Boundary {
		bit := uint32(1) << (c % 32)
		data[c/32].Effective &^= bit
		data[c/32].Permitted &^= bit
		data[c/32].Inheritable &^= bit
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("give capabilities up: %w", err)
	}
	return nil
}
