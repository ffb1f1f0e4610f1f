package flow

import "fmt"

// Verdict is what the judge decided. The zero value denies, so that a verdict nobody set lets nothing through.
type Verdict uint8

// The verdicts; their numbers are those of bpf/lib/reasons.h.
const (
	Deny  Verdict = 0
	Allow Verdict = 1
	Audit Verdict = 2 // allowed, and recorded as what would have been denied
	// Ignore: neither address is Signet's; the packet is none of our business and is never recorded.
	Ignore Verdict = 3
)

var verdictNames = [...]string{Deny: "deny", Allow: "allow", Audit: "audit", Ignore: "ignore"}

// String is the name in records.
func (v Verdict) String() string {
	if int(v) < len(verdictNames) {
		return verdictNames[v]
	}
	return fmt.Sprintf("verdict(%d)", uint8(v))
}

// MarshalText writes the name.
func (v Verdict) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText reads the name.
func (v *Verdict) UnmarshalText(b []byte) error {
	for i, name := range verdictNames {
		if name == string(b) {
			*v = Verdict(i)
			return nil
		}
	}
	return fmt.Errorf("unknown verdict %q", b)
}

// Reason says why. The numbers are shared with the kernel and stay as they are; new ones are added at the end.
type Reason uint8

// The reasons. ReasonNone belongs only to packets that are ignored.
const (
	ReasonNone     Reason = 0
	PolicyAllow    Reason = 1
	PolicyDeny     Reason = 2
	NoRule         Reason = 3
	NoIdentity     Reason = 4
	SpoofedSource  Reason = 5
	UnknownPeer    Reason = 6
	NotTunnel      Reason = 7
	CTFull         Reason = 8
	CTInvalid      Reason = 9
	Expired        Reason = 10
	Revoked        Reason = 11
	Fragment       Reason = 12
	Malformed      Reason = 13
	LeaseEnded     Reason = 14
	SourceBound    Reason = 15
	WrongReceiver  Reason = 16
	UnknownProto   Reason = 17
	InternetDenied Reason = 18
	ListenOverlay  Reason = 19
	numberOfReason        = 20
)

// ReasonInfo is one row of the table.
type ReasonInfo struct {
	Code    Reason
	Name    string // as in records
	Meaning string // one sentence for docs and explain
	Remedy  string // what the operator can do
}

var reasons = [numberOfReason]ReasonInfo{
	ReasonNone:     {ReasonNone, "NONE", "The packet is not Signet's to judge.", ""},
	PolicyAllow:    {PolicyAllow, "POLICY_ALLOW", "A rule allows the flow.", ""},
	PolicyDeny:     {PolicyDeny, "POLICY_DENY", "A deny rule forbids the flow; deny wins over allow.", "change or remove the named deny rule"},
	NoRule:         {NoRule, "NO_RULE", "No rule allows the flow, and the default is deny.", "add a rule that allows it, then run: signet policy apply FILE"},
	NoIdentity:     {NoIdentity, "NO_IDENTITY", "The process has no workload identity.", "check the workload's selectors with: signet workloads"},
	SpoofedSource:  {SpoofedSource, "SPOOFED_SOURCE", "The source address belongs to another identity than the sender's.", "find the process that sends with another workload's address"},
	UnknownPeer:    {UnknownPeer, "UNKNOWN_PEER", "The other address belongs to no identity that this host may talk with.", "check that the workload is placed on an approved node and that a rule names it"},
	NotTunnel:      {NotTunnel, "NOT_TUNNEL", "Overlay traffic arrived or left outside the tunnel.", "look for a host that sends overlay addresses in clear on this network"},
	CTFull:         {CTFull, "CT_FULL", "The connection table is full, and new flows are refused.", "raise the table's size or find the workload that fills it"},
	CTInvalid:      {CTInvalid, "CT_INVALID", "The packet belongs to no tracked connection and does not open one.", "reconnect; connections older than the table's memory must be opened again"},
	Expired:        {Expired, "EXPIRED", "The rule or the peer's Binding has expired.", "renew the rule's expiry, or check why the node does not renew its Binding"},
	Revoked:        {Revoked, "REVOKED", "The workload or its node was revoked.", "if it was a mistake: a workload comes back by taking it out of the policy and placing it anew; a node by a new join token made with --replace"},
	Fragment:       {Fragment, "FRAGMENT", "A later fragment arrived without, or before, the first one that names its ports.", "lower the sender's datagram size below the tunnel's MTU"},
	Malformed:      {Malformed, "MALFORMED", "The packet's headers are not valid.", "capture the packet on the sending host"},
	LeaseEnded:     {LeaseEnded, "LEASE_ENDED", "The host has not heard from a coordinator for the whole lease.", "restore the connection to the coordinator"},
	SourceBound:    {SourceBound, "SOURCE_BOUND", "The socket was bound to a port or address before it connected, so its source cannot be chosen.", "bind the socket to the workload's own overlay address, or do not bind it"},
	WrongReceiver:  {WrongReceiver, "WRONG_RECEIVER", "The listening process is not the workload that owns the destination address.", "bind the listener of the other process to its own address"},
	UnknownProto:   {UnknownProto, "UNKNOWN_PROTO", "The protocol is neither TCP, UDP, SCTP nor ICMP.", "use a protocol that rules can name"},
	InternetDenied: {InternetDenied, "INTERNET_DENIED", "The workload's zone reaches nothing outside the overlay and loopback (internet: deny).", "give the destination an identity and a rule, or take internet: deny from the zone"},
	ListenOverlay:  {ListenOverlay, "LISTEN_OVERLAY", "The workload takes connections only at its overlay addresses and loopback (listen: overlay).", "connect to the workload's overlay address, or take listen: overlay from the workload"},
}

// Reasons returns the whole table, in the order of the codes.
func Reasons() []ReasonInfo { return reasons[:] }

// Info returns the row of r; an unknown code gives a row that says so.
func (r Reason) Info() ReasonInfo {
	if int(r) < len(reasons) {
		return reasons[r]
	}
	return ReasonInfo{Code: r, Name: fmt.Sprintf("REASON_%d", uint8(r)), Meaning: "A newer host gave this reason."}
}

// String is the name in records.
func (r Reason) String() string { return r.Info().Name }

// MarshalText writes the name.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads a name of the table.
func (r *Reason) UnmarshalText(b []byte) error {
	for _, row := range reasons {
		if row.Name == string(b) {
			*r = row.Code
			return nil
		}
	}
	return fmt.Errorf("unknown reason %q", b)
}
