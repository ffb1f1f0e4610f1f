package enforce

import (
	"context"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/flow"
	"github.com/signet-overlay/signet/internal/policy"
)

// TestSameHost: two workloads on one host talk over loopback, and are judged like any others.
func TestSameHost(t *testing.T) {
	l := newLab(t)
	e := l.open()
	a, b := l.start("a"), l.start("b")

	// Before the first view nothing passes.
	a.do("socket tcp4")
	a.want("EACCES", "connect 198.18.0.6:80")

	v := l.view()
	permit(v, 11, numA, numB, flow.TCP, 80)
	must(t, e.Apply(context.Background(), v), "apply")
	for _, c := range []struct{ kind, listen, target, from string }{
		{"tcp4", "0.0.0.0:80", "198.18.0.6:80", "198.18.0.5"},
		{"tcp6", "[::]:80", "[fd5a:7::6]:80", "fd5a:7::5"},
		{"tcp6", "[::]:80", "[::ffff:198.18.0.6]:80", "::ffff:198.18.0.5"},
	} {
		b.do("socket %s", c.kind)
		b.want("ok", "bind %s", c.listen)
		b.want("ok", "listen")
		a.do("socket %s", c.kind)
		a.want("inprogress", "connect %s", c.target)
		a.want("ok", "wait")
		b.want("from "+c.from, "accept")
		a.want("ok", "send hello")
		b.want("hello", "recv")
		b.want("ok", "send back")
		a.want("back", "recv")
		// The same from B to A, and on another port, is not allowed.
		b.do("socket %s", c.kind)
		b.want("EACCES", "connect %s", c.target[:len(c.target)-3]+":81")
	}
	_ = policy.HookConnect
	_ = time.Second
}
