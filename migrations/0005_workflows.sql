-- What workflows must remember between the ledger and the outside: facts of their own, backed up with the log.
-- Written by the crate `workflows` alone. Calls are written down here before they are made, so that a process
-- that dies in the middle leaves a question behind and never a silent payment.

create schema workflows;

-- How far the log has been followed, for all workflows together; moves in the transaction of the rows that follow
-- from it.
create table workflows.checkpoint (
    commit_number bigint not null,
    position bigint not null, -- the last position of that commit
    the_only_one boolean primary key default true check (the_only_one)
);
insert into workflows.checkpoint (commit_number, position) values (0, 0);

-- One row per requested top-up, from its TransactionRequested until the ledger has ended it, and kept.
create table workflows.top_ups (
    transaction_id uuid primary key,
    wallet_id uuid not null,                   -- where the money goes
    requested_position bigint not null unique, -- of its TransactionRequested; the keys of its commands come from it
    token text collate "C" not null unique,    -- names the payment at the bank
    amount numeric not null check (0 < amount),
    currency text not null,
    return_url text,                           -- where the bank sends the payer afterwards
    traceparent text,                          -- of the request that began it; sent on with its commands
    -- REQUESTED: the bank does not have it. UNSURE: the bank was asked to take it and may have. WAITING: the bank
    -- has it and the payer has not decided. DECIDED: the bank's word is known, the ledger does not know it yet.
    -- BLOCKED: the ledger refused to book the word for now. ENDED: the ledger has ended it.
    state text not null check (state in ('REQUESTED', 'UNSURE', 'WAITING', 'DECIDED', 'BLOCKED', 'ENDED')),
    due_at timestamptz,                        -- when the next step may begin; a step under way holds the row until then
    expire_at timestamptz not null,            -- from here on the payment is cancelled at the bank
    offered_at timestamptz,                    -- when the bank was last asked to take the payment
    attempt_id uuid,                           -- the attempt under way: only its outcome may be recorded
    failures integer not null default 0,       -- attempts since the last step forward; widens the pauses between them
    word text check (word in ('success', 'failure', 'cancelled')), -- the bank's, given once, never changed
    bank_reference text,                       -- under which the bank gave its word
    command_try integer not null default 0,    -- part of the command's key; goes up only after a recorded refusal
    unfrozen boolean not null default false,   -- its wallet was, maybe after a refusal we have yet to read: that one is not waited for
    outcome text check (outcome in ('SUCCESS', 'FAILED', 'EXPIRED')), -- the ledger's
    ended_position bigint,                     -- of the event that ended it, once that has been seen
    alert text,                                -- what a person should look at; none when all is well
    constraint top_ups_word check (state not in ('DECIDED', 'BLOCKED') or word is not null),
    constraint top_ups_ended check ((state = 'ENDED') = (outcome is not null) and (state = 'ENDED') = (due_at is null))
);
create index top_ups_due on workflows.top_ups (due_at) where due_at is not null;
create index top_ups_wallet on workflows.top_ups (wallet_id) where state in ('DECIDED', 'BLOCKED'); -- to book once it is free
create index top_ups_alert on workflows.top_ups (transaction_id) where alert is not null; -- few: what a person should look at
create index top_ups_reference on workflows.top_ups (bank_reference) where bank_reference is not null;

-- Every call to the outside and every command, written before it is made. Without an outcome: under way, or nobody
-- lived to write it down.
create table workflows.attempts (
    id uuid primary key,
    transaction_id uuid not null references workflows.top_ups,
    step text not null,    -- register, ask, cancel: at the bank; settle, fail, expire: at the ledger
    started_at timestamptz not null,
    ended_at timestamptz,
    outcome text
);
create index attempts_transaction on workflows.attempts (transaction_id, started_at);

-- Every different callback whose signature was right, kept for ever, with what became of it.
create table workflows.callbacks (
    id uuid primary key,
    bank_reference text collate "C" not null,
    token text collate "C" not null,
    status text not null check (status in ('success', 'failure')),
    amount numeric not null,
    currency text not null,
    body bytea not null,            -- the bytes that were signed, as they came first
    signed_at timestamptz not null, -- the bank's clock
    -- QUARANTINED: no such payment yet, nothing done; looked at again when the payment appears. ACCEPTED: the word
    -- counts. MISMATCH: other money than was asked for. CONTRARY: not what is already known of the payment.
    -- SECOND: what is already known, under another bank reference. CONFLICT: under a bank reference that stands for
    -- something else; looked at again when it is repeated, for a quarantined one may have let go of the reference.
    verdict text not null
        check (verdict in ('QUARANTINED', 'ACCEPTED', 'MISMATCH', 'CONTRARY', 'SECOND', 'CONFLICT')),
    received_at timestamptz not null default now(),
    received_last_at timestamptz not null default now(),
    received_times bigint not null default 1
);
create unique index callbacks_content on workflows.callbacks (bank_reference, token, status, amount, currency);
-- A bank reference stands for one callback. What was refused for its money never stood for anything: it may be corrected.
create unique index callbacks_reference on workflows.callbacks (bank_reference) where verdict not in ('MISMATCH', 'CONFLICT');
create index callbacks_quarantined on workflows.callbacks (token) where verdict = 'QUARANTINED';

grant usage on schema workflows to daybook_workflows;
grant select, insert, update on all tables in schema workflows to daybook_workflows; -- nothing here is ever deleted
