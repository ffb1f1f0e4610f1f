package coordinator

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/signet-overlay/signet/coordinator/api"
	"github.com/signet-overlay/signet/coordinator/authority"
	"github.com/signet-overlay/signet/coordinator/publish"
	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/coordinator/session"
	"github.com/signet-overlay/signet/coordinator/store"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
	"github.com/signet-overlay/signet/internal/version"
)

const (
	// maintainEvery is how often signing keys are looked at; they live a year and are renewed with four months left.
	maintainEvery = 24 * time.Hour
	apiStop       = 5 * time.Second // for requests to end in peace
)

// Running is what Serve tells once everything listens.
type Running struct {
	TrustDomain string
	Agents, API net.Addr
	Epoch       uint64
	Nodes       int
}

// parts is an opened coordinator, in the order in which the parts were opened.
type parts struct {
	cfg       Config
	log       *slog.Logger
	store     *store.SQLite
	authority *authority.Authority
	registry  *registry.Registry
	publisher *publish.Publisher
	sessions  *session.Server
}

// Serve runs a coordinator until ctx ends, and returns when nothing of it runs any more. ready is called once, when
// agents and API are answered.
//
// Order of start: store, authority, registry, publisher, both listeners, and only then the loops: whoever connects finds
// everything there. Order of stop: agents and API first, then the publisher, then the store.
func Serve(ctx context.Context, cfg Config, log *slog.Logger, ready func(Running)) (err error) {
	if err := cfg.Check(); err != nil {
		return err
	}
	p, err := open(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.store.Close()) }()
	agents, err := listen("listen.agents", cfg.Listen.Agents)
	if err != nil {
		return err
	}
	web, err := listen("listen.api", cfg.Listen.API)
	if err != nil {
		return errors.Join(err, agents.Close())
	}
	srv, err := p.web()
	if err != nil {
		return errors.Join(err, agents.Close(), web.Close())
	}
	for _, line := range cfg.notServed() {
		log.Warn(line)
	}
	if ready != nil {
		cur := p.publisher.Current()
		ready(Running{TrustDomain: cur.State.TrustDomain.String(), Agents: agents.Addr(), API: web.Addr(), Epoch: cur.Epoch, Nodes: len(cur.Nodes)})
	}
	return p.run(ctx, agents, web, srv)
}

func open(ctx context.Context, cfg Config, log *slog.Logger) (_ *parts, err error) {
	p := &parts{cfg: cfg, log: log}
	if has, err := store.Exists(cfg.DataDir); err != nil || !has {
		return nil, errors.Join(fmt.Errorf("no coordinator in %s: run signet-coordinator init --trust-domain TD --data-dir %s first", cfg.DataDir, cfg.DataDir), err)
	}
	stateKey, err := key.LoadStateKey(cfg.KeyFile)
	if err != nil {
		return nil, err
	}
	if p.store, err = store.OpenSQLite(ctx, cfg.DataDir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.store.Close())
		}
	}()
	var td identity.TrustDomain // zero: the store's own
	if cfg.TrustDomain != "" {
		if td, err = identity.ParseTrustDomain(cfg.TrustDomain); err != nil {
			return nil, err
		}
	}
	if p.authority, err = authority.Open(ctx, p.store, authority.Options{TrustDomain: td, Key: stateKey, NodeLife: cfg.SVID.X509TTL}); err != nil {
		return nil, err
	}
	pool4, pool6, err := cfg.Overlay.prefixes()
	if err != nil {
		return nil, err
	}
	p.registry, err = registry.Open(ctx, p.store, registry.Options{TrustDomain: td, Overlay4: pool4, Overlay6: pool6, Lease: cfg.Lease,
		Parse: parser(p.authority.Bundle().TrustDomain()), Pin: pinOf(p.authority)})
	if err != nil {
		return nil, err
	}
	if p.publisher, err = publish.New(ctx, publish.Config{Source: p.registry, Signer: p.authority, Log: log.With("part", "publish")}); err != nil {
		return nil, err
	}
	p.sessions = session.New(session.Config{Members: members{p.registry, p.authority}, Publisher: p.publisher, Trust: p.authority, Log: log.With("part", "session")})
	return p, nil
}

// listen names the key of the configuration in what goes wrong.
func listen(what, addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return l, nil
}

// web makes the API's server.
func (p *parts) web() (*http.Server, error) {
	var names []string
	var certs []tls.Certificate
	if p.cfg.TLS.Cert != "" {
		c, err := tls.LoadX509KeyPair(p.cfg.TLS.Cert, p.cfg.TLS.Key)
		if err != nil {
			return nil, fmt.Errorf("tls.cert and tls.key: %w", err)
		}
		certs = append(certs, c)
		names = hostNames(c.Leaf)
	}
	srv := api.Server(api.New(api.Deps{
		Mesh: p.registry, Policies: policies{p.registry, p.sessions}, Tokens: api.OverStore(p.store), Audit: api.OverStore(p.store), Sessions: p.sessions,
		HostNames: names, Ready: p.ready, Version: version.Version, Log: p.log.With("part", "api"),
	}))
	if certs != nil {
		srv.TLSConfig = &tls.Config{Certificates: certs, MinVersion: tls.VersionTLS13}
	}
	return srv, nil
}

func hostNames(leaf *x509.Certificate) []string {
	var out []string
	for _, n := range leaf.DNSNames {
		out = append(out, strings.ToLower(n))
	}
	return out
}

// ready says why the coordinator cannot serve: for now, when it could not publish what the store holds.
func (p *parts) ready(context.Context) error {
	if have, want := p.publisher.Current().PolicyRevision, p.registry.State().PolicyRevision; have != want {
		return fmt.Errorf("policy revision %d is not published yet, agents have %d", want, have)
	}
	return nil
}

// run owns every goroutine. The inner context ends when agents and API have gone, so that the last requests are still
// published.
func (p *parts) run(ctx context.Context, agents, web net.Listener, srv *http.Server) error {
	front, stop := context.WithCancel(ctx)
	defer stop()
	back, stopBack := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBack()
	var all, faces errgroup.Group
	guarded := func(fn func() error) func() error {
		return func() error {
			defer stop() // one that ends ends all
			return fn()
		}
	}
	all.Go(guarded(func() error { return p.publisher.Run(back) }))
	all.Go(guarded(func() error { return p.routineMaintain(back) }))
	faces.Go(guarded(func() error { return p.sessions.Serve(front, agents) }))
	faces.Go(guarded(func() error { return serveWeb(srv, web) }))
	faces.Go(func() error {
		<-front.Done()
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), apiStop)
		defer cancel()
		if srv.Shutdown(bounded) != nil {
			return srv.Close() // what is left waits for nothing more
		}
		return nil
	})
	err := faces.Wait()
	stopBack()
	return errors.Join(err, all.Wait())
}

func serveWeb(srv *http.Server, l net.Listener) error {
	var err error
	if srv.TLSConfig != nil {
		err = srv.ServeTLS(l, "", "")
	} else {
		err = srv.Serve(l)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve API on %s: %w", l.Addr(), err)
}

// routineMaintain renews signing keys. A new distribution key means that everything is signed again.
func (p *parts) routineMaintain(ctx context.Context) error {
	t := time.NewTicker(maintainEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		before := string(p.authority.DistributionChain())
		if err := p.authority.Maintain(ctx); err != nil {
			p.log.Error("cannot renew signing keys; it is tried again tomorrow", "err", err)
			continue
		}
		if string(p.authority.DistributionChain()) == before {
			continue
		}
		if _, err := p.registry.Bump(ctx); err != nil {
			p.log.Error("cannot publish under the new signing key", "err", err)
		}
	}
}

// policies adds to the stored reports those that are on their way to the store: whoever waits for a rollout sees a host
// at once.
type policies struct {
	*registry.Registry
	sessions *session.Server
}

// Rollout implements api.Policies.
func (p policies) Rollout(ctx context.Context, revision uint64) ([]registry.NodeRollout, error) {
	rows, err := p.Registry.Rollout(ctx, revision)
	if err != nil {
		return nil, err
	}
	fresh := p.sessions.Reports()
	for i, row := range rows {
		rep, ok := fresh[row.Node]
		if !ok || rep.Epoch < row.Epoch {
			continue
		}
		rows[i].PolicyRevision, rows[i].Epoch, rows[i].Time, rows[i].Error = rep.PolicyRevision, rep.Epoch, rep.Time, rep.Error
		rows[i].Done = rep.PolicyRevision >= revision && rep.Error == ""
	}
	return rows, nil
}
