-- The read side: what the log says, in the shapes that are asked for. All of it can be lost and rebuilt: every
-- view is a function of the log alone, and knows up to which position it has been folded.
-- Written by projector's task, read by its queries. Ids are the uuids behind the prefixes of the log.

create schema views;

-- Up to where each view has been folded. Moves in the transaction that writes the view.
create table views.checkpoints (
    view text primary key,
    position bigint not null default 0,     -- the last event that is in
    commit_number bigint not null default 0 -- its commit: views move by whole commits
);
insert into views.checkpoints (view) values ('partners'), ('wallets'), ('balances'), ('entries'), ('transactions');

-- Partners, and whether they may act.
create table views.partners (
    id uuid primary key,
    position bigint not null unique, -- of its registration: the order of lists
    name text not null,
    currencies text[] not null,
    client_id uuid not null,         -- its client
    status text not null default 'ACTIVE', -- or SUSPENDED
    created_at timestamptz not null
);

-- What a wallet is and whether it may be used. Its money is in views.balances.
create table views.wallets (
    id uuid primary key,
    position bigint not null unique, -- of its opening: the order of lists
    partner_id uuid,                 -- null on system wallets
    user_id text,                    -- null on system and partner wallets
    kind text not null,              -- CUSTOMER, SETTLEMENT, ADJUSTMENTS, BANK
    currency text not null,
    status text not null,            -- ACTIVE, FROZEN, CLOSED
    metadata json not null,
    created_at timestamptz not null
);
create index on views.wallets (partner_id, position) where partner_id is not null;
create index on views.wallets (user_id, position) where user_id is not null;
-- A partner is shown with these few among its wallets.
create index on views.wallets (partner_id, position) where kind = 'SETTLEMENT';

-- What each wallet holds now. Small rows with room beside them: this is where the same row is written again and again.
create table views.balances (
    wallet_id uuid primary key,
    version bigint not null,  -- counts everything that changes the wallet, its life included
    balance numeric not null
) with (fillfactor = 70);

-- Statements: one row per entry. The dearest table of all, so it has the fewest bytes and no index but its key.
create table views.entries (
    wallet_id uuid not null,
    wallet_version bigint not null,   -- the order of a statement
    position bigint not null,
    transaction_id uuid not null,
    kind text not null,               -- of the transaction
    change numeric not null,          -- above zero a credit, below a debit
    balance_after numeric not null,
    effective_at timestamptz not null, -- when it counts in business: as instructed, or when it was recorded
    recorded_at timestamptz not null,
    description text,
    primary key (wallet_id, wallet_version)
);

-- Transactions with their bodies as API.md shows them, refused ones included.
create table views.transactions (
    id uuid primary key,
    position bigint not null unique, -- of its first event: the order of lists
    partner_id uuid,
    wallet_id uuid not null,         -- the wallet that it is about
    to_wallet_id uuid,               -- the receiving wallet of a transfer
    user_id text,
    kind text not null,
    status text not null,
    reference text,
    key_hash bytea,                  -- of the idempotency key it was asked for with
    created_at timestamptz not null,
    body json not null
) with (fillfactor = 90);
create index on views.transactions (partner_id, position) where partner_id is not null;
create index on views.transactions (wallet_id, position);
create index on views.transactions (to_wallet_id, position) where to_wallet_id is not null;
create index on views.transactions (user_id, position) where user_id is not null;
create index on views.transactions (reference, position) where reference is not null;
create index on views.transactions (key_hash) where key_hash is not null;

grant usage on schema views to daybook_projector;
grant select, insert, update, delete on all tables in schema views to daybook_projector;
