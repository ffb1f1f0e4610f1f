package scenario

import (
	"context"
	"fmt"
	"os/exec"
	"testing"

	"github.com/signet-overlay/signet/integration/netlab"
)

// Programs are what a cluster runs.
var Programs = []string{"./cmd/signetd", "./cmd/signet-coordinator", "./cmd/signet", "./integration/probe"}

// Build builds the programs into dir, from the module at root.
func Build(ctx context.Context, root, dir string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-o", dir + "/"}, Programs...)...)
	cmd.Dir = root
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build programs: %w: %s", err, out)
	}
	return nil
}

// NeedLab skips a test on machines that cannot make hosts, and says what they lack.
func NeedLab(t testing.TB) {
	t.Helper()
	if missing := netlab.Missing(); len(missing) > 0 {
		t.Skipf("makes hosts of network namespaces and needs %v", missing)
	}
}
