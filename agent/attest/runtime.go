package attest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Runtimes are where container runtimes keep what they say of their containers. Nothing is asked of a daemon: the files
// of the one that runs a container are all there is, and they must belong to root.
type Runtimes struct {
	Docker     string // root of the daemon's data: containers/ID/config.v2.json
	Containerd string // its state: io.containerd.runtime.v2.task/NAMESPACE/ID/config.json and init.pid
	PodmanRun  string // storage's run root (Podman, CRI-O): overlay-containers/ID/userdata/pidfile, and config.json
	PodmanLib  string // storage's graph root: overlay-containers/ID/userdata/config.json
}

// DefaultRuntimes are where packages of the runtimes put it.
func DefaultRuntimes() Runtimes {
	return Runtimes{Docker: "/var/lib/docker", Containerd: "/run/containerd",
		PodmanRun: "/run/containers/storage", PodmanLib: "/var/lib/containers/storage"}
}

const (
	// maxState bounds one file of a runtime; with the longest lists of capabilities, mounts and filters that are in use
	// they have some 100 KiB. A longer one is refused.
	maxState = 1 << 20
	// maxSpaces bounds containerd's namespaces that are looked at.
	maxSpaces = 64
	// maxLabels bounds the labels of one container; one with more is refused.
	maxLabels = 4096
	// crioLabels is the annotation that holds, as JSON, the labels that Kubernetes gave a pod (CRI-O).
	crioLabels = "io.kubernetes.cri-o.Labels"
)

// Errors of state that is not believed.
var (
	errState   = errors.New("state is not as its runtime writes it")
	errForeign = errors.New("does not belong to root alone")
)

// record is what a runtime says of one running container.
type record struct {
	labels map[string]string
	pid    int // of its first process, in this host's numbers
}

// runtime names who made a container, as far as its cgroup tells.
type runtime string

const (
	docker     runtime = "docker"
	containerd runtime = "containerd"
	podman     runtime = "podman" // CRI-O too, which has the same storage
	kubernetes runtime = "kubernetes"
)

// read finds what the runtime says of a container. The error wraps os.ErrNotExist where it says nothing.
func (r Runtimes) read(by runtime, id string) (record, error) {
	switch by {
	case docker:
		return r.readDocker(id)
	case containerd:
		return r.readContainerd(id)
	case podman:
		return r.readPodman(id)
	}
	// Below kubepods the directory tells only the id, which is unique: 256 random bits.
	var errs []error
	for _, read := range []func(string) (record, error){r.readContainerd, r.readPodman, r.readDocker} {
		rec, err := read(id)
		if err == nil {
			return rec, nil
		}
		errs = append(errs, err)
	}
	for _, err := range errs {
		if !errors.Is(err, os.ErrNotExist) {
			return record{}, err // one that is there and is not believed says more than those that are not
		}
	}
	return record{}, errs[0]
}

func (r Runtimes) readDocker(id string) (record, error) {
	data, err := readState(r.Docker, path.Join("containers", id, "config.v2.json"))
	if err != nil {
		return record{}, err
	}
	return parseDocker(data, id)
}

func (r Runtimes) readContainerd(id string) (record, error) {
	const tasks = "io.containerd.runtime.v2.task"
	spaces, err := listState(r.Containerd, tasks)
	if err != nil {
		return record{}, err
	}
	for _, space := range spaces {
		dir := path.Join(tasks, space, id)
		data, err := readState(r.Containerd, path.Join(dir, "config.json"))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return record{}, err
		}
		pid, err := readState(r.Containerd, path.Join(dir, "init.pid"))
		if err != nil {
			return record{}, err
		}
		return parseBundle(data, pid)
	}
	return record{}, fmt.Errorf("%s: no task %s: %w", r.Containerd, id, os.ErrNotExist)
}

func (r Runtimes) readPodman(id string) (record, error) {
	var last error
	for _, driver := range []string{"overlay", "vfs", "btrfs", "zfs"} {
		dir := path.Join(driver+"-containers", id, "userdata")
		data, err := readState(r.PodmanRun, path.Join(dir, "config.json"))
		if errors.Is(err, os.ErrNotExist) {
			data, err = readState(r.PodmanLib, path.Join(dir, "config.json"))
		}
		if err == nil {
			var pid []byte
			if pid, err = readState(r.PodmanRun, path.Join(dir, "pidfile")); err == nil {
				return parseBundle(data, pid)
			}
		}
		if !errors.Is(err, os.ErrNotExist) {
			return record{}, err
		}
		last = err
	}
	return record{}, last
}

// parseDocker reads config.v2.json: the labels in Config, the first process in State.
func parseDocker(data []byte, id string) (record, error) {
	var rec record
	top, err := object(data)
	if err != nil {
		return rec, err
	}
	var says string
	if err := json.Unmarshal(top["ID"], &says); err != nil || says != id {
		return rec, fmt.Errorf("%w: it is of container %.64q", errState, says)
	}
	state, err := object(top["State"])
	if err != nil {
		return rec, err
	}
	if err := json.Unmarshal(state["Pid"], &rec.pid); err != nil || rec.pid <= 1 {
		return rec, fmt.Errorf("%w: the container has no process", errState)
	}
	config, err := object(top["Config"])
	if err != nil {
		return rec, err
	}
	rec.labels, err = labels(config["Labels"])
	return rec, err
}

// parseBundle reads the configuration of an OCI bundle and the file with its first process.
func parseBundle(config, pid []byte) (record, error) {
	var rec record
	top, err := object(config)
	if err != nil {
		return rec, err
	}
	if rec.labels, err = labels(top["annotations"]); err != nil {
		return rec, err
	}
	if text, ok := rec.labels[crioLabels]; ok {
		more, err := labels([]byte(text))
		if err != nil {
			return rec, err
		}
		for k, v := range more {
			// Who may create pods chooses their labels, but not what the runtime itself says.
			if _, taken := rec.labels[k]; !taken {
				rec.labels[k] = v
			}
		}
	}
	rec.pid, err = strconv.Atoi(strings.TrimSpace(string(pid)))
	if err != nil || rec.pid <= 1 {
		return rec, fmt.Errorf("%w: %.20q is no process", errState, pid)
	}
	return rec, nil
}

// labels reads an object of strings; none is an empty one.
func labels(raw []byte) (map[string]string, error) {
	if len(raw) == 0 || string(raw) == "null" {
		return map[string]string{}, nil
	}
	members, err := object(raw)
	if err != nil {
		return nil, err
	}
	if len(members) > maxLabels {
		return nil, fmt.Errorf("%w: %d labels, at most %d are read", errState, len(members), maxLabels)
	}
	out := make(map[string]string, len(members))
	for k, v := range members {
		var text string
		if err := json.Unmarshal(v, &text); err != nil || len(v) == 0 || v[0] != '"' {
			return nil, fmt.Errorf("%w: label %.64q is not text", errState, k)
		}
		out[k] = text
	}
	return out, nil
}

// object reads one JSON object and nothing after it. Names count as they are written: a reader that takes "labels" for
// "Labels", or the last of two for the first, could be made to see other labels than the runtime does.
func object(data []byte) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, fmt.Errorf("%w: expected a JSON object", errState)
	}
	out := map[string]json.RawMessage{}
	for dec.More() {
		t, err := dec.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return nil, fmt.Errorf("%w: expected a name", errState)
		}
		if _, twice := out[name]; twice {
			return nil, fmt.Errorf("%w: %.64q is there twice", errState, name)
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil, fmt.Errorf("%w: %.64q has no value", errState, name)
		}
		out[name] = value
	}
	if _, err := dec.Token(); err != nil {
		return nil, fmt.Errorf("%w: the object does not end", errState)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: something follows the object", errState)
	}
	return out, nil
}

// readState reads a file of a runtime. Below root there may be no symbolic link and no other mount's trap on the way, and
// each directory and the file itself must belong to root and be writable by nobody else.
func readState(root, name string) ([]byte, error) {
	fd, err := openState(root, name, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path.Join(root, name))
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() > maxState {
		return nil, fmt.Errorf("%s: %w: expected a file of at most %d bytes", f.Name(), errState, maxState)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return nil, fmt.Errorf("read state of a container: %w", err)
	}
	if len(data) > maxState {
		return nil, fmt.Errorf("%s: %w: it grows", f.Name(), errState)
	}
	return data, nil
}

// listState lists a directory of a runtime: at most maxSpaces names.
func listState(root, name string) ([]string, error) {
	fd, err := openState(root, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path.Join(root, name))
	defer f.Close()
	names, err := f.Readdirnames(maxSpaces)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("list state of containers: %w", err)
	}
	return names, nil
}

// openState walks from root to name and looks at each step after it was opened, so that nothing can be exchanged between
// the look and the use.
func openState(root, name string, flags int) (int, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open state %s: %w", root, err)
	}
	if err := ownedByRoot(dir); err != nil {
		_ = unix.Close(dir)
		return -1, fmt.Errorf("%s: %w", root, err)
	}
	steps := strings.Split(name, "/")
	for i, step := range steps {
		how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
		if i == len(steps)-1 {
			how.Flags = uint64(flags) | unix.O_CLOEXEC
		}
		next, err := unix.Openat2(dir, step, &how)
		_ = unix.Close(dir)
		if err == nil {
			if err = ownedByRoot(next); err != nil {
				_ = unix.Close(next)
			}
		}
		if err != nil {
			return -1, fmt.Errorf("open state %s: %w", path.Join(append([]string{root}, steps[:i+1]...)...), err)
		}
		dir = next
	}
	return dir, nil
}

func ownedByRoot(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("look at it: %w", err)
	}
	if st.Uid != 0 || st.Mode&0o022 != 0 {
		return fmt.Errorf("%w: owner %d, mode %04o", errForeign, st.Uid, st.Mode&0o7777)
	}
	return nil
}
