package vm

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// readCpio is a slow twin of what the kernel does with the archive: names with type, permissions and data.
func readCpio(t *testing.T, archive []byte) map[string]string {
	t.Helper()
	out := map[string]string{}
	r := bytes.NewReader(archive)
	take := func(n int) string {
		b := make([]byte, n+(4-(int(r.Size())-r.Len()+n)%4)%4)
		if _, err := io.ReadFull(r, b); err != nil {
			t.Fatalf("archive ends early: %v", err)
		}
		return string(b[:n])
	}
	for {
		header := make([]byte, 110)
		if _, err := io.ReadFull(r, header); err != nil || string(header[:6]) != "070701" {
			t.Fatalf("header %q: %v", header, err)
		}
		var fields [13]int
		for i := range fields {
			n, err := strconv.ParseUint(string(header[6+8*i:14+8*i]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			fields[i] = int(n)
		}
		name := strings.TrimSuffix(take(fields[11]), "\x00")
		data := take(fields[6])
		if name == "TRAILER!!!" {
			if r.Len() != 0 {
				t.Errorf("%d bytes after the end", r.Len())
			}
			return out
		}
		if parent := filepath.Dir(name); parent != "." && !strings.HasPrefix(out[parent], "40755 ") {
			t.Errorf("%s comes before its directory", name)
		}
		out[name] = fmt.Sprintf("%o %s", fields[1], data)
	}
}

func TestCpio(t *testing.T) {
	var b bytes.Buffer
	c := newCpio(&b)
	for i, step := range []error{
		c.file("/a/b/c", 0o755, []byte("12345")), c.file("a/d", 0o600, nil), c.symlink("/l", "a/d"), c.dir("/a"), c.dir("e"), c.close(),
	} {
		if step != nil {
			t.Errorf("step %d: %v", i, step)
		}
	}
	if err := c.file("a/d", 0o600, nil); err == nil {
		t.Error("a second file of the same name was taken")
	}
	want := map[string]string{
		"a": "40755 ", "a/b": "40755 ", "a/b/c": "100755 12345", "a/d": "100600 ", "l": "120777 a/d", "e": "40755 ",
	}
	if got := readCpio(t, b.Bytes()); !maps.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// ko makes the least that is an ELF file with a section .modinfo.
func ko(t *testing.T, info string) []byte {
	t.Helper()
	names := "\x00.modinfo\x00.shstrtab\x00"
	h := elf.Header64{
		Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1,
		Ehsize: 64, Shentsize: 64, Shnum: 3, Shstrndx: 2, Shoff: uint64(64 + len(info) + len(names)),
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	sections := []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: 64, Size: uint64(len(info))},
		{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(64 + len(info)), Size: uint64(len(names))},
	}
	var b bytes.Buffer
	for _, part := range []any{h, []byte(info), []byte(names), sections} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func TestModules(t *testing.T) {
	dir := t.TempDir()
	for name, depends := range map[string]string{
		"net/wire-guard": "lib_curve,udp-tunnel,core", "lib/lib-curve": "", "net/udp_tunnel": "lib_curve", "net/lost": "nowhere",
		"x/one": "two", "x/two": "one",
	} {
		write(t, filepath.Join(dir, "kernel", name+".ko"), string(ko(t, "license=GPL\x00depends="+depends+"\x00name=x\x00")))
	}
	write(t, filepath.Join(dir, "kernel/x/none.ko"), string(ko(t, "license=GPL\x00")))
	write(t, filepath.Join(dir, "kernel/x/text.ko"), "not ELF")
	write(t, filepath.Join(dir, "kernel/x/odd.ko.gz"), "")
	write(t, filepath.Join(dir, "modules.builtin"), "kernel/lib/core.ko\nkernel/lib/veth-pair.ko\n")
	m, err := readModules(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ want, order, wrong string }{
		{"wire_guard", "lib_curve udp_tunnel wire_guard", ""},
		{"wire-guard none wire_guard", "lib_curve udp_tunnel wire_guard none", ""},
		{"veth_pair core", "", ""},
		{"one", "two one", ""},
		{"lost", "", "nowhere, which lost needs, is not in the package"},
		{"text", "", "read kernel module text"},
		{"odd", "", "unknown compression"},
		{"missing", "", "missing is not in the package"},
	} {
		loaded, err := m.load(t.Context(), strings.Fields(c.want))
		var names []string
		for _, l := range loaded {
			names = append(names, l.name)
		}
		if got := strings.Join(names, " "); got != c.order && c.wrong == "" {
			t.Errorf("%s: %q, want %q", c.want, got, c.order)
		}
		if (err == nil) != (c.wrong == "") || err != nil && !strings.Contains(err.Error(), c.wrong) {
			t.Errorf("%s: %v, want %q", c.want, err, c.wrong)
		}
	}
}

func TestParseLdd(t *testing.T) {
	const text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tlibgone.so => not found\n"
	if got := strings.Join(parseLdd(text), " "); got != "/lib/x86_64-linux-gnu/libc.so.6 /lib64/ld-linux-x86-64.so.2" {
		t.Error(got)
	}
	if got := parseLdd("\tnot a dynamic executable\n"); got != nil {
		t.Error(got)
	}
}

// TestPlan: a shell that reads the plan gets each argument as it was.
func TestPlan(t *testing.T) {
	odd := `a b'c"$(d)\`
	img := Image{Binaries: []Binary{{Package: "x/y", Path: "/tmp/x-y.test", Args: []string{odd, ""}}}}
	plan := filepath.Join(t.TempDir(), "plan")
	write(t, plan, img.plan(time.Minute))
	out, err := output(t.Context(), "", "sh", "-c", `run() { for a; do echo "<$a>"; done; }; . `+plan)
	if err != nil {
		t.Fatal(err)
	}
	want := "<x/y>\n</signet/src/x/y>\n<75>\n<./x-y.test>\n<-test.v=test2json>\n<-test.paniconexit0>\n<-test.timeout=1m0s>\n<" + odd + ">\n<>\n"
	if string(out) != want {
		t.Errorf("got %s, want %s", out, want)
	}
}

// TestImage: the archive has the binary beside its sources, the programs with their libraries, and the extra files.
func TestImage(t *testing.T) {
	if _, err := lookProgram("busybox"); err != nil {
		t.Skipf("an image needs busybox (Debian package busybox-static): %v", err)
	}
	dir := t.TempDir()
	for _, name := range []string{"p/p.go", "p/testdata/sub/x.go", "p/lib/types.h", "p/other/o.go", "p/other/deep/x"} {
		write(t, filepath.Join(dir, name), name)
	}
	write(t, filepath.Join(dir, "p.test"), "binary")
	write(t, filepath.Join(dir, "k/modules.builtin"), "")
	write(t, filepath.Join(dir, "k/kernel/m.ko"), string(ko(t, "")))
	img := Image{
		Binaries: []Binary{{Package: "p", Path: filepath.Join(dir, "p.test"), Dir: filepath.Join(dir, "p")}},
		Programs: []string{"cat"}, Modules: []string{"m"}, Files: map[string]string{"/etc/extra": filepath.Join(dir, "p.test")},
	}
	var b bytes.Buffer
	if err := img.write(t.Context(), &b, Kernel{Release: "r", Modules: filepath.Join(dir, "k")}, time.Minute); err != nil {
		t.Fatal(err)
	}
	got := readCpio(t, b.Bytes())
	for _, name := range []string{
		"init", "bin/busybox", "bin/sh", "usr/sbin/sh", "usr/sbin/cat", "lib64/ld-linux-x86-64.so.2", "etc/passwd", "etc/extra", "signet/plan",
		"signet/modules/000-m.ko", "signet/src/p/p.test", "signet/src/p/p.go", "signet/src/p/testdata/sub/x.go", "signet/src/p/lib/types.h",
	} {
		if got[name] == "" {
			t.Errorf("%s is missing", name)
		}
	}
	for _, name := range []string{"signet/src/p/other", "signet/src/p/other/deep/x"} {
		if got[name] != "" {
			t.Errorf("%s of another package is there", name)
		}
	}
	if t.Failed() {
		t.Log(slices.Sorted(maps.Keys(got)))
	}
	img.Programs = []string{"no-such-program"}
	if err := img.write(t.Context(), io.Discard, Kernel{Modules: dir}, 0); err == nil || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("without a program: %v", err)
	}
}

func TestBuildRefuses(t *testing.T) {
	if _, err := Build(t.Context(), "../..", t.TempDir(), "no/such/package"); err == nil {
		t.Error("a package that is not there was built")
	}
	if _, err := Build(t.Context(), "../..", t.TempDir(), "integration/probe/rogue"); err == nil {
		if m, _ := filepath.Glob(filepath.Join("../..", "integration/probe/rogue", "*_test.go")); len(m) == 0 {
			t.Error("a package without tests was built")
		}
	}
	if _, err := os.Stat("init.sh"); err != nil {
		t.Error(err)
	}
}
