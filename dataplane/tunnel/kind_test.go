package tunnel

import (
	"context"
	"net/netip"
	"time"

	"github.com/signet-overlay/signet/dataplane/link"
	"github.com/signet-overlay/signet/internal/key"
)

// engine is what the tests that both kinds must pass use of one.
type engine interface {
	Device
	lifecycle
	Handshake(ctx context.Context, k key.Public) (time.Duration, error)
	RoutesChanged(ctx context.Context) error
}

type lifecycle interface {
	Up(ctx context.Context) error
	ListenPort() int
	Done() <-chan struct{}
	SetOwnAddresses(addrs []netip.Addr)
	RefusedOwn() uint64
}

// kinds are the engines of the hosts a and b.
type kinds [2]string

const (
	embedded = "userspace"
	kernel   = "kernel"
)

var bothEmbedded = kinds{embedded, embedded}

// openKind opens an engine in the namespace of the calling thread.
func openKind(ctx context.Context, kind string, cfg Config) (engine, error) {
	if kind == kernel {
		return OpenKernel(ctx, cfg, func(name string, mtu int) (Carrier, error) { return link.OpenWireGuard(name, mtu) })
	}
	return OpenUserspace(ctx, cfg)
}
