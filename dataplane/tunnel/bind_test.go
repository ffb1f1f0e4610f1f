package tunnel

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestBothFamiliesAtOnce sends to an IPv4 and two IPv6 destinations by turns and from several goroutines, and counts
// what arrives at each. See splitBind for the fault this guards against.
func TestBothFamiliesAtOnce(t *testing.T) {
	needRoot(t)
	const senders, rounds = 4, 20 // few enough for a socket buffer
	s := newSpace(t)
	s.ip("addr add fd00:1::1/128 dev lo nodad")
	s.ip("addr add fd00:2::2/128 dev lo nodad")
	// The kernel installs the routes of new IPv6 addresses by and by, and drops what is sent before in silence.
	eventually(t, 2*time.Second, "routes to the new addresses", func() bool {
		local := s.ip("-6 route show table local")
		return strings.Contains(local, "fd00:1::1") && strings.Contains(local, "fd00:2::2")
	})
	var got [3]atomic.Int64
	var to [3]string
	bind := newSplitBind()
	s.do(func() {
		for i, addr := range []string{"127.0.0.1:0", "[fd00:1::1]:0", "[fd00:2::2]:0"} {
			c, err := net.ListenPacket("udp", addr)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { _ = c.Close() })
			to[i] = c.LocalAddr().String()
			go func() {
				for buf := make([]byte, 100); ; got[i].Add(1) {
					if _, _, err := c.ReadFrom(buf); err != nil {
						return
					}
				}
			}()
		}
		if _, _, err := bind.Open(0); err != nil {
			t.Error(err)
		}
	})
	if t.Failed() {
		return
	}
	defer bind.Close()
	var wg sync.WaitGroup
	for range senders {
		wg.Go(func() {
			for n := range rounds * len(to) {
				ep, err := bind.ParseEndpoint(to[n%len(to)])
				if err == nil {
					err = bind.Send([][]byte{[]byte("x")}, ep, 0)
				}
				if err != nil {
					t.Errorf("send to %s: %v", to[n%len(to)], err)
				}
			}
		})
	}
	wg.Wait()
	defer func() { t.Log("arrived", got[0].Load(), got[1].Load(), got[2].Load()) }()
	eventually(t, 2*time.Second, fmt.Sprintf("%d packets at each of %v", senders*rounds, to), func() bool {
		for i := range got {
			if got[i].Load() != senders*rounds {
				return false
			}
		}
		return true
	})
}
