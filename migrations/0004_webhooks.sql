-- The way out: where partners want to be told, what they are told, and how telling them went.
-- Facts of their own, not a view: backed up with the log. Written by webhook-dispatcher alone.

create schema webhooks;

-- How far the log has been turned into deliveries. Moves in the transaction that makes them, and is what
-- registrations wait for, so that an endpoint misses nothing after its start and gets nothing before it.
create table webhooks.checkpoint (
    the_only_one boolean primary key default true check (the_only_one),
    commit_number bigint not null,
    position bigint not null
);
insert into webhooks.checkpoint (commit_number, position) values (0, 0);

-- One row per registered endpoint. A deleted one stays until its deliveries have been cleared away.
create table webhooks.endpoints (
    id uuid primary key,
    partner_id uuid not null,
    url text not null,                       -- as the partner wrote it; what it may be is checked again before each attempt
    events text[] not null,                  -- `transaction.completed`, …, or `*`
    sealed_secret bytea not null,            -- AES-256-GCM; the id is bound in, so a sealed secret moved to another row does not open
    status text not null default 'ACTIVE' check (status in ('ACTIVE', 'DISABLED')),
    disabled_reason text check (disabled_reason in ('requested', 'gone')),
    after_commit bigint not null,            -- it is told about later commits only: the head when it was registered or enabled
    next_sequence bigint not null default 1, -- of its next delivery; gap-free, since it moves with the delivery's row
    paused_until timestamptz,                -- asked for with 429 and Retry-After
    created_at timestamptz not null default now(),
    deleted_at timestamptz,
    constraint endpoints_disabled check ((status = 'DISABLED') = (disabled_reason is not null))
);
create index endpoints_partner on webhooks.endpoints (partner_id, id) where deleted_at is null;
create index endpoints_deleted on webhooks.endpoints (deleted_at) where deleted_at is not null;

-- One row per event and endpoint.
create table webhooks.deliveries (
    id uuid primary key,
    endpoint_id uuid not null references webhooks.endpoints (id),
    event_id uuid not null,                  -- follows from the event's leaf and type: the same after any rebuild
    event_type text not null,
    sequence bigint not null,
    ledger_position bigint not null,
    body text not null,                      -- fixed when made: each attempt sends exactly these bytes
    traceparent text,                        -- of the request that led to it, if it had one; sent along
    status text not null default 'PENDING' check (status in ('PENDING', 'RETRYING', 'DELIVERED', 'DEAD', 'HELD')),
    attempts integer not null default 0,     -- made so far; the number of the latest
    schedule_from integer not null default 0, -- `attempts` when the schedule began: redelivery starts it afresh
    in_flight boolean not null default false, -- the latest attempt has no recorded outcome
    possible_duplicate boolean not null default false, -- an earlier attempt may have arrived without our learning of it
    next_due timestamptz default now(),      -- null: nothing is due. While in flight, the end of the lease
    created_at timestamptz not null default now(),
    ended_at timestamptz,                    -- when it was delivered, given up or held; decides how long it is kept
    constraint deliveries_event unique (endpoint_id, event_id),
    constraint deliveries_sequence unique (endpoint_id, sequence),
    constraint deliveries_due_while_open check ((next_due is not null) = (status in ('PENDING', 'RETRYING'))),
    constraint deliveries_ended check ((ended_at is null) = (status in ('PENDING', 'RETRYING')))
);
-- Claiming walks from endpoint to endpoint and takes a few of each: a backlog of one is not in the way of another.
create index deliveries_due on webhooks.deliveries (endpoint_id, next_due, sequence) where next_due is not null;
-- Lists of one status: what is rare, such as dead letters, is found among many delivered.
create index deliveries_status on webhooks.deliveries (endpoint_id, status, sequence);
create index deliveries_ended on webhooks.deliveries (status, ended_at) where ended_at is not null;

-- One row per attempt, written before anything is sent.
create table webhooks.attempts (
    delivery_id uuid not null references webhooks.deliveries (id) on delete cascade,
    number integer not null check (0 < number),
    started_at timestamptz not null default now(),
    outcome text,                            -- null while it is under way; the words are in webhook-dispatcher/src/send.rs
    status_code smallint,                    -- if there was an answer
    latency_ms integer,
    response_body bytea,                     -- the first 16 KiB of the answer, never decompressed
    response_truncated boolean,
    detail text,                             -- what went wrong, for the partner to read
    primary key (delivery_id, number)
);

grant usage on schema webhooks to daybook_webhooks;
grant select, insert, update, delete on all tables in schema webhooks to daybook_webhooks;
