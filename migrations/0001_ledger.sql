-- The truth. Everything else in Daybook follows from these two tables, or is not about money.
-- Written by ledger-engine through ledger.append, read by everyone; never updated, never deleted.

-- Roles are cluster-wide, databases are many (each test has its own): create them once, whoever comes first.
do $$
declare
    wanted text;
begin
    foreach wanted in array array[
        'daybook_reader',    -- may read the log; every room that follows it is a member
        'daybook_ledger',    -- ledger-engine: may append to the log
        'daybook_access',    -- credentials
        'daybook_projector', -- views
        'daybook_webhooks',  -- webhook endpoints and deliveries
        'daybook_workflows'  -- calls to the outside
    ] loop
        begin
            execute format('create role %I nologin', wanted);
        exception when duplicate_object or unique_violation then
            null;
        end;
        begin
            execute format('grant %I to %I', wanted, current_user);
        exception when others then
            null; -- a superuser is a member of everything, and may not be granted to itself
        end;
    end loop;
    grant daybook_reader to daybook_ledger, daybook_projector, daybook_webhooks, daybook_workflows;
exception when unique_violation then
    null; -- another database's migration granted the same at the same moment
end
$$;

create schema ledger;

-- The one ledger in this database.
create table ledger.identity (
    id uuid primary key,
    the_only_one boolean not null default true unique check (the_only_one)
);

-- One row per append. Appending is a compare-and-swap on `number`: of two writers, the second waits for the
-- first one's row and then fails.
create table ledger.commits (
    number bigint primary key,
    first_position bigint not null,
    last_position bigint not null,
    -- The commit that this one was decided upon. The foreign key refuses a gap, a fork, and a writer whose head
    -- is not in this log.
    previous_number bigint,
    previous_last bigint,
    previous_chain bytea,
    root bytea not null check (length(root) = 32),   -- RFC 6962 tree hash over the leaves of its events
    chain bytea not null check (length(chain) = 32), -- SHA-256(previous chain ‖ root ‖ first ‖ last)
    recorded_at timestamptz not null,
    constraint commits_head unique (number, last_position, chain),
    constraint commits_previous foreign key (previous_number, previous_last, previous_chain)
        references ledger.commits (number, last_position, chain),
    constraint commits_follow check (
        (number = 0 and first_position = 0 and last_position = 0 and previous_number is null)
        or (0 < number and previous_number = number - 1 and previous_last is not null and previous_chain is not null
            and first_position = previous_last + 1 and first_position <= last_position)
    )
) with (
    -- As of the events, where it is said why; and analysed not after every few hundred rows, which all look alike.
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 5000, autovacuum_freeze_min_age = 0,
    autovacuum_analyze_threshold = 20000
);

-- One row per event, for ever. The first seven columns are those that postgres-es reads.
create table ledger.events (
    aggregate_type text collate "C" not null,
    aggregate_id text collate "C" not null, -- with its prefix: txn_…
    sequence bigint not null check (0 < sequence),
    event_type text collate "C" not null,
    event_version text collate "C" not null,
    payload json not null,                  -- json, not jsonb: the bytes stay as written, so they can be hashed
    metadata json not null,
    position bigint not null,               -- 1, 2, 3, …: given by the writer, held together by ledger.commits
    commit_number bigint not null,
    command_id uuid not null,               -- a command's events are contiguous
    recorded_at timestamptz not null,
    leaf_hash bytea not null check (length(leaf_hash) = 32),
    key_hash bytea check (length(key_hash) = 16),         -- on a keyed command's first event; begins with the key's time, if it has one
    request_hash bytea check (length(request_hash) = 32), -- what the key was used for
    constraint events_position primary key (position)
) with (
    -- Rows are never changed, so vacuum only marks pages as visible to all and frozen, once. It does so soon after they are
    -- written, while they are in memory: a page that a checkpoint has passed is logged in full for it, and read and written again.
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 20000, autovacuum_freeze_min_age = 0
);
-- How many rows `analyze` looks at follows from the largest target: of rows like these a few thousand tell as much as 30,000.
alter table ledger.events
    alter aggregate_type set statistics 10, alter aggregate_id set statistics 10, alter sequence set statistics 10,
    alter event_type set statistics 10, alter event_version set statistics 10, alter payload set statistics 0,
    alter metadata set statistics 0, alter position set statistics 10, alter commit_number set statistics 10,
    alter command_id set statistics 10, alter recorded_at set statistics 10, alter leaf_hash set statistics 0,
    alter key_hash set statistics 10, alter request_hash set statistics 0;
-- An event's place in its stream is given once. Two indexes, for new transactions come in the order of time: at the right
-- end of an index of their own, which is a third cheaper than the middle of one that holds wallets behind them. Who reads a
-- stream writes the type out, so that the planner sees which one to take.
create unique index events_stream_of_transaction on ledger.events (aggregate_id, sequence) where aggregate_type = 'transaction';
create unique index events_stream on ledger.events (aggregate_type, aggregate_id, sequence) where aggregate_type <> 'transaction';
-- A key is used once, for ever: this index is the judge, whatever any process remembers.
create unique index events_key on ledger.events (key_hash) where key_hash is not null;

-- Whose turn it is to append. Carries no correctness: without it a writer that lost once would go on losing.
-- An append locks the row of its commit's number first, even or odd, so that two who want the same number queue before
-- they have written anything; then the last row, which the append before it holds until it is committed.
create table ledger.turn (place smallint primary key check (place in (0, 1, 2))); -- even, odd, now
insert into ledger.turn values (0), (1), (2);

-- The engine's book as it was at a position of the log: what a start begins with, and where wallets rest that nobody
-- touches. All of it follows from the log. With no engine running it may be emptied; the next start folds the log anew.
create table ledger.book_snapshot (
    format smallint primary key, -- engines of different releases each have their own
    position bigint not null,
    commit_number bigint not null,
    chain bytea not null,
    -- An engine that was left on a history which the log has abandoned cannot leave it to the others.
    constraint book_snapshot_head foreign key (commit_number, position, chain)
        references ledger.commits (number, last_position, chain)
);
-- A wallet or partner that is in no row and in no engine's memory does not exist.
create table ledger.book_wallets (
    format smallint not null,
    id uuid not null,
    position bigint not null, -- of the last event that is in; the snapshot's own position may be less, never the log's
    wallet text not null,
    constraint book_wallets_pkey primary key (format, id)
);
create table ledger.book_partners (
    format smallint not null,
    id uuid not null,
    position bigint not null,
    partner text not null,
    constraint book_partners_pkey primary key (format, id)
);

-- Appends one commit and its events. The commit row goes in first: it is the only place where two writers meet,
-- and with events first two appends could deadlock.
-- A writer's next commit may come before the one it follows is through (`p_ahead`): then the dear part, its events, goes
-- in beside that one's commit to the disk, and its commit row once that one has ended. Nobody else is writing events
-- meanwhile: who wants the same number waits before it begins, and the two have no key in common, for one engine decided both.
-- Events of one engine go in one commit after the other, for which it names a lane of its own: two at once would meet on
-- the last pages of every index, split them in the middle, and take a sixth more of the processor and of the WAL. These
-- locks are for speed alone, and where no lane is named nothing is locked. The lane is given back before the commit, which
-- only a session's lock can be; so all that happens under one stands in a block whose every way out gives it back.
-- The function runs with its owner's rights, and is the only way in: whoever may call it can still not leave an event
-- without its commit, or a commit without its events.
create function ledger.append(
    p_number bigint, p_first bigint, p_previous_last bigint, p_previous_chain bytea, p_root bytea, p_chain bytea,
    p_recorded_at timestamptz,
    p_aggregate_types text[], p_aggregate_ids text[], p_sequences bigint[], p_event_types text[], p_event_versions text[],
    p_payloads json[], p_metadata json[], p_command_ids uuid[], p_leaf_hashes bytea[], p_key_hashes bytea[],
    p_request_hashes bytea[], p_ahead boolean default false, p_lane integer default null
) returns void language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    -- Places in the lane: whose events go in; and a commit that has begun, even or odd, until its transaction ends.
    inserting constant integer := 2;
    own constant integer := p_number % 2;
    before constant integer := (p_number - 1) % 2;
    early integer := 0;
begin
    begin
        perform pg_advisory_lock(p_lane, inserting);
        if p_ahead then
            while pg_try_advisory_lock(p_lane, before) loop
                -- Nobody is at the commit before. It is through; or it was sent first, comes later and should go first.
                perform pg_advisory_unlock(p_lane, before);
                exit when exists (select from ledger.commits where number = p_number - 1);
                if 5 <= early then
                    perform 1 from ledger.turn where place = 2 for no key update skip locked;
                    exit when not found; -- somebody else is appending; the keys below decide
                    raise foreign_key_violation using
                        message = 'the commit before this one does not come', constraint = 'commits_previous';
                end if;
                early := early + 1;
                perform pg_advisory_unlock(p_lane, inserting);
                perform pg_sleep(0.001);
                perform pg_advisory_lock(p_lane, inserting);
            end loop;
        end if;
        perform pg_advisory_xact_lock(p_lane, own);
        perform 1 from ledger.turn where place = p_number % 2 for no key update;
        if not p_ahead then
            perform 1 from ledger.turn where place = 2 for no key update;
            insert into ledger.commits
                (number, first_position, last_position, previous_number, previous_last, previous_chain, root, chain, recorded_at)
            values (p_number, p_first, p_first + cardinality(p_sequences) - 1, p_number - 1, p_previous_last, p_previous_chain,
                    p_root, p_chain, p_recorded_at);
        end if;
        insert into ledger.events
            (aggregate_type, aggregate_id, sequence, event_type, event_version, payload, metadata, position, commit_number,
             command_id, recorded_at, leaf_hash, key_hash, request_hash)
        select e.aggregate_type, e.aggregate_id, e.sequence, e.event_type, e.event_version, e.payload, e.metadata,
               p_first + e.place - 1, p_number, e.command_id, p_recorded_at, e.leaf_hash, e.key_hash, e.request_hash
        from unnest(p_aggregate_types, p_aggregate_ids, p_sequences, p_event_types, p_event_versions, p_payloads, p_metadata,
                    p_command_ids, p_leaf_hashes, p_key_hashes, p_request_hashes) with ordinality
             as e (aggregate_type, aggregate_id, sequence, event_type, event_version, payload, metadata, command_id, leaf_hash,
                   key_hash, request_hash, place);
        perform pg_advisory_unlock(p_lane, inserting);
    exception when query_canceled or others then
        perform pg_advisory_unlock_all(); -- those of the session: it has no others
        raise;
    end;
    if p_ahead then
        perform 1 from ledger.turn where place = 2 for no key update; -- the one before has it until it is committed
        insert into ledger.commits
            (number, first_position, last_position, previous_number, previous_last, previous_chain, root, chain, recorded_at)
        values (p_number, p_first, p_first + cardinality(p_sequences) - 1, p_number - 1, p_previous_last, p_previous_chain,
                p_root, p_chain, p_recorded_at);
    end if;
end
$$;

-- Append-only twice over: no role has the right to anything but `append`, and a trigger stops even the owner.
create function ledger.refuse_change() returns trigger language plpgsql as $$
begin
    raise exception 'the log is append-only: % on %.% refused', tg_op, tg_table_schema, tg_table_name
        using errcode = 'insufficient_privilege';
end
$$;
create trigger append_only before update or delete or truncate on ledger.events
    for each statement execute function ledger.refuse_change();
create trigger append_only before update or delete or truncate on ledger.commits
    for each statement execute function ledger.refuse_change();
create trigger append_only before update or delete or truncate on ledger.identity
    for each statement execute function ledger.refuse_change();

revoke all on function ledger.append from public;
grant usage on schema ledger to daybook_reader;
grant select on ledger.identity, ledger.commits, ledger.events to daybook_reader;
grant select, update on ledger.turn to daybook_ledger; -- `for no key update` needs the right to update
grant select, insert, update on ledger.book_snapshot, ledger.book_wallets, ledger.book_partners to daybook_ledger;
grant execute on function ledger.append to daybook_ledger;
