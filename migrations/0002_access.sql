-- Who may call: clients, the keys that sign their tokens, what was withdrawn before its time, and who did what.
-- Facts of its own, backed up with the log. No secret stands here in clear: secrets are hashed, keys are sealed.
-- What the log says about partners (registered, suspended, a secret rotated) is followed here: the log is the truth of it.

create schema access;

-- One row per API client. A client is a partner's, or the operator's own.
create table access.clients (
    id uuid primary key, -- `cli_…` without its prefix
    partner_id uuid, -- `par_…` without its prefix; null for the operator's clients
    secret_hash bytea check (length(secret_hash) = 32), -- SHA-256; the secret is 256 random bits, so nothing slower is needed. Null: nobody knows it, rotate it
    secret_position bigint not null default 0, -- of the event that the secret comes from; 0 for clients that no event made
    scopes text[] not null, -- names as in API.md
    suspended boolean not null default false, -- it gets no tokens
    generation bigint not null default 0, -- tokens of an earlier one are revoked: it only grows, to the position of the event that ended them, or by one
    revoked_at timestamptz, -- when the generation last changed; every service reads the new ones about once a second
    created_at timestamptz not null default now()
);
create index clients_partner_id on access.clients (partner_id) where partner_id is not null;
create index clients_revoked_at on access.clients (revoked_at) where revoked_at is not null;

-- Up to which partner's event of the log the clients are as the log says. One row.
create table access.followed (
    position bigint not null
);
insert into access.followed (position) values (0);

-- The keys that sign access tokens. The newest whose time has come signs; all that are not retired verify.
create table access.signing_keys (
    kid uuid primary key, -- a token's header names its key by this
    public_key bytea not null check (length(public_key) = 32), -- Ed25519
    sealed_private_key bytea, -- PKCS#8, sealed for `access.signing_keys/<kid>`; gone once it is retired
    created_at timestamptz not null default now(),
    signs_from timestamptz not null, -- a little after it is published, so that every service knows it before its first token
    replace_at timestamptz not null, -- when the next one is to be made: by schedule, or because the operator has said so
    retired_at timestamptz -- its last token has expired, or the operator trusts it no longer. The row stays, to tell its tokens from forgeries
);

-- One row per refresh token ever given out, until it expires. A family is what came from one login.
create table access.refresh_tokens (
    token_hash bytea primary key check (length(token_hash) = 32), -- SHA-256; 256 random bits again
    family uuid not null,
    client_id uuid not null references access.clients (id),
    generation bigint not null, -- of the client when the family began
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

-- How many requests a partner may send; every service reads them about once a second. No row: as many as it likes.
create table access.rate_limits (
    partner_id uuid unique nulls not distinct, -- null: every partner that has no row of its own
    requests integer check (0 < requests), -- null: no limit
    seconds integer not null check (0 < seconds) -- in so much time
);

-- Acts and incidents that are no events of the log. Rows are added and read; the role has no right to anything else.
create table access.audit (
    number bigint generated always as identity primary key,
    at timestamptz not null default clock_timestamp(),
    act text not null, -- `login`, `logins-failing`, `refresh-token-copied`, `logout`, `client-set`, `key-made`, `key-retired`, `rate-limit`, `redeliver`, …
    client_id uuid, -- who did it, or who it happened to
    peer text, -- the address it came from
    request_id text,
    detail json not null -- flat, texts only
);

grant usage on schema access to daybook_access;
grant select, insert, update, delete on all tables in schema access to daybook_access;
revoke update, delete on access.audit from daybook_access;
