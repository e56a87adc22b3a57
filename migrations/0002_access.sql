-- Who may call: clients, the keys that sign their tokens, and what was withdrawn before its time.
-- Facts of its own, backed up with the log. No secret stands here in clear: secrets are hashed, keys are sealed.

create schema access;

-- One row per API client. A client is a partner's, or the operator's own.
create table access.clients (
    id uuid primary key, -- `cli_…` without its prefix
    partner_id uuid, -- `par_…` without its prefix; null for the operator's clients
    secret_hash bytea not null check (length(secret_hash) = 32), -- SHA-256; the secret is 256 random bits, so nothing slower is needed
    scopes text[] not null, -- names as in API.md
    created_at timestamptz not null default now(),
    disabled_at timestamptz -- from then on it gets no tokens
);

-- The keys that sign access tokens. The newest signs; all verify. Made once, by whichever service comes first.
create table access.signing_keys (
    kid uuid primary key, -- a token's header names its key by this
    public_key bytea not null check (length(public_key) = 32), -- Ed25519
    sealed_private_key bytea not null, -- PKCS#8, sealed for `access.signing_keys/<kid>`
    created_at timestamptz not null default now()
);

-- One row per refresh token ever given out, until it expires. A family is what came from one login.
create table access.refresh_tokens (
    token_hash bytea primary key check (length(token_hash) = 32), -- SHA-256; 256 random bits again
    family uuid not null,
    client_id uuid not null references access.clients (id),
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    used_at timestamptz -- a token is good once; seen again, somebody has copied it and the family ends
);
create index refresh_tokens_expires_at on access.refresh_tokens (expires_at); -- for clearing up
create index refresh_tokens_client_id on access.refresh_tokens (client_id); -- removing a client looks for its tokens

-- Families that ended early. Every service reads the new rows about once a second.
create table access.revocations (
    family uuid primary key,
    revoked_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null -- when the family's last token would have expired anyway, and the row may go
);
create index revocations_revoked_at on access.revocations (revoked_at);
create index revocations_expires_at on access.revocations (expires_at);

grant usage on schema access to daybook_access;
grant select, insert, update, delete on all tables in schema access to daybook_access;
