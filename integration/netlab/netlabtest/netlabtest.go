// Package netlabtest gives a test a lab of its own that is gone when the test ends.
//
// It is apart from netlab so that the demo, which uses netlab, does not carry the testing package.
package netlabtest

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/signet-overlay/signet/integration/netlab"
)

// count keeps the labs of one test binary apart; the process id keeps binaries apart.
var count atomic.Uint32

// New makes a lab under a prefix that no other test has. Without root the test is skipped with the reason; as root
// everything else that is missing is a failure. The lab is closed at the end, and what it could not give back fails the
// test.
func New(t testing.TB) *netlab.Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("a lab of namespaces needs %s", strings.Join(netlab.Missing(), ", "))
	}
	// The work directory comes first: it has to outlast the lab's mount.
	dir := t.TempDir()
	lab, err := netlab.New(t.Context(), netlab.Options{Prefix: Prefix(), Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error(err)
		}
	})
	return lab
}

// Prefix is a lab prefix that no other caller on this machine has now.
func Prefix() string { return fmt.Sprintf("t%dx%d", os.Getpid()%10_000_000, count.Add(1)%1000) }
