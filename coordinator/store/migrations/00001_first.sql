-- +goose Up
-- Times are nanoseconds since 1970 in UTC, 0 for none. Every revision is that of the transaction which wrote the row.
CREATE TABLE meta (
    one          INTEGER PRIMARY KEY CHECK (one = 1),
    trust_domain TEXT    NOT NULL,
    incarnation  INTEGER NOT NULL,
    overlay4     TEXT    NOT NULL,
    overlay6     TEXT    NOT NULL,
    lease        INTEGER NOT NULL,
    created      INTEGER NOT NULL
) STRICT;

CREATE TABLE revision (
    one   INTEGER PRIMARY KEY CHECK (one = 1),
    value INTEGER NOT NULL
) STRICT;
INSERT INTO revision (one, value) VALUES (1, 0);

CREATE TABLE counters (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL -- what the next one will be
) STRICT, WITHOUT ROWID;
-- Numbers below 256 are reserved for what is no workload; rule 0 means "no rule".
INSERT INTO counters (name, value) VALUES
    ('number', 256), ('rule', 1), ('host6', 256), ('cursor4', 0), ('issuance', 1), ('audit', 1);

CREATE TABLE numbers (
    id     TEXT    PRIMARY KEY,
    number INTEGER NOT NULL UNIQUE CHECK (number >= 256 AND number < 4294967296)
) STRICT, WITHOUT ROWID;

CREATE TABLE rule_numbers (
    rule   TEXT    PRIMARY KEY,
    number INTEGER NOT NULL UNIQUE CHECK (number >= 1 AND number < 4294967296)
) STRICT, WITHOUT ROWID;

CREATE TABLE nodes (
    name      TEXT    PRIMARY KEY,
    id        TEXT    NOT NULL UNIQUE,
    number    INTEGER NOT NULL UNIQUE,
    status    TEXT    NOT NULL CHECK (status IN ('pending', 'active', 'revoked')),
    wg_key    BLOB    NOT NULL UNIQUE CHECK (length(wg_key) = 32),
    spki      BLOB    NOT NULL UNIQUE CHECK (length(spki) = 32),
    prev_spki BLOB    NOT NULL CHECK (length(prev_spki) = 32),
    ipv4      TEXT    NOT NULL UNIQUE,
    ipv6      TEXT    NOT NULL UNIQUE,
    ephemeral INTEGER NOT NULL,
    created   INTEGER NOT NULL,
    bound     INTEGER NOT NULL,
    revision  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX nodes_revision ON nodes (revision);

CREATE TABLE node_keys (
    spki BLOB PRIMARY KEY CHECK (length(spki) = 32),
    node TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE instances (
    workload TEXT    NOT NULL,
    node     TEXT    NOT NULL REFERENCES nodes (name),
    number   INTEGER NOT NULL,
    ipv4     TEXT    NOT NULL,
    ipv6     TEXT    NOT NULL UNIQUE,
    revoked  INTEGER NOT NULL,
    removed  INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    PRIMARY KEY (workload, node)
) STRICT, WITHOUT ROWID;
CREATE INDEX instances_revision ON instances (revision);
CREATE INDEX instances_node ON instances (node);
CREATE UNIQUE INDEX instances_ipv4 ON instances (ipv4) WHERE removed = 0;

CREATE TABLE addresses (
    address    TEXT    PRIMARY KEY,
    owner      TEXT    NOT NULL,
    free_after INTEGER NOT NULL -- 0 while in use
) STRICT, WITHOUT ROWID;

CREATE TABLE applied (
    node            TEXT    PRIMARY KEY,
    policy_revision INTEGER NOT NULL,
    epoch           INTEGER NOT NULL,
    time            INTEGER NOT NULL,
    error           TEXT    NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE join_tokens (
    id          BLOB    PRIMARY KEY CHECK (length(id) = 16),
    secret_hash BLOB    NOT NULL CHECK (length(secret_hash) = 32),
    node        TEXT    NOT NULL,
    max_uses    INTEGER NOT NULL CHECK (max_uses >= 1),
    uses        INTEGER NOT NULL DEFAULT 0 CHECK (uses >= 0 AND uses <= max_uses),
    ephemeral   INTEGER NOT NULL,
    replace_ok  INTEGER NOT NULL,
    revoked     INTEGER NOT NULL,
    created     INTEGER NOT NULL,
    expires     INTEGER NOT NULL,
    made_by     TEXT    NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE join_uses (
    token BLOB    NOT NULL REFERENCES join_tokens (id),
    spki  BLOB    NOT NULL CHECK (length(spki) = 32),
    node  TEXT    NOT NULL,
    time  INTEGER NOT NULL,
    PRIMARY KEY (token, spki)
) STRICT, WITHOUT ROWID;

CREATE TABLE api_tokens (
    id      TEXT    PRIMARY KEY,
    name    TEXT    NOT NULL,
    role    TEXT    NOT NULL,
    hash    BLOB    NOT NULL UNIQUE CHECK (length(hash) = 32),
    created INTEGER NOT NULL,
    expires INTEGER NOT NULL,
    revoked INTEGER NOT NULL,
    made_by TEXT    NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE policies (
    revision   INTEGER PRIMARY KEY,
    applied_at INTEGER NOT NULL,
    applied_by TEXT    NOT NULL,
    comment    TEXT    NOT NULL
) STRICT;

CREATE TABLE policy_files (
    revision INTEGER NOT NULL REFERENCES policies (revision),
    position INTEGER NOT NULL,
    name     TEXT    NOT NULL,
    data     BLOB    NOT NULL,
    PRIMARY KEY (revision, position)
) STRICT, WITHOUT ROWID;

CREATE TABLE revocations (
    kind     TEXT    NOT NULL,
    subject  TEXT    NOT NULL,
    node     TEXT    NOT NULL,
    time     INTEGER NOT NULL,
    made_by  TEXT    NOT NULL,
    revision INTEGER NOT NULL,
    PRIMARY KEY (kind, subject, node)
) STRICT, WITHOUT ROWID;

CREATE TABLE authorities (
    kind      TEXT    NOT NULL,
    serial    TEXT    NOT NULL,
    slot      TEXT    NOT NULL CHECK (slot IN ('next', 'current', 'retired')),
    cert      BLOB    NOT NULL,
    sealed    BLOB    NOT NULL,
    created   INTEGER NOT NULL,
    not_after INTEGER NOT NULL,
    PRIMARY KEY (kind, serial)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX authorities_slot ON authorities (kind, slot) WHERE slot <> 'retired';

CREATE TABLE issuance (
    seq       INTEGER PRIMARY KEY,
    prev      BLOB    NOT NULL,
    hash      BLOB    NOT NULL,
    serial    TEXT    NOT NULL UNIQUE,
    id        TEXT    NOT NULL,
    spki      BLOB    NOT NULL,
    not_after INTEGER NOT NULL,
    time      INTEGER NOT NULL
) STRICT;

CREATE TABLE audit (
    seq     INTEGER PRIMARY KEY,
    prev    BLOB    NOT NULL,
    hash    BLOB    NOT NULL,
    time    INTEGER NOT NULL,
    who     TEXT    NOT NULL,
    what    TEXT    NOT NULL,
    object  TEXT    NOT NULL,
    outcome TEXT    NOT NULL,
    detail  TEXT    NOT NULL
) STRICT;
