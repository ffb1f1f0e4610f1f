package attest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	idA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	idB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	idC = "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
)

// needRoot: what belongs to another than root is not believed.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: state of containers is believed only where it belongs to root")
	}
}

func put(t testing.TB, path, text string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(text), 0o600))
}

func runtimes(t testing.TB) Runtimes {
	t.Helper()
	dir := t.TempDir()
	r := Runtimes{Docker: dir + "/docker", Containerd: dir + "/containerd", PodmanRun: dir + "/run", PodmanLib: dir + "/lib"}
	for _, d := range []string{r.Docker, r.Containerd, r.PodmanRun, r.PodmanLib} {
		must(t, os.Mkdir(d, 0o755))
	}
	return r
}

func dockerState(id string, pid int, labels map[string]string) string {
	b, _ := json.Marshal(map[string]any{"StreamConfig": map[string]any{}, "ID": id, "State": map[string]any{"Running": true, "Pid": pid},
		"Config": map[string]any{"Hostname": "x", "Labels": labels}, "Args": []string{"-c", "true"}})
	return string(b)
}

func TestReadRuntimes(t *testing.T) {
	needRoot(t)
	r := runtimes(t)
	bundle := `{"ociVersion":"1.0.2","process":{"args":["x"]},"annotations":{"app":"web","io.kubernetes.cri.sandbox-name":"web-0"},"linux":{}}`
	put(t, r.Docker+"/containers/"+idA+"/config.v2.json", dockerState(idA, 41, map[string]string{"app": "web"}))
	put(t, r.Containerd+"/io.containerd.runtime.v2.task/k8s.io/"+idB+"/config.json", bundle)
	put(t, r.Containerd+"/io.containerd.runtime.v2.task/k8s.io/"+idB+"/init.pid", "42")
	must(t, os.MkdirAll(r.Containerd+"/io.containerd.runtime.v2.task/default", 0o755))
	put(t, r.PodmanLib+"/overlay-containers/"+idC+"/userdata/config.json",
		`{"annotations":{"app":"web","io.kubernetes.cri-o.Labels":"{\"tier\":\"front\",\"app\":\"admin\"}"}}`)
	put(t, r.PodmanRun+"/overlay-containers/"+idC+"/userdata/pidfile", "43\n")
	for _, c := range []struct {
		by  runtime
		id  string
		pid int
	}{{docker, idA, 41}, {containerd, idB, 42}, {podman, idC, 43}, {kubernetes, idA, 41}, {kubernetes, idB, 42}, {kubernetes, idC, 43}} {
		rec, err := r.read(c.by, c.id)
		if err != nil || rec.pid != c.pid || rec.labels["app"] != "web" {
			t.Errorf("%s %.4s: %+v, %v", c.by, c.id, rec, err)
		}
		if c.by == podman && rec.labels["tier"] != "front" {
			t.Errorf("labels of a pod are not read: %v", rec.labels)
		}
	}
	for _, by := range []runtime{docker, containerd, podman, kubernetes} {
		if _, err := r.read(by, strings.Repeat("d", idLength)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s knows a container that is not there: %v", by, err)
		}
	}
}

// TestStateThatIsNotBelieved: everything that others than the runtime could have arranged.
func TestStateThatIsNotBelieved(t *testing.T) {
	needRoot(t)
	good := dockerState(idA, 41, map[string]string{"app": "web"})
	var r Runtimes
	var dir, file string
	for name, c := range map[string]struct {
		spoil func()
		want  error
	}{
		"a file of another owner":      {func() { must(t, os.Chown(file, 1000, 0)) }, errForeign},
		"a file that all may write":    {func() { must(t, os.Chmod(file, 0o622)) }, errForeign},
		"a file that a group may":      {func() { must(t, os.Chmod(file, 0o660)) }, errForeign},
		"a directory of another owner": {func() { must(t, os.Chown(dir, 1000, 0)) }, errForeign},
		"a directory that all may":     {func() { must(t, os.Chmod(dir, 0o777)) }, errForeign},
		"a root that all may":          {func() { must(t, os.Chmod(r.Docker, 0o777)) }, errForeign},
		"a link out": {func() {
			must(t, os.Rename(file, filepath.Join(t.TempDir(), "x")))
			other := filepath.Join(t.TempDir(), "config.v2.json")
			put(t, other, good)
			must(t, os.Symlink(other, file))
		}, unix.ELOOP},
		"a linked directory": {func() {
			must(t, os.Rename(dir, r.Docker+"/elsewhere"))
			must(t, os.Symlink("../elsewhere", dir))
		}, unix.ELOOP},
		"a pipe":                  {func() { must(t, os.Remove(file)); must(t, unix.Mkfifo(file, 0o600)) }, errState},
		"a directory for a file":  {func() { must(t, os.Remove(file)); must(t, os.Mkdir(file, 0o700)) }, errState},
		"too long":                {func() { put(t, file, good+strings.Repeat(" ", maxState)) }, errState},
		"empty":                   {func() { put(t, file, "") }, errState},
		"no object":               {func() { put(t, file, `["ID"]`) }, errState},
		"two objects":             {func() { put(t, file, good+"{}") }, errState},
		"half an object":          {func() { put(t, file, good[:len(good)-1]) }, errState},
		"another container's":     {func() { put(t, file, dockerState(idB, 41, nil)) }, errState},
		"no process":              {func() { put(t, file, dockerState(idA, 0, nil)) }, errState},
		"the host's init":         {func() { put(t, file, dockerState(idA, 1, nil)) }, errState},
		"a name twice":            {func() { put(t, file, `{"ID":"x",`+good[1:]) }, errState},
		"a label twice":           {func() { put(t, file, strings.Replace(good, `"app":"web"`, `"app":"web","app":"db"`, 1)) }, errState},
		"a label that is no text": {func() { put(t, file, strings.Replace(good, `"web"`, `["web"]`, 1)) }, errState},
		"another spelling":        {func() { put(t, file, strings.Replace(good, `"ID"`, `"id"`, 1)) }, errState},
	} {
		r = runtimes(t)
		dir = filepath.Join(r.Docker, "containers", idA)
		file = filepath.Join(dir, "config.v2.json")
		put(t, file, good)
		if rec, err := r.read(docker, idA); err != nil || rec.labels["app"] != "web" {
			t.Fatalf("before it is spoilt: %+v, %v", rec, err)
		}
		c.spoil()
		if rec, err := r.read(docker, idA); !errors.Is(err, c.want) {
			t.Errorf("%s: %+v, %v", name, rec, err)
		}
	}
}

func TestRuntimeOf(t *testing.T) {
	for path, want := range map[string]string{
		"/system.slice/docker-" + idA + ".scope":                               "docker " + idA,
		"/docker/" + idA:                                                       "docker " + idA,
		"/machine.slice/libpod-" + idA + ".scope":                              "podman " + idA,
		"/libpod_parent/libpod-" + idA:                                         "podman " + idA,
		"/system.slice/web.service/libpod-payload-" + idA:                      "podman " + idA,
		"/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + idA + ".scope": "containerd " + idA,
		"/kubepods.slice/kubepods-pod1.slice/crio-" + idA + ".scope":           "podman " + idA,
		"/kubepods/besteffort/pod1/" + idA:                                     "kubernetes " + idA,
		"/system.slice/nerdctl-" + idA + ".scope":                              "containerd " + idA,
		"/machine.slice/libpod-conmon-" + idA + ".scope":                       " ",
		"/system.slice/docker-" + idA[:63] + ".scope":                          " ",
		"/system.slice/docker-" + strings.ToUpper(idA) + ".scope":              " ",
		"/system.slice/docker-" + idA:                                          " ",
		"/elsewhere/" + idA:                                                    " ",
		"/system.slice/docker.service":                                         " ",
	} {
		by, id := runtimeOf(path)
		if got := fmt.Sprintf("%s %s", by, id); got != want {
			t.Errorf("%s is of %q, expected %q", path, got, want)
		}
	}
}

func FuzzParseDocker(f *testing.F) {
	f.Add([]byte(dockerState(idA, 41, map[string]string{"app": "web"})))
	f.Add([]byte(`{"ID":"` + idA + `","State":{"Pid":2},"Config":{"Labels":null}}`))
	f.Add([]byte(`{"ID":"x","ID":"y"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		rec, err := parseDocker(data, idA)
		checkRecord(t, data, rec, err)
	})
}

func FuzzParseBundle(f *testing.F) {
	f.Add([]byte(`{"annotations":{"app":"web","io.kubernetes.cri-o.Labels":"{\"a\":\"b\"}"}}`), []byte("43\n"))
	f.Add([]byte(`{"annotations":null}`), []byte("1"))
	f.Add([]byte(`{"annotations":{"a":1}}`), []byte("-7"))
	f.Fuzz(func(t *testing.T, config, pid []byte) {
		rec, err := parseBundle(config, pid)
		checkRecord(t, config, rec, err)
	})
}

// checkRecord: what is believed is one JSON document, has a process that is not the host's init, and no label that the
// slow reader does not see somewhere.
func checkRecord(t *testing.T, data []byte, rec record, err error) {
	if err != nil {
		if !errors.Is(err, errState) && !errors.As(err, new(*json.SyntaxError)) {
			t.Errorf("unexpected kind of error: %v", err)
		}
		return
	}
	if rec.pid <= 1 || !json.Valid(data) || rec.labels == nil || len(rec.labels) > 2*maxLabels {
		t.Errorf("believed %q as %+v", data, rec)
	}
}

func FuzzRuntimeOf(f *testing.F) {
	f.Add("/system.slice/docker-" + idA + ".scope")
	f.Add("/kubepods/besteffort/pod1/" + idA)
	f.Fuzz(func(t *testing.T, path string) {
		if by, id := runtimeOf(path); (by == "") != (id == "") || id != "" && (!isID(id) || !strings.Contains(path, id)) {
			t.Errorf("%q is of %q, container %q", path, by, id)
		}
	})
}
