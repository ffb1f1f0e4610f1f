package netlab

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"sort"
	"strings"
)

// cut is one direction in which a switch drops frames without telling anybody. A cut between two ports leaves addr invalid;
// a cut between a port and an address leaves the other port empty.
type cut struct {
	from, to string
	addr     netip.Addr
}

// rule is the cut in the language of nft.
func (c cut) rule() string {
	family := "ip"
	if c.addr.Is6() {
		family = "ip6"
	}
	switch {
	case !c.addr.IsValid():
		return fmt.Sprintf("iifname %q oifname %q drop", c.from, c.to)
	case c.from != "":
		return fmt.Sprintf("iifname %q %s daddr %s drop", c.from, family, c.addr)
	default:
		return fmt.Sprintf("oifname %q %s saddr %s drop", c.to, family, c.addr)
	}
}

// Partition drops every frame between two hosts, in both directions and on every bridge that they share. It happens in the
// switch, as in a real network: the hosts get no error, only silence.
func (l *Lab) Partition(ctx context.Context, a, b *Host) error {
	return l.change(ctx, hostCuts(l, a, b), true, fmt.Sprintf("partition %s and %s", a.name, b.name))
}

// Heal undoes Partition.
func (l *Lab) Heal(ctx context.Context, a, b *Host) error {
	return l.change(ctx, hostCuts(l, a, b), false, fmt.Sprintf("heal %s and %s", a.name, b.name))
}

// Block drops every IP packet between the host and an underlay address, in both directions, silently. Packets inside a
// tunnel are not looked at.
func (h *Host) Block(ctx context.Context, addr netip.Addr) error {
	return h.lab.change(ctx, addrCuts(h, addr), true, fmt.Sprintf("block %s for host %s", addr, h.name))
}

// Unblock undoes Block.
func (h *Host) Unblock(ctx context.Context, addr netip.Addr) error {
	return h.lab.change(ctx, addrCuts(h, addr), false, fmt.Sprintf("unblock %s for host %s", addr, h.name))
}

func hostCuts(l *Lab, a, b *Host) map[*Bridge][]cut {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[*Bridge][]cut{}
	for _, p := range a.ports {
		for _, q := range b.ports {
			if p.bridge == q.bridge {
				out[p.bridge] = append(out[p.bridge], cut{from: p.onSwch, to: q.onSwch}, cut{from: q.onSwch, to: p.onSwch})
			}
		}
	}
	return out
}

func addrCuts(h *Host, addr netip.Addr) map[*Bridge][]cut {
	h.lab.mu.Lock()
	defer h.lab.mu.Unlock()
	out := map[*Bridge][]cut{}
	for _, p := range h.ports {
		out[p.bridge] = append(out[p.bridge], cut{from: p.onSwch, addr: addr.Unmap()}, cut{to: p.onSwch, addr: addr.Unmap()})
	}
	return out
}

// change adds or removes cuts and loads each switch that is concerned.
func (l *Lab) change(ctx context.Context, cuts map[*Bridge][]cut, add bool, doing string) error {
	if len(cuts) == 0 {
		return fmt.Errorf("%s: no bridge connects them", doing)
	}
	for b, list := range cuts {
		if err := b.load(ctx, list, add); err != nil {
			return fmt.Errorf("%s: %w", doing, err)
		}
	}
	return nil
}

// load replaces the whole ruleset of the switch in one nft transaction, so that no frame sees half a change.
func (b *Bridge) load(ctx context.Context, list []cut, add bool) error {
	b.lab.mu.Lock()
	for _, c := range list {
		if add {
			b.cuts[c] = struct{}{}
		} else {
			delete(b.cuts, c)
		}
	}
	text := ruleset(b.cuts)
	b.lab.mu.Unlock()
	return b.lab.doIn(b.space, func() error {
		cmd := exec.CommandContext(ctx, "nft", "-f", "-")
		cmd.Stdin = strings.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, strings.TrimSpace(string(out)))
		}
		return nil
	})
}

func ruleset(cuts map[cut]struct{}) string {
	rules := make([]string, 0, len(cuts))
	for c := range cuts {
		rules = append(rules, "    "+c.rule())
	}
	sort.Strings(rules)
	return "table bridge netlab\ndelete table bridge netlab\ntable bridge netlab {\n" +
		"  chain forward {\n    type filter hook forward priority 0; policy accept;\n" +
		strings.Join(rules, "\n") + "\n  }\n}\n"
}
