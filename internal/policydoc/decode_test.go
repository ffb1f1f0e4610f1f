package policydoc

import (
	"errors"
	"testing"
	"time"

	"github.com/signet-overlay/signet/internal/policy"
)

type config struct {
	TrustDomain string                     `yaml:"trust_domain"`
	Listen      listen                     `yaml:"listen"`
	Lease       time.Duration              `yaml:"lease"`
	Spool       Bytes                      `yaml:"spool_bytes"`
	Coordinator Strings                    `yaml:"coordinator"`
	Port        uint16                     `yaml:"listen_port"`
	Count       int                        `yaml:"count"`
	Debug       bool                       `yaml:"debug"`
	Service     policy.Service             `yaml:"service"`
	Optional    *listen                    `yaml:"optional"`
	Sampled     map[string]float64         `yaml:"sampled"`
	Extra       map[string]any             `yaml:"extra"`
	Export      []any                      `yaml:"export,notbuilt"`
	Named       map[string]map[string]bool `yaml:"named"`
	private     string
}

type listen struct {
	Agents string `yaml:"agents"`
	API    string `yaml:"api"`
}

func TestDecodeStrict(t *testing.T) {
	c := config{Lease: time.Hour, Debug: true, Listen: listen{Agents: "a", API: "b"}, private: "kept"}
	err := DecodeStrict("c.yaml", []byte(`
trust_domain: settler.example
listen: {api: "127.0.0.1:7480"}
spool_bytes: 1GiB
coordinator: coord:7443
listen_port: 51820
count: -3
service: tcp/5432
optional: {agents: x}
sampled: {a: 0.01, b: 1}
extra: {list: [1, x, true, 1.5, {k: null}]}
export: []
named: {a: {b: true}}
`), &c)
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen != (listen{"a", "127.0.0.1:7480"}) || c.Lease != time.Hour || c.Spool != 1<<30 || len(c.Coordinator) != 1 || c.Port != 51820 ||
		c.Count != -3 || !c.Debug || c.Service.First != 5432 || c.Optional.Agents != "x" || c.Sampled["a"] != 0.01 || c.Sampled["b"] != 1 ||
		len(c.Extra["list"].([]any)) != 5 || !c.Named["a"]["b"] || c.private != "kept" {
		t.Errorf("got %+v", c)
	}
	if err := DecodeStrict("c.yaml", []byte("coordinator: [a, b]\nlease: 5m\n"), &c); err != nil || len(c.Coordinator) != 2 || c.Lease != 5*time.Minute {
		t.Errorf("got %+v, %v", c, err)
	}
	if err := DecodeStrict("c.yaml", nil, &c); err != nil {
		t.Errorf("an empty file keeps every default, got %v", err)
	}
}

func TestDecodeStrictRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"lisen: {}":                   `c.yaml:1:1: "lisen" is an unknown key of the file: expected one of coordinator, count, debug, export, extra, lease, listen, listen_port, named, optional, sampled, service, spool_bytes, trust_domain; did you mean "listen"?`,
		"listen: {apis: x}":           `c.yaml:1:10: "apis" is an unknown key of listen: expected one of agents, api; did you mean "api"?`,
		"lease: forever":              `c.yaml:1:8: "forever" is not a duration: expected one such as 24h, 5m or 30s`,
		"lease: -5m":                  `c.yaml:1:8: "-5m" is not a duration: expected one such as 24h, 5m or 30s`,
		"lease: 5":                    `c.yaml:1:8: "5" is not a duration: expected one such as 24h, 5m or 30s`,
		"spool_bytes: 1 pint":         `c.yaml:1:14: "1 pint" is not a size: expected one such as 512MiB or 1GiB`,
		"spool_bytes: 9999999999TiB":  `c.yaml:1:14: "9999999999TiB" is not a size: expected one such as 512MiB or 1GiB`,
		"listen_port: 65536":          `c.yaml:1:14: "65536" is not valid: expected a whole number for listen_port that fits`,
		"listen_port: 010":            `c.yaml:1:14: "010" is not valid: expected a whole number for listen_port that fits`,
		"listen_port: \"1\"":          `c.yaml:1:14: "1" is a text: expected a whole number for listen_port; numbers are written without quotes`,
		"trust_domain: 1.5":           `c.yaml:1:15: "1.5" is a number: expected a text for trust_domain; put it in quotes if it is meant as a text`,
		"trust_domain:":               `c.yaml:1:15: this is nothing: expected a value for trust_domain; remove the key to keep its default`,
		"debug: \"true\"":             `c.yaml:1:8: "true" is a text: expected true or false for debug; true and false are written without quotes`,
		"debug: on":                   `c.yaml:1:8: "on" is a text: expected true or false for debug; true and false are written without quotes`,
		"service: tcp/0":              `c.yaml:1:10: "tcp/0" is not valid: invalid service "tcp/0": expected tcp/PORT, tcp/FIRST-LAST, udp/PORT, sctp/PORT, icmp or any, with ports 1 to 65535`,
		"sampled: {a: .nan}":          `c.yaml:1:14: ".nan" is not valid: expected a number for a that fits`,
		"coordinator: {}":             `c.yaml:1:14: this is a mapping: expected a list for coordinator`,
		"listen: x":                   `c.yaml:1:9: "x" is a text: expected a mapping with the keys of listen`,
		"export: [{type: file}]":      `c.yaml:1:1: the key "export" of the file is not built yet; remove it`,
		"count: 1\ncount: 2":          `c.yaml:2:1: "count" is a duplicate key: expected each key once; it stands at line 1 already`,
		"- a":                         `c.yaml:1:1: this is a list: expected a mapping with the keys of the file`,
		"sampled: []":                 `c.yaml:1:10: this is a list: expected a mapping for sampled`,
		"optional: {agents: [a, b]}":  `c.yaml:1:20: this is a list: expected a text for agents`,
		"trust_domain: a\nlease: 1h1": `c.yaml:2:8: "1h1" is not a duration: expected one such as 24h, 5m or 30s`,
	} {
		var c config
		err := DecodeStrict("c.yaml", []byte(text), &c)
		if !errors.Is(err, ErrDocument) || err.Error() != want {
			t.Errorf("%q:\n got %v\nwant %s", text, err, want)
		}
	}
}

func TestBytes(t *testing.T) {
	for text, want := range map[string]Bytes{"0": 0, "5B": 5, "1kB": 1000, "3 MiB": 3 << 20, "2TB": 2e12, "7": 7, "1TiB": 1 << 40} {
		got, err := ParseBytes(text)
		if err != nil || got != want {
			t.Errorf("%q: got %v, %v", text, got, err)
		}
		if back, err := ParseBytes(got.String()); err != nil || back != got {
			t.Errorf("%v reads back as %v, %v", got, back, err)
		}
	}
	for _, text := range []string{"", "B", "-1", "1.5GiB", "GiB", "1gib", "9223372036854775808", "8388608TiB"} {
		if got, err := ParseBytes(text); err == nil {
			t.Errorf("%q: got %v", text, got)
		}
	}
}

func TestDecodeStrictPanicsOnBug(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	_ = DecodeStrict("c.yaml", nil, config{})
}

func FuzzDecodeStrict(f *testing.F) {
	f.Add([]byte("listen: {api: x}\nextra: {a: [1]}\nlease: 1h\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var c config
		if err := DecodeStrict("c.yaml", data, &c); err != nil && !errors.Is(err, ErrDocument) {
			t.Fatal(err)
		}
	})
}
