package dataplane

import (
	"fmt"
	"net"
	"path/filepath"

	"github.com/signet-overlay/signet/dataplane/enforce"
	"github.com/signet-overlay/signet/internal/flow"
)

// Question asks whether a new flow would pass. At least one end is on this host.
type Question struct {
	Tuple    flow.Tuple // as in enforce.Question: source address and port may be left open
	From, To *Party     // nil for an end on another host
}

// Party is an end of a flow on this host: a process in a cgroup, or, where Device is named, what is behind that.
type Party struct {
	Cgroup string // path below the cgroup root
	UID    uint32 // policy.AnyUID for a user that no workload names
	Device string
}

// Answer is what the judge would do with the flow.
type Answer = enforce.Verdict

// Explain asks a dry-run twin of the judge in force. Nothing is sent, tracked, counted or recorded for it. It takes some
// tenths of a second. Errors are those of enforce.Enforcer.Explain, and that a cgroup or device is not there (any more).
func (d *Dataplane) Explain(q Question) (Answer, error) {
	own := enforce.Question{Tuple: q.Tuple}
	for _, end := range []struct {
		from *Party
		to   **enforce.Party
	}{{q.From, &own.From}, {q.To, &own.To}} {
		if end.from == nil {
			continue
		}
		p, err := d.party(*end.from)
		if err != nil {
			return Answer{}, err
		}
		*end.to = &p
	}
	return d.judge.Explain(own) //nolint:wrapcheck // says what it was asked
}

func (d *Dataplane) party(p Party) (out enforce.Party, err error) {
	if p.Device != "" {
		i, err := net.InterfaceByName(p.Device)
		if err != nil {
			return out, fmt.Errorf("find device %s: %w", p.Device, err)
		}
		out.Interface = uint32(i.Index)
		return out, nil
	}
	out.Socket, err = enforce.SocketIn(filepath.Join(d.cfg.CgroupRoot, p.Cgroup), p.UID)
	return out, err //nolint:wrapcheck // names the cgroup
}
