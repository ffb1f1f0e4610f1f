package vm

import (
	"bufio"
	"context"
	_ "embed" // for the guest's first process
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

//go:embed init.sh
var initScript []byte

// Image is what a guest has beside its kernel. All of it lives in the guest's memory.
type Image struct {
	Binaries []Binary
	Programs []string          // by name, from this machine's PATH; their shared libraries come along
	Modules  []string          // to load, in this order, each after what it depends on
	Files    map[string]string // path in the guest to a file of this machine; permissions are kept
}

// BaseModules are the modules that a host of ours may need, and those that the tests use to build hosts of namespaces.
// The kernel would load most of them when they are asked for; a guest has no modprobe.
func BaseModules() []string {
	return []string{
		"wireguard", "tun", "veth", "bridge", "dummy", "vrf", "8021q", "macvlan", "ipvlan",
		"sch_ingress", "cls_bpf", "act_bpf", "sch_fq", "sch_fq_codel", "sch_netem", "sch_tbf",
		"tcp_diag", "udp_diag", "raw_diag", "unix_diag", "sctp",
		"nf_tables", "nf_conntrack", "nf_nat", "nft_ct", "nft_limit", "nft_log", "nft_reject_inet", "nft_chain_nat", "nft_masq", "nft_meta_bridge", "nft_reject_bridge",
	}
}

// BasePrograms are what tests run beside the shell and the small tools, which are busybox's in a guest. The two of
// coreutils print more than busybox's do.
func BasePrograms() []string {
	return []string{"ip", "tc", "bridge", "ss", "nft", "wg", "nsenter", "unshare", "ping", "nc", "tcpdump", "id", "cat", "bpftool"}
}

// searchPath has the directories of programs for root; root's own PATH may lack them under sudo or in a test.
var searchPath = []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// write makes the archive that the kernel unpacks. limit is what each binary may take.
func (img Image) write(ctx context.Context, w io.Writer, k Kernel, limit time.Duration) error {
	buffered := bufio.NewWriterSize(w, 1<<20)
	c := newCpio(buffered)
	for _, step := range []func() error{
		func() error { return img.base(c) },
		func() error { return img.programs(ctx, c) },
		func() error { return img.modules(ctx, c, k) },
		func() error { return img.binaries(c) },
		func() error { return img.extra(c) },
		func() error { return c.file("/signet/plan", 0o644, []byte(img.plan(limit))) },
		c.close,
		buffered.Flush,
	} {
		if err := step(); err != nil {
			return fmt.Errorf("make image for %s: %w", k.Release, err)
		}
	}
	return nil
}

// base is the root directory, the first process and the few files of /etc that the C and Go libraries look for.
func (img Image) base(c *cpio) error {
	busybox, err := lookProgram("busybox")
	if err != nil {
		return err
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range []string{"dev", "proc", "sys", "tmp", "run", "root", "var", "usr/bin", "usr/sbin", "sbin", "lib/modules"} {
		errs = append(errs, c.dir(dir))
	}
	errs = append(errs,
		c.file("/bin/busybox", 0o755, data),
		c.symlink("/bin/sh", "/usr/sbin/sh"),
		c.file("/init", 0o755, initScript),
		c.file("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")),
		c.file("/etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n")),
		c.file("/etc/hosts", 0o644, []byte("127.0.0.1 localhost guest\n::1 localhost\n")),
		c.file("/etc/nsswitch.conf", 0o644, []byte("passwd: files\ngroup: files\nhosts: files\n")),
	)
	return errors.Join(errs...)
}

func lookProgram(name string) (string, error) {
	for _, dir := range searchPath {
		if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return found, nil
		}
	}
	return "", fmt.Errorf("program %s is not in %v", name, searchPath)
}

// programs copies dynamic programs and their libraries, each library once and at its own path.
func (img Image) programs(ctx context.Context, c *cpio) error {
	libraries := map[string]bool{}
	// busybox's own shell would take its small ip for the real one, wherever that is in PATH.
	for _, name := range append([]string{"sh"}, img.Programs...) {
		file, err := lookProgram(name)
		if err != nil {
			return err
		}
		if err := copyFile(c, path.Join("/usr/sbin", name), file); err != nil {
			return err
		}
		// ldd fails for a static program, which needs nothing.
		text, err := output(ctx, "", "ldd", file)
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			return err
		}
		for _, library := range parseLdd(string(text)) {
			libraries[library] = true
		}
	}
	for _, library := range slices.Sorted(maps.Keys(libraries)) {
		if err := copyFile(c, library, library); err != nil {
			return err
		}
	}
	return nil
}

// parseLdd returns the paths in lines "name => path (address)" and "path (address)". The kernel's own page has none.
func parseLdd(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		if _, after, ok := strings.Cut(line, "=>"); ok {
			line = after
		}
		if f := strings.Fields(line); len(f) > 0 && strings.HasPrefix(f[0], "/") {
			out = append(out, f[0])
		}
	}
	return out
}

func (img Image) modules(ctx context.Context, c *cpio, k Kernel) error {
	known, err := readModules(k.Modules)
	if err != nil {
		return err
	}
	loaded, err := known.load(ctx, img.Modules)
	if err != nil {
		return err
	}
	// The first process takes them in the order of their names. The directory is there for it even when empty.
	errs := []error{c.dir("/signet/modules")}
	for i, m := range loaded {
		errs = append(errs, c.file(fmt.Sprintf("/signet/modules/%03d-%s.ko", i, m.name), 0o644, m.data))
	}
	return errors.Join(errs...)
}

func (img Image) binaries(c *cpio) error {
	for _, b := range img.Binaries {
		if err := copyFile(c, path.Join(b.guestDir(), filepath.Base(b.Path)), b.Path); err != nil {
			return err
		}
		names, err := b.sources()
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := copyFile(c, path.Join(b.guestDir(), filepath.ToSlash(name)), filepath.Join(b.Dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (img Image) extra(c *cpio) error {
	for _, name := range slices.Sorted(maps.Keys(img.Files)) {
		if err := copyFile(c, name, img.Files[name]); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(c *cpio, name, from string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if info.Size() > maxEntry {
		return fmt.Errorf("%s has %d bytes, more than an image can hold", from, info.Size())
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return c.file(name, uint32(info.Mode().Perm()), data)
}

// killAfter is what a binary gets beyond its own limit, to print the stacks of what hangs.
const killAfter = 15 * time.Second

// plan is the shell text that the first process reads: one line for each binary.
func (img Image) plan(limit time.Duration) string {
	var b strings.Builder
	for _, bin := range img.Binaries {
		words := []string{
			"run", bin.Package, bin.guestDir(), fmt.Sprint(int((limit + killAfter).Seconds())), "./" + filepath.Base(bin.Path),
			// The form that go tool test2json takes apart without guessing.
			"-test.v=test2json", "-test.paniconexit0", "-test.timeout=" + limit.String(),
		}
		for i, w := range append(words, bin.Args...) {
			if i > 0 {
				b.WriteByte(' ')
			}
			b.WriteString("'" + strings.ReplaceAll(w, "'", `'\''`) + "'")
		}
		b.WriteByte('\n')
	}
	return b.String()
}
