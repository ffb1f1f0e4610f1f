package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/coordinator/api/client"
	"github.com/signet-overlay/signet/internal/policydoc"
)

// Limits of files that are read whole.
const (
	maxSecret = 4 << 10
	maxConfig = 1 << 20
)

// configFile is ~/.config/signet/config.yaml.
type configFile struct {
	Context  string                   `yaml:"context"`
	Contexts map[string]configContext `yaml:"contexts"`
}

// configContext names one coordinator.
type configContext struct {
	API       string `yaml:"api"`
	TokenFile string `yaml:"token_file"`
	CAFile    string `yaml:"ca_file"`
}

// errNoAPI says that no coordinator was named.
var errNoAPI = errors.New("no API was named")

// settings joins flags, environment and context; earlier ones win, each value on its own.
func (a *app) settings() (configContext, error) {
	s := configContext{API: a.flags.api, TokenFile: a.flags.tokenFile, CAFile: a.flags.caFile}
	given := s.API != ""
	if s.API == "" {
		s.API = a.env.Getenv("SIGNET_API")
	}
	if s.TokenFile == "" {
		s.TokenFile = a.env.Getenv("SIGNET_TOKEN_FILE")
	}
	if a.flags.context != "" && given {
		return s, usagef("--api and --context exclude each other")
	}
	// A context's token belongs to its API: it is never sent to an address that was given otherwise.
	if s.API != "" && a.flags.context == "" {
		return s, nil
	}
	c, err := a.contextOf()
	if err != nil {
		return s, err
	}
	if c.API == "" {
		return s, nil
	}
	s.API = c.API
	if a.flags.tokenFile == "" {
		s.TokenFile = c.TokenFile
	}
	if s.CAFile == "" {
		s.CAFile = c.CAFile
	}
	return s, nil
}

func (a *app) configPath() string {
	if dir := a.env.Getenv("XDG_CONFIG_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "signet", "config.yaml")
	}
	home := a.env.Getenv("HOME")
	if home == "" {
		return ""
	}
	return filepath.Join(home, ".config", "signet", "config.yaml")
}

func (a *app) contextOf() (configContext, error) {
	path := a.configPath()
	var conf configFile
	data, err := readBounded(path, maxConfig)
	switch {
	case path == "" || errors.Is(err, fs.ErrNotExist):
		if a.flags.context != "" {
			return configContext{}, usagef("there is no context %q: %s does not exist", a.flags.context, path)
		}
		return configContext{}, nil
	case err != nil:
		return configContext{}, fmt.Errorf("read configuration: %w", err)
	}
	if err := policydoc.DecodeStrict(path, data, &conf); err != nil {
		return configContext{}, fmt.Errorf("read configuration: %w", err)
	}
	name := conf.Context
	if a.flags.context != "" {
		name = a.flags.context
	}
	if name == "" {
		return configContext{}, nil
	}
	c, ok := conf.Contexts[name]
	if !ok {
		return configContext{}, usagef("there is no context %q in %s", name, path)
	}
	return c, nil
}

// client makes the API client; errNoAPI when none is configured.
func (a *app) client() (*client.Client, error) {
	s, err := a.settings()
	if err != nil {
		return nil, err
	}
	if s.API == "" {
		return nil, withHint(errNoAPI, "give --api URL and --token-file FILE, or set SIGNET_API and SIGNET_TOKEN_FILE")
	}
	o := client.Options{Address: s.API}
	if s.TokenFile == "" {
		return nil, withHint(errors.New("no API token was named"), "give --token-file FILE or set SIGNET_TOKEN_FILE")
	}
	if o.Token, err = readSecret(s.TokenFile); err != nil {
		return nil, fmt.Errorf("read API token: %w", err)
	}
	if s.CAFile != "" {
		if o.CA, err = readBounded(s.CAFile, maxConfig); err != nil {
			return nil, fmt.Errorf("read CA file: %w", err)
		}
	}
	c, err := client.New(o)
	if errors.Is(err, client.ErrAddress) {
		return nil, usageError{err}
	}
	return c, err
}

// hasAPI reports whether a coordinator is named: commands that can ask either side then ask it.
func (a *app) hasAPI() (bool, error) {
	s, err := a.settings()
	return s.API != "", err
}

func (a *app) agent() *localapi.Client { return &localapi.Client{Socket: a.flags.socket} }

// readSecret reads a token. The file is judged by its open descriptor, so that it cannot be exchanged between the look
// and the reading. Its content appears in no error.
func readSecret(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is not a file", path)
	}
	if mode := info.Mode().Perm(); mode&0o007 != 0 {
		return "", withHint(fmt.Errorf("%s has mode %04o: others on this host can read the token", path, mode), "make a new token, then: chmod 600 %s", path)
	}
	return secretFrom(f, path)
}

// secretFrom reads one word.
func secretFrom(r io.Reader, name string) (string, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxSecret+1))
	if err != nil {
		return "", err
	}
	data = bytes.TrimSpace(data)
	switch {
	case len(data) == 0:
		return "", fmt.Errorf("%s is empty", name)
	case len(data) > maxSecret || strings.ContainsFunc(string(data), func(c rune) bool { return c <= ' ' || c > '~' }):
		return "", fmt.Errorf("%s does not hold one token", name)
	}
	return string(data), nil
}

func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return data, err
}
