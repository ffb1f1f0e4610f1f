package enforce

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// netnsCookie names the network namespace of the calling thread; 0 where the kernel does not tell (before Linux 5.14).
func netnsCookie() uint64 {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0
	}
	return cookie
}

// setNetns tells the programs at sockets whether this kernel tells them the namespace of a packet.
func setNetns(spec *ebpf.CollectionSpec) error {
	err := features.HaveProgramHelper(ebpf.CGroupSKB, asm.FnGetNetnsCookie)
	if err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
		return fmt.Errorf("ask for namespace cookies: %w", err)
	}
	if err := spec.Variables["has_netns"].Set(err == nil); err != nil {
		return fmt.Errorf("set has_netns: %w", err)
	}
	return nil
}

// progSweepTimer starts the timer that sweeps when no agent does.
const progSweepTimer = "sweep_timer"

// startTimer lets the kernel sweep by itself when no agent has for a while.
func startTimer(coll *ebpf.Collection) error {
	prog := coll.Programs[progSweepTimer]
	if prog == nil {
		return nil
	}
	code, err := prog.Run(&ebpf.RunOptions{Data: make([]byte, 64)}) // the packet is not looked at
	if err != nil {
		return fmt.Errorf("start the sweep timer: %w", err)
	}
	if code != 0 {
		return fmt.Errorf("start the sweep timer: the program returned %d", code)
	}
	return nil
}
