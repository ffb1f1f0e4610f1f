package main

import (
	"bytes"
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
)

func runArgs(args ...string) (code int, out, errs string) {
	var o, e bytes.Buffer
	code = run(context.Background(), process{args: args, out: &o, err: &e, getenv: func(string) string { return "" }})
	return code, o.String(), e.String()
}

func TestExitCodes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{nil, exitUsage, "name a command"},
		{[]string{"frobnicate"}, exitUsage, "frobnicate"},
		{[]string{"init"}, exitUsage, "--trust-domain"},
		{[]string{"init", "--wat"}, exitUsage, "--wat"},
		{[]string{"init", "x", "--trust-domain", "a", "--data-dir", dir}, exitUsage, "x"},
		{[]string{"serve"}, exitUsage, "--config"},
		{[]string{"serve", "--config", "a", "--data-dir", "b"}, exitUsage, "either"},
		{[]string{"serve", "--data-dir", dir, "--log-level", "loud"}, exitUsage, "loud"},
		{[]string{"version", "-o", "xml"}, exitUsage, "xml"},
		{[]string{"serve", "--data-dir", dir}, exitFailure, "signet-coordinator init"},
		{[]string{"serve", "--config", dir + ".none"}, exitFailure, "no such file"},
		{[]string{"init", "--trust-domain", "A", "--data-dir", dir}, exitFailure, "trust domain"},
		{[]string{"init", "--trust-domain", "a.example", "--data-dir", dir, "-o", "json"}, exitOK, ""},
		{[]string{"init", "--trust-domain", "a.example", "--data-dir", dir}, exitFailure, "already"},
		{[]string{"version"}, exitOK, ""},
		{[]string{"--help"}, exitOK, ""},
	} {
		code, _, errs := runArgs(c.args...)
		if code != c.code || !strings.Contains(errs, c.says) {
			t.Errorf("%v: exit %d, said %q; expected %d and %q", c.args, code, errs, c.code, c.says)
		}
	}
}

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := notify(path, "READY=1"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 64)
	if n, err := l.Read(b); err != nil || string(b[:n]) != "READY=1" {
		t.Errorf("%q %v", b[:n], err)
	}
	if err := notify("", "READY=1"); err != nil {
		t.Error(err)
	}
}
