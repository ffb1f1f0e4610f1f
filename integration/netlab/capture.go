package netlab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxFrame is more than the largest frame of a veth, which carries unsegmented packets of up to 64 KiB.
	maxFrame = 1 << 17
	// maxKept bounds the bytes of frames that a Capture keeps. Past it frames are still classified and searched for the
	// watched texts, but not kept, and Recording.Unkept counts them.
	maxKept = 64 << 20
	// maxFlows bounds the flows counted one by one; past it new flows are counted under the zero Flow.
	maxFlows = 1 << 16
	// captureBuffer is the socket's queue in the kernel; what does not fit is counted in Recording.Lost.
	captureBuffer = 32 << 20
	// maxDrain bounds the frames taken from the queue after Stop, so that a link that never rests cannot hold it up.
	maxDrain = 1 << 17
)

// ErrIncomplete means that a recording has holes, so that the absence of something in it proves nothing.
var ErrIncomplete = errors.New("capture is incomplete")

// Capture records the frames on one interface, in both directions, until Stop.
type Capture struct {
	lab     *Lab
	sock    *os.File
	raw     syscall.RawConn
	watched [][]byte
	rec     *Recording // owned by run until done is closed
	kept    int
	done    chan struct{}
	stopped sync.Once
}

// Packet is one frame from the Ethernet header on; on a tunnel device, which has none, from the IP header on.
type Packet struct {
	Time     time.Time
	Outgoing bool // left through the interface, rather than came in
	Flow     Flow
	Data     []byte
}

// Recording is what a Capture saw.
type Recording struct {
	Packets []Packet
	Flows   map[Flow]int      // frames by flow, those too that were not kept
	Seen    map[string]Packet // for each watched text the first frame that held it
	Unkept  int               // frames that did not fit into the memory bound
	Lost    int               // frames that the kernel threw away because this process was too slow
}

// Capture starts to record on one of the host's interfaces. The watched texts are searched for in every frame as it comes,
// which also works for transfers too large to keep. When Capture returns, the next frame is on record.
func (h *Host) Capture(ctx context.Context, ifname string, watch ...[]byte) (*Capture, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c := &Capture{
		lab: h.lab, watched: watch, done: make(chan struct{}),
		rec: &Recording{Flows: map[Flow]int{}, Seen: map[string]Packet{}},
	}
	if err := h.Do(func() error { return c.open(ifname) }); err != nil {
		return nil, fmt.Errorf("capture on %s of host %s: %w", ifname, h.name, err)
	}
	h.lab.mu.Lock()
	defer h.lab.mu.Unlock()
	if h.lab.closed {
		return nil, errors.Join(ErrClosed, c.sock.Close())
	}
	h.lab.captures[c] = struct{}{}
	go c.run()
	return c, nil
}

// open makes the socket inside the namespace. Protocol 0 until the bind: otherwise frames of other interfaces would come in
// before it.
func (c *Capture) open(ifname string) error {
	ifi, err := net.InterfaceByName(ifname)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: ifi.Index})
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	c.sock = os.NewFile(uintptr(fd), "capture "+ifname)
	c.raw, err = c.sock.SyscallConn()
	return err
}

func networkOrder(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}

// run is the one goroutine of a Capture; Stop ends it with a deadline and waits for it.
func (c *Capture) run() {
	defer close(c.done)
	buf := make([]byte, maxFrame)
	err := c.raw.Read(func(fd uintptr) bool {
		for {
			if c.receive(int(fd), buf) != nil {
				// Until the next frame, or the deadline.
				return false
			}
		}
	})
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return
	}
	_ = c.raw.Control(func(fd uintptr) {
		for range maxDrain {
			if c.receive(int(fd), buf) != nil {
				break
			}
		}
		if stats, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			c.rec.Lost = int(stats.Drops)
		}
	})
}

func (c *Capture) receive(fd int, buf []byte) error {
	n, from, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return err
	}
	p := Packet{Time: time.Now(), Data: buf[:n]}
	bare := false // a tunnel device: there is no link header
	if ll, ok := from.(*unix.SockaddrLinklayer); ok {
		p.Outgoing, bare = ll.Pkttype == unix.PACKET_OUTGOING, ll.Hatype == unix.ARPHRD_NONE
	}
	if bare {
		p.Flow = classifyIP(p.Data)
	} else {
		p.Flow = classify(p.Data)
	}
	c.keep(p)
	return nil
}

func (c *Capture) keep(p Packet) {
	flow := p.Flow
	if _, known := c.rec.Flows[flow]; !known && len(c.rec.Flows) >= maxFlows {
		flow = Flow{}
	}
	c.rec.Flows[flow]++
	for _, text := range c.watched {
		if _, seen := c.rec.Seen[string(text)]; !seen && bytes.Contains(p.Data, text) {
			first := p
			first.Data = bytes.Clone(p.Data)
			c.rec.Seen[string(text)] = first
		}
	}
	if c.kept+len(p.Data) > maxKept {
		c.rec.Unkept++
		return
	}
	c.kept += len(p.Data)
	p.Data = bytes.Clone(p.Data)
	c.rec.Packets = append(c.rec.Packets, p)
}

// Stop ends the recording and returns it, with every frame that passed the interface before the call. It may be called
// again and after Lab.Close.
func (c *Capture) Stop() *Recording {
	c.stop()
	return c.rec
}

func (c *Capture) stop() {
	c.stopped.Do(func() {
		// In the past: the pending read returns at once, then run takes what is queued.
		if err := c.sock.SetReadDeadline(time.Unix(1, 0)); err != nil {
			panic(fmt.Sprintf("netlab: internal error: capture cannot be stopped: %v", err))
		}
		<-c.done
		c.sock.Close()
		c.lab.mu.Lock()
		delete(c.lab.captures, c)
		c.lab.mu.Unlock()
	})
	<-c.done
}

// Contains finds the first frame that holds the text in clear. A text that was watched is searched for in all frames, any
// other in those that were kept. When the recording has holes and the text is not in what there is, the error is
// ErrIncomplete. The text has to be sent more than once to be found for certain: segmentation can cut it in two.
func (r *Recording) Contains(text []byte) (Packet, bool, error) {
	if p, ok := r.Seen[string(text)]; ok {
		return p, true, nil
	}
	for _, p := range r.Packets {
		if bytes.Contains(p.Data, text) {
			return p, true, nil
		}
	}
	if r.Lost > 0 {
		return Packet{}, false, fmt.Errorf("%w: the kernel dropped %d frames", ErrIncomplete, r.Lost)
	}
	if r.Unkept > 0 {
		return Packet{}, false, fmt.Errorf("%w: %d frames were not kept; name the text when the capture starts", ErrIncomplete, r.Unkept)
	}
	return Packet{}, false, nil
}

// Except lists the flows that are neither housekeeping of the link nor allowed, for the claim that nothing else passed.
func (r *Recording) Except(allowed func(Flow) bool) []Flow {
	var out []Flow
	for f := range r.Flows {
		if !f.Housekeeping() && !allowed(f) {
			out = append(out, f)
		}
	}
	return out
}
