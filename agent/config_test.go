package agent

import (
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/policy"
)

func TestExampleConfigIsCorrect(t *testing.T) {
	data, err := os.ReadFile("../deploy/examples/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseConfig("agent.yaml", data)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Coordinator) != 1 || len(got.Endpoints) != 0 || got.Node == "" {
		t.Errorf("the example says %+v", got)
	}
	// All else that stands there is the default, as its first sentence says.
	want := DefaultConfig()
	want.Coordinator, want.Endpoints, want.Node = got.Coordinator, got.Endpoints, got.Node
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the example says %+v, the defaults are %+v", got, want)
	}
	if n := len(got.notServed()); n != 2 {
		t.Errorf("%d parts are not served, expected the Workload API and metrics", n)
	}
}

func TestConfig(t *testing.T) {
	for text, says := range map[string]string{
		"coordinator: [a:1, b:2]\nendpoints: [192.0.2.1, '192.0.2.2:4000']\ncgroup_root: /sys/fs/cgroup/x\non_lease_end: static": "",
		"workload_api: ''\nmetrics: ''":                       "",
		"accept_gaps: [no-setsockopt-hook, cgroup-namespace]": "",
		"accept_gaps: [no-setsockopt-hook, everything]":       `accept_gaps: no such gap: "everything"`,
		"coordinatr: a:1":                                 "coordinatr",
		"coordinator: nowhere":                            "coordinator",
		"node: '../x'":                                    "node",
		"listen_port: 70000":                              "listen_port",
		"interface: much-too-long-name":                   "interface",
		"on_lease_end: allow":                             "on_lease_end",
		"state_dir: relative":                             "state_dir",
		"state_dir: /var/lib/s\nkey_file: /var/lib/s/key": "key_file",
		"endpoints: [example.com]":                        "endpoints",
		"endpoints: ['127.0.0.1:4']":                      "endpoints",
		"cgroup_root: here":                               "cgroup_root",
		"tunnel: other":                                   "tunnel",
		"workload_api: unix:///run/spire.sock":            "not built yet",
		"metrics: 0.0.0.0:7491":                           "not built yet",
		"flow_log: {spool_bytes: 2GiB}":                   "not built yet",
		"flow_log: {sinks: [{name: a, type: file}]}":      "not built yet",
		"flow_log: {file: relative}":                      "flow_log.file",
		"socket: /" + strings.Repeat("x", 120):            "socket",
	} {
		if !strings.Contains(text, "node:") {
			text += "\nnode: api-1"
		}
		_, err := ParseConfig("agent.yaml", []byte(text))
		switch {
		case says == "" && err != nil:
			t.Errorf("%s: %v", text, err)
		case says != "" && (err == nil || !strings.Contains(err.Error(), says) || !strings.HasPrefix(err.Error(), "agent.yaml")):
			t.Errorf("%s: %v, expected %q", text, err, says)
		case says == "not built yet" && !errors.Is(err, policy.ErrNotBuilt):
			t.Errorf("%s: %v does not wrap ErrNotBuilt", text, err)
		}
	}
}

func TestDrift(t *testing.T) {
	a := time.Now()
	if by := drift(a, a.Add(5*time.Second)); by != 0 {
		t.Errorf("both clocks went on, drift %v", by)
	}
	// Round(0) drops the monotonic reading, so that the difference below is one of wall clocks only.
	set := a.Add(time.Hour).Round(0)
	if by := set.Sub(a.Round(0)) - 0; by < clockJump {
		t.Errorf("an hour counts as %v", by)
	}
}
