package smoke

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// guest returns the kernel that the guest's first process saw, and skips everywhere else.
func guest(t *testing.T) string {
	t.Helper()
	release := os.Getenv("SIGNET_VM_GUEST")
	if release == "" {
		t.Skip("looks at a guest from the inside: run by make test-vm")
	}
	return release
}

func sh(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "sh", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestKernel(t *testing.T) {
	release := guest(t)
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	if got := unix.ByteSliceToString(u.Release[:]); got != release {
		t.Errorf("kernel %s, and the guest was told %s", got, release)
	}
	if b, err := os.ReadFile("/sys/kernel/btf/vmlinux"); err != nil || len(b) == 0 {
		t.Errorf("types of the kernel: %d bytes, %v", len(b), err)
	}
	if lsm := sh(t, "cat /sys/kernel/security/lsm"); !slices.Contains(strings.Split(lsm, ","), "bpf") {
		t.Errorf("security modules are %s, without bpf", lsm)
	}
}

func TestMounts(t *testing.T) {
	guest(t)
	for path, magic := range map[string]int64{
		"/proc": unix.PROC_SUPER_MAGIC, "/sys": unix.SYSFS_MAGIC, "/sys/fs/cgroup": unix.CGROUP2_SUPER_MAGIC,
		"/sys/fs/bpf": unix.BPF_FS_MAGIC, "/sys/kernel/tracing": unix.TRACEFS_MAGIC, "/dev/pts": unix.DEVPTS_SUPER_MAGIC,
		"/tmp": unix.TMPFS_MAGIC, "/run": unix.TMPFS_MAGIC,
	} {
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil || st.Type != magic {
			t.Errorf("%s: type %#x, want %#x (%v)", path, st.Type, magic, err)
		}
	}
}

func TestPrograms(t *testing.T) {
	guest(t)
	for _, line := range []string{"ip -V", "tc -V", "nft list ruleset", "nsenter --version", "unshare --version", "ss -tan", "wg --version", "tcpdump --version", "echo x | cat /dev/stdin > /dev/stderr"} {
		sh(t, line)
	}
}

// TestDevices makes one device of each kind that a host or a test may ask for.
func TestDevices(t *testing.T) {
	guest(t)
	for _, kind := range []string{"wireguard", "veth", "bridge", "dummy", "vrf table 7"} {
		t.Run(strings.Fields(kind)[0], func(t *testing.T) {
			sh(t, "ip link add smoke0 type "+kind)
			if text := sh(t, "ip -d link show smoke0"); !strings.Contains(text, strings.Fields(kind)[0]) {
				t.Errorf("smoke0 is not of the kind %s: %s", kind, text)
			}
			sh(t, "ip link del smoke0")
		})
	}
	t.Run("tun", func(t *testing.T) {
		sh(t, "ip tuntap add smoke0 mode tun && ip link del smoke0")
	})
	t.Run("clsact", func(t *testing.T) {
		sh(t, "ip link add smoke0 type dummy && tc qdisc add dev smoke0 clsact && ip link del smoke0")
	})
}

// TestWireGuard sends packets through two kernel WireGuard devices in two namespaces, over a veth pair.
func TestWireGuard(t *testing.T) {
	guest(t)
	var public [2]string
	dir := t.TempDir()
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "-all", "netns", "del").CombinedOutput(); err != nil {
			t.Errorf("remove namespaces: %v: %s", err, out)
		}
	})
	for i := range public {
		sh(t, fmt.Sprintf("ip netns add smoke%d && ip -n smoke%d link set lo up && umask 077 && wg genkey > %s/%d", i, i, dir, i))
		public[i] = sh(t, fmt.Sprintf("wg pubkey < %s/%d", dir, i))
	}
	sh(t, "ip link add v0 netns smoke0 type veth peer name v1 netns smoke1")
	for i := range public {
		far := 1 - i
		for _, line := range []string{
			"ip -n smoke%[1]d addr add 10.99.0.%[1]d/31 dev v%[1]d",
			"ip -n smoke%[1]d link set v%[1]d up",
			"ip -n smoke%[1]d link add wg0 type wireguard",
			"ip netns exec smoke%[1]d wg set wg0 listen-port 51820 private-key %[3]s/%[1]d peer %[4]s allowed-ips 198.18.0.%[2]d/32 endpoint 10.99.0.%[2]d:51820",
			"ip -n smoke%[1]d addr add 198.18.0.%[1]d/31 dev wg0",
			"ip -n smoke%[1]d link set wg0 up",
		} {
			// Every line uses all four, so that none is reported as left over.
			sh(t, fmt.Sprintf(line+" # %[1]d %[2]d %[3]s %[4]s", i, far, dir, public[far]))
		}
	}
	sh(t, "ip netns exec smoke0 ping -n -c 3 -i 0.2 -w 20 198.18.0.1")
	if text := sh(t, "ip netns exec smoke1 wg show wg0 latest-handshakes"); !strings.HasPrefix(text, public[0]+"\t") || strings.HasSuffix(text, "\t0") {
		t.Errorf("no handshake after a ping: %q", text)
	}
}
