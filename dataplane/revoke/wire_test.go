package revoke

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-overlay/signet/internal/flow"
)

// socketMessage is one message of a listing as the kernel writes it.
func socketMessage(family, state uint8, id sockID) []byte {
	b := binary.NativeEndian.AppendUint32(nil, headerSize+messageSize)
	b = binary.NativeEndian.AppendUint16(b, unix.SOCK_DIAG_BY_FAMILY)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, 7)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, family, state, 0, 0)
	b = append(b, id[:]...)
	for _, n := range []uint32{1, 2, 3, 1000, 4242} { // expires, rqueue, wqueue, uid, inode
		b = binary.NativeEndian.AppendUint32(b, n)
	}
	return b
}

func name(src, dst netip.AddrPort) (id sockID) {
	binary.BigEndian.PutUint16(id[0:], src.Port())
	binary.BigEndian.PutUint16(id[2:], dst.Port())
	copy(id[4:20], src.Addr().AsSlice())
	copy(id[20:36], dst.Addr().AsSlice())
	return id
}

func TestDecode(t *testing.T) {
	mapped := netip.AddrFrom16(a4.As16())
	for _, c := range []struct {
		family   uint8
		src, dst netip.Addr
	}{{unix.AF_INET, a4, b4}, {unix.AF_INET6, a6, b6}, {unix.AF_INET6, mapped, netip.AddrFrom16(b4.As16())}} {
		id := name(netip.AddrPortFrom(c.src, 40000), netip.AddrPortFrom(c.dst, 80))
		var got []listed
		err := answers(socketMessage(c.family, stateFinWait2, id), func(kind uint16, seq uint32, payload []byte) error {
			if kind != unix.SOCK_DIAG_BY_FAMILY || seq != 7 {
				t.Errorf("kind %d, sequence %d", kind, seq)
			}
			l, err := decode(payload, flow.TCP)
			got = append(got, l)
			return err
		})
		if err != nil || len(got) != 1 {
			t.Fatalf("%d sockets: %v", len(got), err)
		}
		want := flow.Tuple{Src: netip.AddrPortFrom(c.src.Unmap(), 40000), Dst: netip.AddrPortFrom(c.dst.Unmap(), 80), Proto: flow.TCP}
		if got[0].tuple() != want || got[0].uid != 1000 || got[0].inode != 4242 || got[0].id != id || got[0].left() {
			t.Errorf("got %+v, tuple %v, want %v", got[0], got[0].tuple(), want)
		}
	}
}

func TestMalformed(t *testing.T) {
	whole := socketMessage(unix.AF_INET, 1, sockID{})
	read := func(b []byte) error {
		return answers(b, func(_ uint16, _ uint32, payload []byte) error {
			_, err := decode(payload, flow.TCP)
			return err
		})
	}
	if err := read(whole); err != nil {
		t.Fatal(err)
	}
	for n := 1; n < len(whole); n++ {
		if err := read(whole[:n]); !errors.Is(err, errWire) {
			t.Errorf("the first %d bytes: %v", n, err)
		}
	}
	strange := socketMessage(unix.AF_UNIX, 1, sockID{})
	if err := read(strange); !errors.Is(err, errWire) {
		t.Errorf("another family: %v", err)
	}
}

func FuzzAnswers(f *testing.F) {
	f.Add(socketMessage(unix.AF_INET6, 1, sockID{}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		total := 0
		err := answers(b, func(kind uint16, _ uint32, payload []byte) error {
			total += headerSize + len(payload)
			_ = errnoOf(payload) // must not panic; what it says does not matter here
			if l, err := decode(payload, flow.UDP); err == nil {
				l.tuple()
			}
			return nil
		})
		if total > len(b) || err == nil && total+3*len(b)/headerSize < len(b) {
			t.Errorf("%d bytes told of %d: %v", total, len(b), err)
		}
	})
}
