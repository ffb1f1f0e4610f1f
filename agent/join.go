package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"

	"github.com/signet-overlay/signet/agent/localapi"
	"github.com/signet-overlay/signet/agent/session"
	"github.com/signet-overlay/signet/agent/state"
	"github.com/signet-overlay/signet/internal/identity"
)

const maxTokenFile = 4 << 10 // a longer one holds something else

// join returns when this host has an identity: from its state, with the token of the configuration, or by signet up.
func (a *Agent) join(ctx context.Context) error {
	if a.id.Load() != nil {
		return nil
	}
	a.sayReady() // what is missing is for people or the coordinator to give
	if a.cfg.JoinTokenFile != "" {
		token, err := a.tokenFromFile()
		if err != nil {
			return err
		}
		return a.enrol(ctx, session.Application{Coordinators: a.cfg.Coordinator, Token: token, Node: a.cfg.Node})
	}
	a.log.Info("this host has no identity: waiting for signet up, or set join_token_file and start again")
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-a.enrolled:
		return nil
	}
}

func (a *Agent) tokenFromFile() (identity.JoinToken, error) {
	path := a.cfg.JoinTokenFile
	f, err := os.Open(path)
	if err != nil {
		return identity.JoinToken{}, fmt.Errorf("join_token_file: %w: write a token there, made with: signet node token create", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return identity.JoinToken{}, fmt.Errorf("join_token_file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return identity.JoinToken{}, fmt.Errorf("join_token_file: %s is not a file", path)
	}
	// Whoever reads it can join in this host's place, perhaps has already: nothing is sent, so that somebody looks.
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return identity.JoinToken{}, fmt.Errorf("join_token_file %s has mode %04o, so others on this host can read the token: make a new token, then run: chmod 600 %s", path, mode, path)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxTokenFile))
	if err != nil {
		return identity.JoinToken{}, fmt.Errorf("read join_token_file: %w", err)
	}
	token, err := identity.ParseJoinToken(string(text))
	if err != nil {
		return identity.JoinToken{}, fmt.Errorf("join_token_file %s: %w", path, err)
	}
	return token, nil
}

// errJoining: two enrolments at once would make two keys.
var errJoining = errors.New("an enrolment is under way already")

// enrol asks the coordinator, with keys that are on disk before it is asked.
func (a *Agent) enrol(ctx context.Context, app session.Application) error {
	if !a.joining.TryLock() {
		return errJoining
	}
	defer a.joining.Unlock()
	if a.id.Load() != nil {
		return nil
	}
	draft, err := a.draft(app)
	if err != nil {
		return err
	}
	app.Key, app.WireGuard = draft.Key, draft.WireGuard.Public()
	adm, err := session.Enrol(ctx, app, a.log)
	if err != nil {
		return err //nolint:wrapcheck // one plain sentence already
	}
	draft.Chain, draft.Bundle = adm.Chain, adm.Bundle
	if err := a.dir.SaveIdentity(draft); err != nil {
		return fmt.Errorf("enrolled, but: %w", err)
	}
	a.mu.Lock()
	a.pending = adm.Pending
	a.mu.Unlock()
	a.log.Info("enrolled", "node", draft.ID().String(), "pending", adm.Pending)
	a.admit(draft)
	return nil
}

// draft returns the keys to enrol with: those of an attempt that got no answer, if it was for the same mesh and name.
func (a *Agent) draft(app session.Application) (state.Identity, error) {
	draft, err := a.dir.LoadIdentity()
	switch {
	case errors.Is(err, state.ErrNone):
	case err != nil:
		return draft, err //nolint:wrapcheck // names the file
	case draft.TrustDomain == app.Token.TrustDomain && draft.Node == app.Node && slices.Equal(draft.Coordinators, app.Coordinators):
		return draft, nil
	}
	fresh, err := state.NewDraft(app.Token.TrustDomain, app.Node, app.Coordinators)
	if err != nil {
		return draft, err //nolint:wrapcheck // names what was made
	}
	if draft.Key != nil && draft.TrustDomain == fresh.TrustDomain && draft.Node == fresh.Node {
		fresh.Key, fresh.WireGuard = draft.Key, draft.WireGuard // only the coordinators differ
	}
	return fresh, a.dir.SaveIdentity(fresh)
}

// admit makes an identity the one in use.
func (a *Agent) admit(id state.Identity) {
	if a.id.CompareAndSwap(nil, &id) {
		close(a.enrolled)
	}
}

// configured are the endpoints of the configuration.
func (a *Agent) configured() ([]netip.AddrPort, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg.endpoints()
}

// reload takes over what can change while running.
func (a *Agent) reload(next Config) error {
	if _, err := next.endpoints(); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	was := a.cfg
	a.cfg.Endpoints = next.Endpoints
	was.Endpoints = next.Endpoints
	if fmt.Sprintf("%+v", was) != fmt.Sprintf("%+v", next) {
		a.log.Warn("only the key endpoints changes while the agent runs; for the others run: systemctl restart signetd")
	}
	return nil
}

// Up enrols this host, or takes back a down.
func (a *Agent) Up(ctx context.Context, r localapi.UpRequest) (localapi.UpReply, error) {
	enrolled := false
	if a.id.Load() == nil {
		if err := a.upEnrol(ctx, r); err != nil {
			return localapi.UpReply{}, err
		}
		enrolled = true
	} else if r.Node != "" && r.Node != a.identity().Node {
		return localapi.UpReply{}, &localapi.Error{Code: localapi.CodeInvalid, Message: fmt.Sprintf("this host is enrolled already, as node %q", a.identity().Node),
			Hint: "to give it another name, stop the agent, remove " + a.cfg.StateDir + " and enrol it anew"}
	}
	if err := a.setSwitch(ctx, state.Up); err != nil {
		return localapi.UpReply{}, err
	}
	id := a.identity()
	return localapi.UpReply{Node: localapi.Node{Name: id.Node, ID: id.ID()}, State: a.Status().State, Enrolled: enrolled}, nil
}

func (a *Agent) upEnrol(ctx context.Context, r localapi.UpRequest) error {
	if r.Token == "" {
		return &localapi.Error{Code: localapi.CodeInvalid, Message: "this host has no identity, and no join token was given",
			Hint: "make one with: signet node token create, then run: signet up --coordinator ADDR --join-file FILE"}
	}
	token, err := identity.ParseJoinToken(r.Token)
	if err != nil {
		return &localapi.Error{Code: localapi.CodeInvalid, Message: err.Error()}
	}
	app := session.Application{Coordinators: a.cfg.Coordinator, Token: token, Node: a.cfg.Node}
	if len(r.Coordinators) > 0 {
		app.Coordinators = r.Coordinators
	}
	for _, addr := range app.Coordinators {
		if err := checkAddress(addr); err != nil {
			return &localapi.Error{Code: localapi.CodeInvalid, Message: "coordinator " + err.Error()}
		}
	}
	if r.Node != "" {
		app.Node = r.Node
	}
	err = a.enrol(ctx, app)
	switch {
	case err == nil:
		return nil
	case session.Permanent(err):
		return &localapi.Error{Code: localapi.CodeRefused, Message: err.Error(), Hint: "make a new token with: signet node token create"}
	case ctx.Err() != nil:
		return &localapi.Error{Code: localapi.CodeNoAnswer, Message: err.Error(), Hint: "check the coordinator's address; the same command may be repeated with the same token"}
	}
	return &localapi.Error{Code: localapi.CodeInternal, Message: err.Error()}
}
