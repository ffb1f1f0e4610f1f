package identity

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// Limits of the SPIFFE-ID standard, section 2.
const (
	MaxIDLength          = 2048 // bytes of the whole URI
	MaxTrustDomainLength = 255  // bytes
	// MaxNameLength bounds a zone, workload or node name. It is our own: the length of a DNS label.
	MaxNameLength = 63
)

const scheme = "spiffe://"

// ErrID is wrapped by every refusal of a SPIFFE ID, trust domain or name.
var ErrID = errors.New("invalid SPIFFE ID")

// TrustDomain is the name of a trust domain. The zero value is none.
type TrustDomain struct{ name string }

// ParseTrustDomain reads a bare name such as "settler.example".
func ParseTrustDomain(s string) (TrustDomain, error) {
	if s == "" {
		return TrustDomain{}, fmt.Errorf("%w: trust domain is empty", ErrID)
	}
	if len(s) > MaxTrustDomainLength {
		return TrustDomain{}, fmt.Errorf("%w: trust domain has %d bytes, at most %d", ErrID, len(s), MaxTrustDomainLength)
	}
	for i := range len(s) {
		if !isTrustDomainByte(s[i]) {
			return TrustDomain{}, fmt.Errorf("%w: trust domain %q has %q; allowed are a-z 0-9 . - _", ErrID, s, s[i])
		}
	}
	return TrustDomain{s}, nil
}

// String is the bare name.
func (td TrustDomain) String() string { return td.name }

// IsZero reports whether td was never set.
func (td TrustDomain) IsZero() bool { return td.name == "" }

// Workload returns the ID spiffe://td/zone/name. Both parts must be names (see ParseName).
func (td TrustDomain) Workload(zone Zone, name string) (ID, error) {
	if td.IsZero() || zone.IsZero() {
		return ID{}, fmt.Errorf("%w: no trust domain or zone", ErrID)
	}
	if err := ParseName(name); err != nil {
		return ID{}, err
	}
	return ID{td: td.name, path: "/" + zone.name + "/" + name}, nil
}

// ParseShort reads the form of policy documents, "zone/workload".
func (td TrustDomain) ParseShort(s string) (ID, error) {
	zone, name, ok := strings.Cut(s, "/")
	if !ok {
		return ID{}, fmt.Errorf("%w: %q is not of the form zone/workload", ErrID, s)
	}
	z, err := ParseZone(zone)
	if err != nil {
		return ID{}, err
	}
	if z == ReservedZone {
		return ID{}, fmt.Errorf("%w: zone %q is reserved for Signet itself", ErrID, z)
	}
	return td.Workload(z, name)
}

// Node returns the ID of a node's agent, spiffe://td/signet/node/name.
func (td TrustDomain) Node(name string) (ID, error) {
	if err := ParseName(name); err != nil {
		return ID{}, err
	}
	return ID{td: td.name, path: nodePrefix + name}, nil
}

// Coordinator returns the ID of the coordinator's serving certificate.
func (td TrustDomain) Coordinator() ID { return ID{td: td.name, path: "/signet/coordinator"} }

// Distribution returns the ID in the certificate of the key that signs snapshots and Bindings.
func (td TrustDomain) Distribution() ID { return ID{td: td.name, path: "/signet/distribution"} }

const nodePrefix = "/signet/node/"

// ID is a SPIFFE ID with a path. It is comparable; the zero value is none.
type ID struct{ td, path string }

// ParseID reads a full URI, spiffe://trust-domain/path. The path is required: a trust domain alone names no workload.
func ParseID(s string) (ID, error) {
	if len(s) > MaxIDLength {
		return ID{}, fmt.Errorf("%w: %d bytes, at most %d", ErrID, len(s), MaxIDLength)
	}
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return ID{}, fmt.Errorf("%w: %q does not start with %s", ErrID, s, scheme)
	}
	slash := strings.IndexByte(rest, '/')
	if slash < 0 {
		return ID{}, fmt.Errorf("%w: %q has no path", ErrID, s)
	}
	td, err := ParseTrustDomain(rest[:slash])
	if err != nil {
		return ID{}, err
	}
	if err := checkPath(rest[slash:]); err != nil {
		return ID{}, err
	}
	return ID{td: td.name, path: rest[slash:]}, nil
}

// String is the URI; the zero ID gives "".
func (id ID) String() string {
	if id.IsZero() {
		return ""
	}
	return scheme + id.td + id.path
}

// IsZero reports whether id was never set.
func (id ID) IsZero() bool { return id == ID{} }

// TrustDomain returns the trust domain.
func (id ID) TrustDomain() TrustDomain { return TrustDomain{id.td} }

// Path starts with a slash.
func (id ID) Path() string { return id.path }

// Short is the path without its first slash: "zone/workload".
func (id ID) Short() string { return strings.TrimPrefix(id.path, "/") }

// Zone is the first path segment. It may not satisfy ParseZone when the ID came from elsewhere; then it is zero.
func (id ID) Zone() Zone {
	first, _, _ := strings.Cut(id.Short(), "/")
	z, err := ParseZone(first)
	if err != nil {
		return Zone{}
	}
	return z
}

// NodeName returns the node that the ID names, or "" when it names none.
func (id ID) NodeName() string {
	name, ok := strings.CutPrefix(id.path, nodePrefix)
	if !ok || ParseName(name) != nil {
		return ""
	}
	return name
}

// URL is the form that crypto/x509 wants.
func (id ID) URL() *url.URL { return &url.URL{Scheme: "spiffe", Host: id.td, Path: id.path} }

// MarshalText writes the URI.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads the URI; empty text gives the zero ID.
func (id *ID) UnmarshalText(b []byte) (err error) {
	if len(b) == 0 {
		*id = ID{}
		return nil
	}
	*id, err = ParseID(string(b))
	return err
}

// Zone is the part of the network that a workload belongs to: the first segment of its ID. Exactly one.
type Zone struct{ name string }

// ReservedZone holds Signet's own identities. No document may declare it.
var ReservedZone = Zone{"signet"}

// ParseZone reads a zone's name: a DNS label in lower case.
func ParseZone(s string) (Zone, error) {
	if err := ParseName(s); err != nil {
		return Zone{}, err
	}
	for i := range len(s) {
		if c := s[i]; !isLowerAlnum(c) && c != '-' {
			return Zone{}, fmt.Errorf("%w: zone %q has %q; allowed are a-z 0-9 -", ErrID, s, c)
		}
	}
	return Zone{s}, nil
}

// String is the zone's name.
func (z Zone) String() string { return z.name }

// IsZero reports whether z was never set.
func (z Zone) IsZero() bool { return z.name == "" }

// ParseName checks the name of a zone, workload or node: 1 to MaxNameLength of a-z A-Z 0-9 . - _, beginning and ending
// with a letter or digit. Such a name needs no escaping in paths, logs, hosts files or shells.
func ParseName(s string) error {
	if s == "" || len(s) > MaxNameLength {
		return fmt.Errorf("%w: name %.70q has %d bytes, expected 1 to %d", ErrID, s, len(s), MaxNameLength)
	}
	for i := range len(s) {
		if !isPathByte(s[i]) {
			return fmt.Errorf("%w: name %q has %q; allowed are a-z A-Z 0-9 . - _", ErrID, s, s[i])
		}
	}
	if !isAlnum(s[0]) || !isAlnum(s[len(s)-1]) {
		return fmt.Errorf("%w: name %q must begin and end with a letter or digit", ErrID, s)
	}
	return nil
}

func checkPath(path string) error {
	for _, seg := range strings.Split(path[1:], "/") {
		switch seg {
		case "":
			return fmt.Errorf("%w: path %q has an empty segment", ErrID, path)
		case ".", "..":
			return fmt.Errorf("%w: path %q has a dot segment", ErrID, path)
		}
		for i := range len(seg) {
			if !isPathByte(seg[i]) {
				return fmt.Errorf("%w: path %q has %q; allowed are a-z A-Z 0-9 . - _", ErrID, path, seg[i])
			}
		}
	}
	return nil
}

func isLowerAlnum(c byte) bool      { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
func isAlnum(c byte) bool           { return isLowerAlnum(c) || c >= 'A' && c <= 'Z' }
func isPathByte(c byte) bool        { return isAlnum(c) || c == '.' || c == '-' || c == '_' }
func isTrustDomainByte(c byte) bool { return isLowerAlnum(c) || c == '.' || c == '-' || c == '_' }
