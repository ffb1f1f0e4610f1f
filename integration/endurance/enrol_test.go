package endurance

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/scenario"
)

// rivals are the hosts that use one join token at once.
const rivals = 1000

// TestOneTokenOneHost lets many hosts with keys of their own use one single-use token at the same time.
func TestOneTokenOneHost(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	c := startCoordinator(ctx, t, "onetoken", "")
	host, err := c.MakeHost(ctx, "rivals")
	if err != nil {
		t.Fatal(err)
	}
	token, err := c.Token(ctx, "single")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(host.Dir(), "one.token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := host.Host.Command(ctx, netlab.Opts{}, c.Bin("probe"), "enrol", c.CoordinatorAddr().String(), file, fmt.Sprint(rivals), "single").Output()
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("admitted 1 refused %d failed 0", rivals-1); !strings.Contains(out, want) {
		t.Fatalf("want %q:\n%.2000s", want, out)
	}
	t.Log(strings.TrimSpace(out))
}

// TestExpiredNodeRenews lets a node's certificate expire while the coordinator is away.
func TestExpiredNodeRenews(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	const life = 20 * time.Second
	c := startCoordinator(ctx, t, "expired", fmt.Sprintf("svid: {x509_ttl: %v}", life))
	a, err := c.AddHost(ctx, "host-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := a.WaitStatus(ctx, "be connected", func(s scenario.Status) bool { return s.Connected }); err != nil {
		t.Fatal(err)
	}
	if err := c.KillCoordinator(); err != nil {
		t.Fatal(err)
	}
	// Nothing can be waited for but the certificate's end itself; the status shows it.
	if err := a.WaitStatus(ctx, "have an expired certificate", func(s scenario.Status) bool {
		return len(s.SVIDs) == 1 && time.Now().After(s.SVIDs[0].Expires.Add(2*time.Second)) && !s.Connected
	}); err != nil {
		t.Fatal(err)
	}
	if err := c.ServeCoordinator(ctx); err != nil {
		t.Fatal(err)
	}
	if err := a.WaitStatus(ctx, "renew by itself", func(s scenario.Status) bool {
		return s.Connected && len(s.SVIDs) == 1 && s.SVIDs[0].Expires.After(time.Now())
	}); err != nil {
		t.Fatal(err)
	}
}

func startCoordinator(ctx context.Context, t *testing.T, prefix, config string) *scenario.Cluster {
	t.Helper()
	dir, bin := built(ctx, t, prefix)
	c, err := scenario.Start(ctx, scenario.Options{Prefix: prefix, Dir: dir, Bin: bin, CoordinatorConfig: config})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("tear down: %v", err)
		}
	})
	return c
}

// built makes a work folder with the programs in it.
func built(ctx context.Context, t *testing.T, prefix string) (dir, bin string) {
	t.Helper()
	scenario.NeedLab(t)
	dir, err := os.MkdirTemp("", "signet-"+prefix+"-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	// The database of some tests runs as a user of its own.
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	bin = filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := scenario.Build(ctx, "../..", bin); err != nil {
		t.Fatal(err)
	}
	return dir, bin
}
