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
insert into views.checkpoints (view) values ('partners'), ('wallets'), ('postings');

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

-- What a wallet is and whether it may be used. What it holds stands in the last event that changed it: views.postings.
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
) with (fillfactor = 90); -- a wallet that is frozen stays on its page
create index on views.wallets (partner_id, position) where partner_id is not null;
create index on views.wallets (user_id, position) where user_id is not null;
-- A partner is shown with these few among its wallets.
create index on views.wallets (partner_id, position) where kind = 'SETTLEMENT';

-- Which events of the log answer which question: an index of the log, and all that a movement of money writes here. A
-- balance, a statement and a transaction are read from the events themselves, so they cannot say anything else.
-- The terms are listed in projector/src/postings.rs. Nothing is ever updated: vacuum freezes, early, as in ledger.events.
create table views.postings (
    term uuid not null,       -- the question: a wallet, a partner, or the hash of something else that is asked by
    position bigint not null, -- an event that answers it; if the row has several, the last of them
    earlier bigint[],         -- those before it in the same page of the log, in order
    primary key (term, position)
) with (
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 40000, autovacuum_freeze_min_age = 0
);
alter table views.postings
    alter term set statistics 10, alter position set statistics 10, alter earlier set statistics 0;

grant usage on schema views to daybook_projector;
grant select, insert, update, delete on all tables in schema views to daybook_projector;
