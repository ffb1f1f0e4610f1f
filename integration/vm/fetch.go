package vm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoKernel says that the apt archive of this machine has no cloud kernel of the wanted series.
var ErrNoKernel = errors.New("no such kernel in the apt archive")

// flavour is the kind of kernel that is booted: Debian's for cloud guests, which has few drivers and so boots fast.
const flavour = "cloud-amd64"

// seriesForm is a kernel series: two numbers, as in "6.1".
var seriesForm = regexp.MustCompile(`^[0-9]{1,2}\.[0-9]{1,3}$`)

// Kernel is an unpacked kernel package.
type Kernel struct {
	Release string // as uname -r says it, for example "6.1.0-56-cloud-amd64"
	Version string // of the package, which tells the upstream version, for example "6.1.192-2"
	Image   string // path of the compressed kernel
	Modules string // directory with all its modules, compressed or not
}

// short is the release without the part that all of them share.
func (k Kernel) short() string { return strings.TrimSuffix(k.Release, "-"+flavour) }

// Cache is the directory that Fetch uses when nothing else is wanted: signet-vm below the user's cache directory.
func Cache() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find a cache for kernels: %w", err)
	}
	return filepath.Join(dir, "signet-vm"), nil
}

// Fetch finds the newest signed cloud kernel of a series, for example "6.12", among the packages that apt knows,
// downloads it unless the cache has it, and unpacks it. The package in the cache is compared with apt's SHA-256 each time.
// Older kernels of the series leave the cache.
//
// When apt cannot download what its lists promise and this is root, the lists are brought up to date once: the archive
// drops a kernel as soon as there is a newer one. ErrNoKernel means that the lists have none of the series; they may be
// empty, or the Debian release has another one.
func Fetch(ctx context.Context, cache, series string) (Kernel, error) {
	if !seriesForm.MatchString(series) {
		return Kernel{}, fmt.Errorf("kernel series %q: want two numbers such as 6.12", series)
	}
	unlock, err := lockCache(cache)
	if err != nil {
		return Kernel{}, fmt.Errorf("fetch kernel %s: lock %s: %w", series, cache, err)
	}
	defer unlock()
	k, err := fetch(ctx, cache, series)
	if err != nil && ctx.Err() == nil && os.Geteuid() == 0 {
		if _, updateErr := output(ctx, "", "apt-get", "-q", "update"); updateErr != nil {
			return Kernel{}, fmt.Errorf("fetch kernel %s: %w", series, errors.Join(err, updateErr))
		}
		k, err = fetch(ctx, cache, series)
	}
	if err != nil {
		return Kernel{}, fmt.Errorf("fetch kernel %s: %w", series, err)
	}
	return k, nil
}

// lockCache makes the cache and keeps other processes out of it until unlock.
func lockCache(cache string) (unlock func(), err error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

func fetch(ctx context.Context, cache, series string) (Kernel, error) {
	p, err := newest(ctx, series)
	if err != nil {
		return Kernel{}, err
	}
	deb, err := download(ctx, cache, p)
	if err != nil {
		return Kernel{}, err
	}
	dir := strings.TrimSuffix(deb, ".deb")
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		err = unpack(ctx, deb, dir)
		if err != nil {
			return Kernel{}, err
		}
	} else if err != nil {
		return Kernel{}, err
	}
	if err := prune(cache, series, filepath.Base(deb)); err != nil {
		return Kernel{}, fmt.Errorf("remove older kernels: %w", err)
	}
	return kernelIn(dir, p)
}

// archived is one package of the archive.
type archived struct {
	name    string
	version string
	sha256  string // of the .deb, in hexadecimal
}

// newest asks apt for all kernels of a series and dpkg which is the newest.
func newest(ctx context.Context, series string) (archived, error) {
	names, err := output(ctx, "", "apt-cache", "pkgnames", "linux-image-"+series)
	if err != nil {
		return archived{}, err
	}
	candidates := kernelNames(string(names), series)
	if len(candidates) == 0 {
		return archived{}, fmt.Errorf("%w: linux-image-%s.*-%s", ErrNoKernel, series, flavour)
	}
	// A name may be known without a package behind it; apt-cache then fails for it, and still shows the others.
	shown, err := output(ctx, "", "apt-cache", append([]string{"--no-all-versions", "show"}, candidates...)...)
	all := parseStanzas(shown)
	if len(all) == 0 {
		return archived{}, errors.Join(fmt.Errorf("%w: linux-image-%s.*-%s", ErrNoKernel, series, flavour), err)
	}
	best := all[0]
	for _, p := range all[1:] {
		newer, err := versionAfter(ctx, p.version, best.version)
		if err != nil {
			return archived{}, err
		}
		if newer {
			best = p
		}
	}
	return best, nil
}

// kernelNames picks the signed kernels of a series out of apt's package names, one a line. Debian writes the series with
// a third number behind it, and what has "-unsigned" or "-dbg" behind the flavour is not meant.
func kernelNames(text, series string) []string {
	var out []string
	for name := range strings.Lines(text) {
		name = strings.TrimSpace(name)
		if strings.HasPrefix(name, "linux-image-"+series+".") && strings.HasSuffix(name, "-"+flavour) {
			out = append(out, name)
		}
	}
	return out
}

// parseStanzas reads what "apt-cache show" prints. Stanzas without a version or a SHA-256 are left out: such a package
// could not be checked.
func parseStanzas(text []byte) []archived {
	var out []archived
	var p archived
	flush := func() {
		if p.name != "" && p.version != "" && len(p.sha256) == 2*sha256.Size {
			out = append(out, p)
		}
		p = archived{}
	}
	for line := range bytes.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSuffix(string(line), "\n"), ": ")
		switch key {
		case "":
			flush()
		case "Package":
			p.name = value
		case "Version":
			p.version = value
		case "SHA256":
			p.sha256 = value
		}
	}
	flush()
	return out
}

// versionAfter reports whether a comes after b in Debian's order of versions.
func versionAfter(ctx context.Context, a, b string) (bool, error) {
	_, err := output(ctx, "", "dpkg", "--compare-versions", a, "gt", b)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		return false, nil
	}
	return err == nil, err
}

// download returns the path of the package in the cache.
func download(ctx context.Context, cache string, p archived) (string, error) {
	// apt writes a colon of an epoch as %3a; every name is a plain file name.
	deb := filepath.Join(cache, p.name+"_"+strings.ReplaceAll(p.version, ":", "%3a")+"_amd64.deb")
	if err := checkSum(deb, p.sha256); err == nil {
		return deb, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		if err := os.Remove(deb); err != nil {
			return "", err
		}
	}
	// Without the option apt would download as a user of its own, who cannot write into root's cache.
	_, err := output(ctx, cache, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", p.name+"="+p.version)
	if err != nil {
		return "", err
	}
	if err := checkSum(deb, p.sha256); err != nil {
		return "", fmt.Errorf("check downloaded package: %w", err)
	}
	return deb, nil
}

var errSum = errors.New("does not have the SHA-256 that apt knows")

func checkSum(path, want string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return fmt.Errorf("%s %w: %s, want %s", path, errSum, got, want)
	}
	return nil
}

// unpack makes dir as a whole or not at all.
func unpack(ctx context.Context, deb, dir string) error {
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "unpack-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if _, err := output(ctx, "", "dpkg-deb", "-x", deb, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

// prune removes packages and directories of the series other than the one of deb.
func prune(cache, series, deb string) error {
	entries, err := os.ReadDir(cache)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), ".deb")
		if !strings.HasPrefix(name, "linux-image-"+series+".") || name == strings.TrimSuffix(deb, ".deb") {
			continue
		}
		if err := os.RemoveAll(filepath.Join(cache, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// kernelIn finds the parts of an unpacked package. Debian 12 has modules below /lib, later releases below /usr/lib.
func kernelIn(dir string, p archived) (Kernel, error) {
	k := Kernel{Release: strings.TrimPrefix(p.name, "linux-image-"), Version: p.version}
	k.Image = filepath.Join(dir, "boot", "vmlinuz-"+k.Release)
	if _, err := os.Stat(k.Image); err != nil {
		return Kernel{}, err
	}
	for _, lib := range []string{"lib", "usr/lib"} {
		k.Modules = filepath.Join(dir, lib, "modules", k.Release)
		if _, err := os.Stat(k.Modules); err == nil {
			return k, nil
		}
	}
	return Kernel{}, fmt.Errorf("%s has no modules of %s", dir, k.Release)
}

// output runs a program in a directory; empty means this process's. The error holds the last line of what it wrote.
func output(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	// Messages and numbers are read by programs here.
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%s %s: %w%s", name, strings.Join(args, " "), err, lastLine(stderr.String()))
	}
	return out, nil
}

// lastLine is the last line of text that is not blank, with a colon before it, or nothing.
func lastLine(text string) string {
	last := ""
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		if line := strings.TrimSpace(lines.Text()); line != "" {
			last = ": " + line
		}
	}
	return last
}
