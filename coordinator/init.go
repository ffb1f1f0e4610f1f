package coordinator

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/signet-overlay/signet/coordinator/authority"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
)

const (
	// AdminTokenName is the file in the data folder with the first API token.
	AdminTokenName = "admin.token"
	// adminTokenPrefix lets people and secret scanners know an API token when they see one.
	adminTokenPrefix = "sga1_"
	roleOwner        = "owner"
)

// ErrInitialised is returned when there is something already that Init would overwrite.
var ErrInitialised = errors.New("it is initialised already and is never overwritten")

// InitOptions say what to make. TrustDomain and DataDir are required.
type InitOptions struct {
	TrustDomain string
	DataDir     string
	API         string // empty: the default
	Agents      string
	IPv4Pool    string
	KeyFile     string // empty: KeyFileFor(DataDir)
}

// Initialised says what Init has made.
type Initialised struct {
	Config     Config
	AdminToken string // path
	ConfigFile string // path
	Pin        [32]byte
	Overlay4   netip.Prefix
	Overlay6   netip.Prefix
}

// Init makes the data folder: store, trust root, first API token, configuration. All of it is made beside the folder
// and moved into place at once: whatever goes wrong, there is a whole one or none.
func Init(ctx context.Context, o InitOptions) (Initialised, error) {
	cfg, td, pool, err := o.plan()
	if err != nil {
		return Initialised{}, err
	}
	if err := refuseOverwrite(cfg.DataDir); err != nil {
		return Initialised{}, err
	}
	parent := filepath.Dir(filepath.Clean(cfg.DataDir))
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return Initialised{}, fmt.Errorf("make folder %s: %w", parent, err)
	}
	tmp, err := os.MkdirTemp(parent, ".signet-init-*") // mode 0700
	if err != nil {
		return Initialised{}, fmt.Errorf("make data folder: %w", err)
	}
	defer func() { _ = os.RemoveAll(tmp) }() // gone already when all went well
	stateKey, undo, err := initKey(cfg.KeyFile)
	if err != nil {
		return Initialised{}, err
	}
	placed := false
	defer func() {
		if !placed {
			undo()
		}
	}()
	pin, err := fill(ctx, tmp, td, pool, stateKey)
	if err != nil {
		return Initialised{}, err
	}
	if err := writeFile(filepath.Join(tmp, configName), 0o600, []byte(cfg.text())); err != nil {
		return Initialised{}, err
	}
	if err := os.Rename(tmp, cfg.DataDir); err != nil {
		return Initialised{}, fmt.Errorf("put data folder in place: %w; if it is a mount point, name a folder below it", err)
	}
	placed = true
	if err := syncDir(parent); err != nil {
		return Initialised{}, err
	}
	return Initialised{Config: cfg, AdminToken: filepath.Join(cfg.DataDir, AdminTokenName), ConfigFile: filepath.Join(cfg.DataDir, configName),
		Pin: pin, Overlay4: pool, Overlay6: registry.Overlay6For(td)}, nil
}

// plan checks everything that can be checked before anything is made.
func (o InitOptions) plan() (cfg Config, td identity.TrustDomain, pool netip.Prefix, err error) {
	if td, err = identity.ParseTrustDomain(o.TrustDomain); err != nil {
		return cfg, td, pool, fmt.Errorf("%w: trust domain: %w", ErrConfig, err)
	}
	cfg = DefaultConfig()
	cfg.TrustDomain, cfg.DataDir, cfg.KeyFile = o.TrustDomain, o.DataDir, o.KeyFile
	set(&cfg.Listen.API, o.API)
	set(&cfg.Listen.Agents, o.Agents)
	cfg.Overlay = Overlay{IPv4: DefaultPool4, IPv6: ipv6Auto}
	set(&cfg.Overlay.IPv4, o.IPv4Pool)
	if cfg.DataDir == "" {
		return cfg, td, pool, fmt.Errorf("%w: no data folder was named", ErrConfig)
	}
	for _, p := range []*string{&cfg.DataDir, &cfg.KeyFile} {
		if *p == "" {
			*p = KeyFileFor(cfg.DataDir)
		}
		if *p, err = filepath.Abs(*p); err != nil {
			return cfg, td, pool, fmt.Errorf("find folder: %w", err)
		}
	}
	if err := cfg.Check(); err != nil {
		return cfg, td, pool, err
	}
	if pool, _, err = cfg.Overlay.prefixes(); err != nil {
		return cfg, td, pool, err
	}
	networks, err := ownNetworks()
	if err != nil {
		return cfg, td, pool, err
	}
	for _, p := range []netip.Prefix{pool, registry.Overlay6For(td)} {
		if err := checkOverlap(p, networks); err != nil {
			return cfg, td, pool, fmt.Errorf("%w: %w", ErrConfig, err)
		}
	}
	return cfg, td, pool, nil
}

func set(dst *string, v string) {
	if v != "" {
		*dst = v
	}
}

// refuseOverwrite lets an empty folder pass: packages may have made it.
func refuseOverwrite(dir string) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("look at data folder: %w", err)
	case len(entries) == 0:
		return nil
	}
	if has, err := store.Exists(dir); err != nil || has {
		return errors.Join(fmt.Errorf("data folder %s: %w; to begin anew, move it away", dir, ErrInitialised), err)
	}
	return fmt.Errorf("data folder %s is not empty (%s): %w", dir, entries[0].Name(), ErrInitialised)
}

// initKey takes the key file that is there, or makes it; undo removes it again only in the latter case.
func initKey(path string) (k key.StateKey, undo func(), err error) {
	_, statErr := os.Lstat(path)
	if k, err = key.LoadOrCreateStateKey(path); err != nil {
		return k, nil, fmt.Errorf("key file: %w", err)
	}
	if errors.Is(statErr, fs.ErrNotExist) {
		return k, func() { _ = os.Remove(path) }, nil
	}
	return k, func() {}, nil
}

// fill makes store, authority and first token in dir, and closes the store.
func fill(ctx context.Context, dir string, td identity.TrustDomain, pool netip.Prefix, k key.StateKey) (pin [32]byte, err error) {
	db, err := store.OpenSQLite(ctx, dir)
	if err != nil {
		return pin, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if err := authority.Init(ctx, db, authority.Options{TrustDomain: td, Key: k}); err != nil {
		return pin, err
	}
	auth, err := authority.Open(ctx, db, authority.Options{TrustDomain: td, Key: k})
	if err != nil {
		return pin, err
	}
	if _, err := registry.Open(ctx, db, registry.Options{TrustDomain: td, Overlay4: pool, Parse: parser(td), Pin: pinOf(auth)}); err != nil {
		return pin, err
	}
	text, err := adminToken(ctx, db)
	if err != nil {
		return pin, err
	}
	return auth.Bundle().Pin(), writeFile(filepath.Join(dir, AdminTokenName), 0o600, []byte(text+"\n"))
}

func adminToken(ctx context.Context, db store.Store) (text string, err error) {
	var secret [32]byte
	var id [8]byte
	// crypto/rand.Read never fails: it ends the process instead.
	_, _ = rand.Read(secret[:])
	_, _ = rand.Read(id[:])
	text = adminTokenPrefix + base64.RawURLEncoding.EncodeToString(secret[:])
	now := time.Now().UTC()
	row := store.APIToken{ID: hex.EncodeToString(id[:]), Name: "first admin", Role: roleOwner, Hash: sha256.Sum256([]byte(text)), Created: now, By: "init"}
	_, err = db.Update(ctx, func(tx store.Tx) error {
		if err := tx.PutAPIToken(row); err != nil {
			return err
		}
		_, err := tx.AppendAudit(store.Audit{Time: now, Who: "coordinator", What: "token.create", Object: row.ID, Outcome: "ok", Detail: "role owner, by init"})
		return err
	})
	if err != nil {
		return "", fmt.Errorf("make admin token: %w", err)
	}
	return text, nil
}

// text is the configuration as init writes it: what was chosen, and where to read on.
func (c Config) text() string {
	var b strings.Builder
	b.WriteString("# Made by signet-coordinator init. Every key: /usr/share/doc/signet/coordinator.yaml\n")
	for _, kv := range [][2]string{{"trust_domain", c.TrustDomain}, {"data_dir", c.DataDir}, {"key_file", c.KeyFile}} {
		fmt.Fprintf(&b, "%s: %q\n", kv[0], kv[1])
	}
	fmt.Fprintf(&b, "listen:\n  agents: %q\n  api: %q\n", c.Listen.Agents, c.Listen.API)
	fmt.Fprintf(&b, "overlay:\n  ipv4: %q\n  ipv6: %q\n", c.Overlay.IPv4, c.Overlay.IPv6)
	return b.String()
}

func writeFile(path string, mode fs.FileMode, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, werr := f.Write(text)
	if err := errors.Join(werr, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open folder: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync folder %s: %w", path, err)
	}
	return nil
}
