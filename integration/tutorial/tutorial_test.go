package tutorial

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/netlab/netlabtest"
	"github.com/signet-overlay/signet/integration/scenario"
)

const (
	page = "../../docs/tutorial.md"
	// blockLimit bounds one block of commands.
	blockLimit = 60 * time.Second
)

// step is one thing that the page asks for.
type step struct {
	host    string
	script  string
	want    []string // what the script must have written
	copying []string // or a copy: host, file, host, file
	line    int
}

// read takes the page apart.
func read(t *testing.T) []step {
	t.Helper()
	f, err := os.Open(page)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var steps []step
	var block []string
	fence, n := "", 0
	for in := bufio.NewScanner(f); in.Scan(); {
		n++
		line := in.Text()
		switch {
		case fence == "" && strings.HasPrefix(line, "```"):
			fence, block = strings.TrimPrefix(line, "```"), nil
		case fence != "" && line == "```":
			host, isScript := strings.CutPrefix(fence, "sh on=")
			switch {
			case isScript:
				steps = append(steps, step{host: host, script: strings.Join(block, "\n"), line: n})
			case fence == "output":
				steps[len(steps)-1].want = block
			default:
				t.Fatalf("line %d: a block of kind %q, which no one runs", n, fence)
			}
			fence = ""
		case fence != "":
			block = append(block, line)
		case strings.HasPrefix(line, "<!-- copy "):
			words := strings.Fields(strings.TrimSuffix(strings.TrimPrefix(line, "<!-- copy "), "-->"))
			steps = append(steps, step{copying: words, line: n})
		}
	}
	if len(steps) < 10 {
		t.Fatalf("the page has only %d steps", len(steps))
	}
	return steps
}

// shell is a person at one host.
type shell struct {
	cmd *netlab.Cmd
	in  io.Writer
	dir string
	n   int
}

// prepare gives the shell's mount namespace the places that a real host has.
const prepare = `set -e
mount --make-rprivate /
mount --bind %[1]s /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mkdir -p /etc/signet /run/signet %[2]s/etc %[2]s/lib %[2]s/run
chmod 700 %[2]s/etc
mount --bind %[2]s/etc /etc/signet
mount --bind %[2]s/lib /var/lib
mount --bind %[2]s/run /run/signet
export PATH=%[3]s:/usr/sbin:/usr/bin:/sbin:/bin HOME=%[2]s
cd %[2]s
set +e
`

func open(ctx context.Context, t *testing.T, h *netlab.Host, dir, bin string) *shell {
	t.Helper()
	in, out := io.Pipe()
	s := &shell{cmd: h.Command(ctx, netlab.Opts{Stdin: in}, "unshare", "--mount", "bash"), in: out, dir: filepath.Join(dir, h.Name())}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	s.run(ctx, t, fmt.Sprintf(prepare, h.CgroupRoot(), s.dir, bin))
	return s
}

// run gives the shell a script and returns what it wrote.
func (s *shell) run(ctx context.Context, t *testing.T, script string) string {
	t.Helper()
	s.n++
	before := len(s.cmd.Text())
	mark := fmt.Sprintf("-- end of step %d, status ", s.n)
	if _, err := fmt.Fprintf(s.in, "%s\necho \"%s$?.\"\n", script, mark); err != nil {
		t.Fatal(err)
	}
	limited, cancel := context.WithTimeout(ctx, blockLimit)
	defer cancel()
	if err := s.cmd.WaitFor(limited, mark); err != nil {
		logs, _ := filepath.Glob(filepath.Join(s.dir, "*.log"))
		for _, l := range logs {
			text, _ := os.ReadFile(l)
			t.Logf("%s:\n%s", filepath.Base(l), text)
		}
		t.Fatalf("%v\n%s\nafter:\n%s", err, script, s.cmd.Text()[before:])
	}
	got := s.cmd.Text()[before:]
	if !strings.Contains(got, mark+"0.") {
		t.Errorf("the last command of\n%s\nfailed:\n%s", script, got)
	}
	return got
}

// acceptSubtree puts a script in the place of signetd, which accepts the one gap that the hosts of this test have and a
// reader's have not: what they take for the root of the cgroups is a subtree of this machine's.
func acceptSubtree(t *testing.T, bin string) {
	t.Helper()
	program, real := filepath.Join(bin, "signetd"), filepath.Join(bin, "signetd.real")
	if err := os.Rename(program, real); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\ngrep -q accept_gaps \"$2\" || echo 'accept_gaps: [cgroup-namespace]' >> \"$2\"\nexec " + real + " \"$@\"\n"
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestTutorialRuns(t *testing.T) {
	steps := read(t)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	lab := netlabtest.New(t)
	bin := t.TempDir()
	if err := scenario.Build(ctx, "../..", bin); err != nil {
		t.Fatal(err)
	}
	acceptSubtree(t, bin)
	underlay, err := lab.Bridge(ctx, "underlay")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	shells := map[string]*shell{}
	for i, name := range []string{"coord", "app-1", "db-1"} {
		h, err := lab.Host(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := lab.Connect(ctx, h, underlay, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), 24)); err != nil {
			t.Fatal(err)
		}
		shells[name] = open(ctx, t, h, dir, bin)
	}
	for _, s := range steps {
		if s.copying != nil {
			carry(t, dir, s.copying)
			continue
		}
		got := shells[s.host].run(ctx, t, s.script)
		for _, w := range s.want {
			if !strings.Contains(got, w) {
				t.Errorf("line %d: %q is not in what the commands wrote:\n%s", s.line, w, got)
			}
		}
	}
	// What the page leaves running has to end before the lab is taken down.
	for _, name := range []string{"app-1", "db-1"} {
		shells[name].run(ctx, t, "signet down --release; kill $(jobs -p); wait; true")
	}
	shells["coord"].run(ctx, t, "kill $(jobs -p); wait; true")
}

// carry copies a file from one host's home to another's /etc/signet, as the page tells the reader to.
func carry(t *testing.T, dir string, words []string) {
	t.Helper()
	if len(words) != 4 {
		t.Fatalf("copy %v: expected host, file, host, file", words)
	}
	text, err := os.ReadFile(filepath.Join(dir, words[0], words[1]))
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(dir, words[2], "etc", filepath.Base(words[3]))
	if err := os.WriteFile(to, text, 0o600); err != nil {
		t.Fatal(err)
	}
}
