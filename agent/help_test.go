package agent

import (
	"net/netip"
	"testing"
	"time"

	"github.com/signet-overlay/signet/agent/session/sessiontest"
	"github.com/signet-overlay/signet/agent/state"
	"github.com/signet-overlay/signet/internal/identity"
)

func addrPort(last byte) netip.AddrPort { return netip.AddrPortFrom(sessiontest.Addrs(last)[0], 5432) }

// forge is a saved snapshot that another coordinator has signed.
func forge(t *testing.T) []byte {
	t.Helper()
	return sessiontest.NewPKI(t).Saved(t, sessiontest.Sample(t, 2, time.Now()))
}

// endedIdentity gives the host a certificate that ended two days ago.
func endedIdentity(t *testing.T, r *rig) func(*state.Identity) bool {
	t.Helper()
	return func(id *state.Identity) bool {
		chain, err := identity.ParseChain(r.coord.PKI.Issue(t, id.ID(), &id.Key.PublicKey, time.Now().Add(-49*time.Hour), time.Now().Add(-48*time.Hour)))
		if err != nil {
			t.Error(err)
			return false
		}
		id.Chain = chain
		return true
	}
}
