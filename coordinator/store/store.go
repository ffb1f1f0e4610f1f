package store

import (
	"context"
	"errors"
	"time"
)

// What callers must tell apart.
var (
	ErrNotFound    = errors.New("not found")
	ErrClosed      = errors.New("the store is closed")
	ErrCorrupt     = errors.New("the database is damaged")
	ErrNewerSchema = errors.New("the database was written by a newer version of Signet")
	ErrLocked      = errors.New("another process has the database open")
	ErrReadOnly    = errors.New("a view cannot write")
	ErrDuplicate   = errors.New("stands there already")
)

// Store is durable state with serialised writers. An Update that returned without an error survives kill -9 and a loss
// of power.
type Store interface {
	// Update runs fn in a transaction of its own and returns that transaction's revision: one more than the one
	// before. When fn or the commit fails, nothing of it stays and no revision is used. fn must not call Update. It
	// may run together with others under one disk write, never at the same time as another.
	Update(ctx context.Context, fn func(Tx) error) (revision uint64, err error)
	// View runs fn over a consistent state. It waits for no writer.
	View(ctx context.Context, fn func(Tx) error) error
	// Revision is the last one that is durable.
	Revision() uint64
	Close() error
}

// Tx is one transaction, valid until the function that got it returns, for one goroutine. Reading methods return
// ErrNotFound where they say so. Slices and structs that it returns belong to the caller.
type Tx interface {
	Base
	Hosts
	Access
	Documents
	Trust
}

// Base is the ground of every table.
type Base interface {
	// Revision is that of the state read, or, inside Update, the one that the transaction will have.
	Revision() uint64
	MetaTable
	NumberTable
	LogTable
}

// Hosts is what is enrolled and where it is.
type Hosts interface {
	NodeTable
	NodeKeyTable
	InstanceTable
	AddressTable
	AppliedTable
}

// Access is who may join and who may administer.
type Access interface {
	JoinTokenTable
	APITokenTable
}

// Documents is what was decided.
type Documents interface {
	PolicyTable
	RevocationTable
}

// Trust is what certificates are made with, and which were made.
type Trust interface {
	AuthorityTable
	IssuanceTable
}

// Meta describes the whole store.
type Meta struct {
	TrustDomain string
	Incarnation uint32 // grows when the store is restored from a backup
	Overlay4    string // CIDR
	Overlay6    string // CIDR
	Lease       time.Duration
	Created     time.Time
}

// MetaTable holds one row.
type MetaTable interface {
	Meta() (Meta, error) // ErrNotFound before the first SetMeta
	SetMeta(Meta) error
}

// NumberTable gives names their numbers, once and for good. A number that was committed is never given to another name.
type NumberTable interface {
	NumberFor(id string) (uint32, error) // from 256; the one that id has, or the next
	RuleNumberFor(rule string) (uint32, error)
	// Numbers and RuleNumbers return those above a number, so that a reader can follow.
	Numbers(above uint32) (map[string]uint32, error)
	RuleNumbers(above uint32) (map[string]uint32, error)
	CounterTable
}

// Counter names a sequence that only grows.
type Counter string

// The counters. Numbers and IPv6 host parts are never used again; the IPv4 cursor wraps in the registry.
const (
	CounterNumber   Counter = "number"
	CounterRule     Counter = "rule"
	CounterHost6    Counter = "host6"
	CounterCursor4  Counter = "cursor4"
	CounterIssuance Counter = "issuance"
	CounterAudit    Counter = "audit"
)

// CounterTable holds the counters.
type CounterTable interface {
	Next(Counter) (uint64, error)                           // takes the next value
	Advance(c Counter, next uint64) (now uint64, err error) // makes the next value at least next
	SetCursor(next uint64) error                            // sets CounterCursor4, which alone may go back
	Peek(Counter) (uint64, error)                           // what Next would give
}

// Node is one row of nodes. Times are UTC; the zero time is none.
type Node struct {
	Name      string
	ID        string
	Number    uint32
	Status    string
	Key       []byte // WireGuard public key
	SPKI      [32]byte
	PrevSPKI  [32]byte // still good until the node renews with SPKI; zero when none
	IPv4      string
	IPv6      string
	Ephemeral bool
	Created   time.Time
	Bound     uint64 // revision of the last change that other nodes see; kept by the registry
	Revision  uint64 // of the last change to the row; set by PutNode
}

// NodeTable holds nodes by name. They are never deleted: a revoked one stays as a tombstone.
type NodeTable interface {
	PutNode(Node) error
	Node(name string) (Node, error) // ErrNotFound
	Nodes(since uint64) ([]Node, error)
	NodeByWireGuard(key []byte) (Node, error) // ErrNotFound
}

// NodeKeyTable remembers every key that any node ever had.
type NodeKeyTable interface {
	PutNodeKey(spki [32]byte, node string) error // ErrDuplicate when another node had it
	NodeKey(spki [32]byte) (node string, err error)
}

// Instance is one row of instances: a workload on a node. A removed one stays until its quarantine ends, so that
// readers who follow by revision see the removal.
type Instance struct {
	Workload string
	Number   uint32
	Node     string
	IPv4     string
	IPv6     string
	Revoked  bool
	Removed  time.Time // zero while it stands
	Revision uint64    // set by PutInstance
}

// InstanceTable holds instances by workload and node.
type InstanceTable interface {
	PutInstance(Instance) error
	// Instances returns those that changed after a revision, removed ones included; 0 gives all.
	Instances(since uint64) ([]Instance, error)
	InstancesOn(node string) ([]Instance, error)
	PruneInstances(removedBefore time.Time) error
}

// Address is one overlay IPv4 address that is in use or in quarantine.
type Address struct {
	Address   string
	Owner     string
	FreeAfter time.Time // zero while in use
}

// AddressTable makes it impossible to give an address twice.
type AddressTable interface {
	// TakeAddress reports false when the address is in use, or in quarantine at now.
	TakeAddress(addr, owner string, now time.Time) (taken bool, err error)
	// ReclaimAddress gives a released address back to the owner that had it, in quarantine or not. It reports false
	// when it is in use or another owner had it since.
	ReclaimAddress(addr, owner string) (taken bool, err error)
	ReleaseAddress(addr string, freeAfter time.Time) error
	Addresses() ([]Address, error)
}

// Applied is the last report of a node.
type Applied struct {
	Node           string
	PolicyRevision uint64
	Epoch          uint64
	Time           time.Time
	Error          string
}

// AppliedTable holds one row for each node.
type AppliedTable interface {
	PutApplied(Applied) error
	Applied() ([]Applied, error)
}

// JoinToken is one row of join tokens. The secret itself is nowhere.
type JoinToken struct {
	ID         [16]byte
	SecretHash [32]byte
	Node       string // name or glob; empty: any name, pending until approved
	MaxUses    uint32
	Uses       uint32 // written by ConsumeJoinToken alone
	Ephemeral  bool
	Replace    bool
	Revoked    bool
	Created    time.Time
	Expires    time.Time
	By         string
}

// JoinTokenTable holds join tokens and who used them.
type JoinTokenTable interface {
	PutJoinToken(JoinToken) error // never changes Uses of one that stands there
	JoinToken(id [16]byte) (JoinToken, error)
	JoinTokens() ([]JoinToken, error)
	// ConsumeJoinToken takes one use for a key. It reports false, and changes nothing, when no use is left at now.
	ConsumeJoinToken(id [16]byte, spki [32]byte, node string, now time.Time) (consumed bool, err error)
	JoinUse(id [16]byte, spki [32]byte) (node string, err error) // ErrNotFound
}

// APIToken is one row of API tokens.
type APIToken struct {
	ID      string
	Name    string
	Role    string
	Hash    [32]byte // SHA-256 of the secret
	Created time.Time
	Expires time.Time // zero: never
	Revoked time.Time // zero: not
	By      string
}

// APITokenTable holds the tokens of people and programs.
type APITokenTable interface {
	PutAPIToken(APIToken) error
	APITokenByHash(hash [32]byte) (APIToken, error)
	APITokens() ([]APIToken, error)
	RevokeAPIToken(id string, at time.Time) error // ErrNotFound; revoking twice keeps the first time
}

// SourceFile is one file of a policy as it was applied.
type SourceFile struct {
	Name string
	Data []byte
}

// Policy is one applied document. Policies returns it without Files.
type Policy struct {
	Revision  uint64 // 1, 2, 3 …
	Files     []SourceFile
	AppliedAt time.Time
	By        string
	Comment   string
}

// PolicyTable holds every document that was ever applied.
type PolicyTable interface {
	AddPolicy(Policy) (revision uint64, err error) // gives the revision
	Policy(revision uint64) (Policy, error)
	Policies() ([]Policy, error) // newest first
	PolicyRevision() (uint64, error)
}

// Revocation is a tombstone: a decision taken back. Node is empty where it holds for every node.
type Revocation struct {
	Kind     string // "node" or "workload"
	Subject  string // node name or SPIFFE ID
	Node     string
	Time     time.Time
	By       string
	Revision uint64 // set by PutRevocation
}

// RevocationTable holds them by kind, subject and node.
type RevocationTable interface {
	PutRevocation(Revocation) error
	DeleteRevocation(kind, subject, node string) error
	Revocations() ([]Revocation, error)
}

// Authority is a signing key, sealed, with its certificate.
type Authority struct {
	Kind     string // root, issuing, distribution
	Slot     string // next, current, retired
	Serial   string // hex; names it among retired ones
	Cert     []byte // DER
	Sealed   []byte // private key, sealed with the state key
	Created  time.Time
	NotAfter time.Time
}

// AuthorityTable holds them by kind and serial.
type AuthorityTable interface {
	PutAuthority(Authority) error
	Authorities() ([]Authority, error)
}

// Issuance is one line of the issuance log. Seq, Prev and Hash are set by AppendIssuance.
type Issuance struct {
	Seq      uint64
	Prev     [32]byte
	Hash     [32]byte
	Serial   string
	ID       string
	SPKI     [32]byte
	NotAfter time.Time
	Time     time.Time
}

// IssuanceTable is append-only.
type IssuanceTable interface {
	AppendIssuance(Issuance) (Issuance, error)
	Issuances(after uint64, limit int) ([]Issuance, error)
}

// Audit is one line of the audit log. Seq, Prev and Hash are set by AppendAudit.
type Audit struct {
	Seq     uint64
	Prev    [32]byte
	Hash    [32]byte
	Time    time.Time
	Who     string
	What    string
	Object  string
	Outcome string
	Detail  string
}

// LogTable is the audit log; it is append-only.
type LogTable interface {
	AppendAudit(Audit) (Audit, error)
	Audits(after uint64, limit int) ([]Audit, error)
}
