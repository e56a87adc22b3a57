//! The database server: whether it can be used, keeps what it has committed, and has room for all who want it.
//!
//! Each probe has a session of its own, read-only, with limits of time on both sides.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::Context;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Executor, PgConnection, Row};
use tokio::time::timeout;

use super::{Finding, Findings, is_local, millis, without_password};

/// A Postgres that answers.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) url: String,
    options: PgConnectOptions,
    connected_in: Duration,
}

/// The releases that our SQL is written for.
const VERSIONS: std::ops::RangeInclusive<i64> = 15..=18;

/// What the pools of all services take at most, rounded up.
const CONNECTIONS_WANTED: i64 = 70;

const CONNECT_TIME: Duration = Duration::from_secs(8);

/// How a session of ours begins. It cannot write, whatever we do, and neither waits for a lock nor works for long.
const LIMITS: &str =
    "set default_transaction_read_only = on; set statement_timeout = '8s'; set lock_timeout = '2s'; set jit = off";

impl Server {
    pub(super) async fn reach(url: &str) -> Result<Self, Finding> {
        const CHECK: &str = "reachable";
        let shown = without_password(url);
        let wrong = |found: String, advice| Finding::wrong(CHECK, found, advice);
        let options = PgConnectOptions::from_str(url).map_err(|error| {
            wrong(format!("{shown} is no address of a database: {error}"), "Correct DAYBOOK_DATABASE_URL.")
        })?;
        let options = options.application_name("daybook doctor");
        let mut server = Self { url: url.to_owned(), options, connected_in: Duration::ZERO };
        let asked = Instant::now();
        match server.connect().await {
            Ok(_) => {
                server.connected_in = asked.elapsed();
                Ok(server)
            }
            Err(error) => {
                let code = error.downcast_ref::<sqlx::Error>().and_then(sqlx::Error::as_database_error);
                let code = code.and_then(|error| error.code()).unwrap_or_default().into_owned();
                let advice = match code.as_str() {
                    "28P01" | "28000" => "Correct the user and the password in the address.",
                    "3D000" => "Make the database, or correct its name in the address.",
                    "53300" => "Raise max_connections, or end sessions: every connection is taken.",
                    _ => "Start Postgres, or correct its address; nothing is lost meanwhile, and nothing is accepted.",
                };
                Err(wrong(format!("{shown} cannot be used: {error:#}"), advice))
            }
        }
    }

    pub(super) async fn connect(&self) -> anyhow::Result<PgConnection> {
        let connecting = async {
            let mut connection = self.options.connect().await?;
            connection.execute(LIMITS).await?;
            Ok::<_, sqlx::Error>(connection)
        };
        let connected = timeout(CONNECT_TIME, connecting).await;
        Ok(connected.with_context(|| format!("no answer within {} s", CONNECT_TIME.as_secs()))??)
    }
}

pub(super) async fn version(server: Server) -> anyhow::Result<Findings> {
    let mut connection = server.connect().await?;
    let row = sqlx::query(
        "select current_setting('server_version') as version, current_setting('server_version_num')::bigint / 10000 as major,
                pg_is_in_recovery() as standby, current_user::text as login,
                (select coalesce(bool_or(ssl), false) from pg_stat_ssl where pid = pg_backend_pid()) as tls",
    );
    let row = row.fetch_one(&mut connection).await?;
    let (version, major): (String, i64) = (row.try_get("version")?, row.try_get("major")?);
    let mut findings = vec![Finding::ok(
        "reachable",
        format!(
            "{} as {}, in {}",
            without_password(&server.url),
            row.try_get::<String, _>("login")?,
            millis(server.connected_in)
        ),
    )];
    findings.push(if VERSIONS.contains(&major) {
        Finding::ok("version", format!("Postgres {version}"))
    } else {
        Finding::wrong("version", format!("Postgres {version}"), "Use Postgres 15 to 18.")
    });
    if row.try_get("standby")? {
        findings.push(Finding::wrong(
            "primary",
            "this server is a standby: it takes no appends",
            "Name the primary, or promote this one once the old primary is certainly gone.",
        ));
    }
    if !is_local(&server.url) && !row.try_get::<bool, _>("tls")? {
        findings.push(Finding::warning(
            "tls",
            "the password and all data pass the network in clear",
            "Add `?sslmode=verify-full` to the address, and give the server a certificate.",
        ));
    }
    Ok(findings)
}

struct Setting {
    value: String,
    unit: String,
    source: String,
}

/// Settings as they are in a session that asks for nothing.
async fn settings_of(connection: &mut PgConnection) -> anyhow::Result<BTreeMap<String, Setting>> {
    let rows = sqlx::query("select name, reset_val, coalesce(unit, '') as unit, source from pg_settings");
    let mut settings = BTreeMap::new();
    for row in rows.fetch_all(connection).await? {
        let value: Option<String> = row.try_get("reset_val")?;
        let setting =
            Setting { value: value.unwrap_or_default(), unit: row.try_get("unit")?, source: row.try_get("source")? };
        settings.insert(row.try_get("name")?, setting);
    }
    Ok(settings)
}

/// What "committed" means here.
pub(super) async fn durability(server: Server) -> anyhow::Result<Findings> {
    let mut connection = server.connect().await?;
    let settings = settings_of(&mut connection).await?;
    let value = |name: &str| settings.get(name).map_or("", |setting| setting.value.as_str());
    let source = |name: &str| settings.get(name).map_or("", |setting| setting.source.as_str());
    let mut findings = Vec::new();
    for (name, loss) in [
        ("fsync", "what is acknowledged is not on the disk"),
        ("full_page_writes", "a page that is half-written in a power cut cannot be restored"),
        ("synchronous_commit", "an answer does not wait for the disk"),
    ] {
        findings.push(if value(name) == "off" {
            Finding::wrong(
                name,
                format!("off (by {}): {loss}", source(name)),
                &format!("Set {name} = on, and reload: until then acknowledged does not mean kept."),
            )
        } else {
            Finding::ok(name, value(name))
        });
    }
    findings.push(if value("data_checksums") == "on" {
        Finding::ok("data_checksums", "on")
    } else {
        Finding::warning(
            "data_checksums",
            "off: a disk that decays does so unnoticed, until an audit",
            "Turn them on with pg_checksums while Postgres is stopped.",
        )
    });
    Ok(findings)
}

/// Settings that get in the way of a ledger; also those that stand at a role or a database, where nobody looks.
pub(super) async fn settings(server: Server) -> anyhow::Result<Findings> {
    const SHARED_BUFFERS_MIN: i64 = 64 * 1024 * 1024;
    const STATEMENT_TIMEOUT_MIN: i64 = 30_000;
    let mut connection = server.connect().await?;
    let settings = settings_of(&mut connection).await?;
    let value = |name: &str| settings.get(name).map_or("", |setting| setting.value.as_str());
    let number = |name: &str| value(name).parse::<i64>().unwrap_or(0);
    let mut findings = Vec::new();

    let pages = settings.get("shared_buffers").filter(|setting| setting.unit == "8kB");
    findings.push(match pages.and_then(|setting| setting.value.parse::<i64>().ok()) {
        None => Finding::not_looked_at("shared_buffers", "its unit is not the usual one"),
        Some(pages) if pages * 8192 < SHARED_BUFFERS_MIN => Finding::warning(
            "shared_buffers",
            format!("{} MiB: the log's end and the views' hot rows do not stay in memory", pages / 128),
            "Set shared_buffers to 256MB or a quarter of the memory, and restart Postgres.",
        ),
        Some(pages) => Finding::ok("shared_buffers", format!("{} MiB", pages / 128)),
    });

    let mut timeouts = Vec::new();
    for (name, least) in [
        ("statement_timeout", STATEMENT_TIMEOUT_MIN),
        ("transaction_timeout", STATEMENT_TIMEOUT_MIN),
        ("lock_timeout", STATEMENT_TIMEOUT_MIN),
        ("idle_in_transaction_session_timeout", 1_000),
        ("idle_session_timeout", 60_000),
    ] {
        if (1..least).contains(&number(name)) {
            timeouts.push(format!("{name} is {} ms", number(name)));
        }
    }
    findings.push(if timeouts.is_empty() {
        Finding::ok("timeouts", "none that would end our work")
    } else {
        Finding::warning(
            "timeouts",
            timeouts.join(", "),
            "Lift them for Daybook's user (`alter role … set … = 0`): services set limits of their own, and rebuilding a \
             view or an audit takes longer.",
        )
    });

    let row = sqlx::query(
        "select pg_encoding_to_char(encoding)::text as encoding, datcollate::text as collation,
                current_setting('default_transaction_read_only') as read_only,
                datcollversion as made_with, pg_database_collation_actual_version(oid) as found
         from pg_database where datname = current_database()",
    );
    let row = row.fetch_one(&mut connection).await?;
    let encoding: String = row.try_get("encoding")?;
    findings.push(if encoding == "UTF8" {
        Finding::ok("encoding", "UTF8")
    } else {
        Finding::wrong(
            "encoding",
            format!("{encoding}: texts of clients cannot all be kept"),
            "Make the database anew with `encoding 'UTF8' template template0`.",
        )
    });
    // Ours are `collate "C"` where order or uniqueness matters; other indexes would be searched wrongly.
    let versions: (Option<String>, Option<String>) = (row.try_get("made_with")?, row.try_get("found")?);
    if let (Some(made), Some(found)) = versions
        && made != found
    {
        findings.push(Finding::warning(
            "collation",
            format!("the database was made with collation version {made}, the system now has {found}"),
            "Do `reindex database` and `alter database … refresh collation version`.",
        ));
    }
    if value("autovacuum") == "off" || value("track_counts") == "off" {
        findings.push(Finding::warning(
            "autovacuum",
            "off: tables that are written again and again grow without end",
            "Set autovacuum = on and track_counts = on, and reload.",
        ));
    }
    let slow: Vec<_> = [
        (
            number("max_wal_size") < 4096,
            "max_wal_size below 4GB: frequent checkpoints, behind which pages are logged in full",
        ),
        (
            matches!(value("wal_compression"), "on" | "pglz"),
            "wal_compression by pglz: dearer than the event that it is for",
        ),
        (value("wal_init_zero") == "on", "wal_init_zero on: nobody commits while a new segment is filled with zeros"),
        (
            number("backend_flush_after") == 0,
            "backend_flush_after 0: the kernel gathers pages, and the WAL waits for them",
        ),
        (
            15 < number("autovacuum_naptime"),
            "autovacuum_naptime above 15s: vacuum comes when the log's pages have left memory",
        ),
    ]
    .into_iter()
    .filter_map(|(slow, what)| slow.then_some(what))
    .collect();
    findings.push(if slow.is_empty() {
        Finding::ok("tuning", "none of the settings that are known to make commits wait")
    } else {
        Finding::warning(
            "tuning",
            slow.join("; "),
            "Nothing is at risk. Where latencies matter: wal_compression = lz4 (or off), max_wal_size = 8GB, wal_init_zero = off, \
             backend_flush_after = 512kB, autovacuum_naptime = 5s, and reload.",
        )
    });
    if value("session_replication_role") != "origin" {
        findings.push(Finding::wrong(
            "session_replication_role",
            format!(
                "{}: triggers do not fire, so nothing keeps the owner from changing the log",
                value("session_replication_role")
            ),
            "Reset it, and run `daybook audit`.",
        ));
    }
    findings.extend(settings_of_roles(&mut connection).await?);
    Ok(findings)
}

async fn settings_of_roles(connection: &mut PgConnection) -> anyhow::Result<Findings> {
    let rows = sqlx::query(
        "select coalesce(r.rolname::text, 'every role') as role, setting
         from pg_db_role_setting s cross join unnest(s.setconfig) setting left join pg_roles r on r.oid = s.setrole
         where s.setdatabase in (0, (select oid from pg_database where datname = current_database()))
           and setting ~ '^(fsync|full_page_writes|synchronous_commit|session_replication_role|default_transaction_read_only)='
         order by 1, 2",
    );
    let mut findings = Vec::new();
    for row in rows.fetch_all(connection).await? {
        let (role, setting): (String, String) = (row.try_get("role")?, row.try_get("setting")?);
        let harmless = ["=on", "=origin", "=local", "=remote_write", "=remote_apply"];
        let read_only = setting.starts_with("default_transaction_read_only");
        let fine =
            if read_only { setting.ends_with("=off") } else { harmless.iter().any(|end| setting.ends_with(end)) };
        if !fine {
            findings.push(Finding::wrong(
                "settings-of-roles",
                format!("{role} has {setting}"),
                "Do `alter role … reset …` (or `alter database … reset …`), and restart the services.",
            ));
        }
    }
    Ok(findings)
}

/// Whether all who want a connection get one.
pub(super) async fn connections(server: Server) -> anyhow::Result<Findings> {
    const CHECK: &str = "connections";
    let mut connection = server.connect().await?;
    let row = sqlx::query(
        "select current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint
                - coalesce(current_setting('reserved_connections', true)::bigint, 0) as places,
                count(*) as taken, count(*) filter (where application_name like 'daybook%') as ours
         from pg_stat_activity where backend_type = 'client backend'",
    );
    let row = row.fetch_one(&mut connection).await?;
    let (places, taken, ours): (i64, i64, i64) = (row.try_get("places")?, row.try_get("taken")?, row.try_get("ours")?);
    let found =
        format!("{places} in all, {taken} taken, {ours} of them by Daybook, which wants {CONNECTIONS_WANTED} at most");
    let mut findings = vec![if places - taken < 3 {
        Finding::wrong(CHECK, found, "Raise max_connections, or end sessions that nobody needs.")
    } else if places - (taken - ours) < CONNECTIONS_WANTED {
        Finding::warning(CHECK, found, "Raise max_connections: under load services would wait for connections in vain.")
    } else {
        Finding::ok(CHECK, found)
    }];

    let rows = sqlx::query(
        "select pid, coalesce(usename::text, '') as login, application_name,
                extract(epoch from clock_timestamp() - xact_start)::bigint as seconds
         from pg_stat_activity
         where datname = current_database() and xact_start < clock_timestamp() - interval '5 minutes'
           and backend_type = 'client backend'
         order by xact_start limit 3",
    );
    for row in rows.fetch_all(&mut connection).await? {
        let (pid, seconds): (i32, i64) = (row.try_get("pid")?, row.try_get("seconds")?);
        let (login, program): (String, String) = (row.try_get("login")?, row.try_get("application_name")?);
        findings.push(Finding::warning(
            "long-transaction",
            format!("process {pid} ({login}, {program}) has had a transaction open for {seconds} s"),
            &format!(
                "See what it is; `select pg_terminate_backend({pid})` ends it. Until then nothing can be cleared away."
            ),
        ));
    }
    let waiting: i64 = sqlx::query_scalar(
        "select count(*) from pg_stat_activity
         where wait_event_type = 'Lock' and state_change < clock_timestamp() - interval '10 seconds'
           and datname = current_database()",
    )
    .fetch_one(&mut connection)
    .await?;
    if 0 < waiting {
        findings.push(Finding::warning(
            "locks",
            format!("{waiting} sessions have waited for a lock for more than 10 s"),
            "See `select pid, pg_blocking_pids(pid), query from pg_stat_activity where wait_event_type = 'Lock'`.",
        ));
    }
    Ok(findings)
}

/// What ends a database slowly: old transaction ids, damaged pages, logs that nobody takes away.
pub(super) async fn health(server: Server) -> anyhow::Result<Findings> {
    const AGE_HIGH: i64 = 1_000_000_000;
    const AGE_DIRE: i64 = 1_900_000_000;
    let mut connection = server.connect().await?;
    let mut findings = Vec::new();
    let row = sqlx::query(
        "select age(datfrozenxid)::bigint as age, pg_database_size(oid) / 1048576 as mib,
                (select coalesce(checksum_failures, 0) from pg_stat_database s where s.datid = d.oid) as failures
         from pg_database d where datname = current_database()",
    );
    let row = row.fetch_one(&mut connection).await?;
    let (age, size): (i64, i64) = (row.try_get("age")?, row.try_get("mib")?);
    let advice = "Do `vacuum (freeze)` on this database, and see why autovacuum did not.";
    let found = format!("{size} MiB; {age} transactions since the oldest one that is not frozen");
    findings.push(match age {
        AGE_DIRE.. => Finding::wrong("database", found, advice),
        AGE_HIGH.. => Finding::warning("database", found, advice),
        _ => Finding::ok("database", found),
    });
    if 0 < row.try_get::<Option<i64>, _>("failures")?.unwrap_or(0) {
        findings.push(Finding::wrong(
            "damaged-pages",
            "Postgres has read pages whose checksum was wrong",
            "Stop writing here: copy the data directory, restore a backup elsewhere, and run `daybook audit` on it.",
        ));
    }
    let kept: Option<String> = sqlx::query_scalar(
        "select string_agg(slot_name::text || ' keeps ' || pg_size_pretty(pg_current_wal_lsn() - restart_lsn), ', ')
         from pg_replication_slots
         where not active and pg_is_in_recovery() is false and 1073741824 < pg_current_wal_lsn() - restart_lsn",
    )
    .fetch_one(&mut connection)
    .await?;
    if let Some(kept) = kept {
        findings.push(Finding::warning(
            "replication-slots",
            format!("nobody reads them, and they fill the disk: {kept}"),
            "Bring the reader back, or drop the slot with pg_drop_replication_slot.",
        ));
    }
    let archiving: Option<String> = sqlx::query_scalar(
        "select last_failed_wal from pg_stat_archiver
         where last_failed_time is not null and (last_archived_time is null or last_archived_time < last_failed_time)",
    )
    .fetch_optional(&mut connection)
    .await?
    .flatten();
    if let Some(segment) = archiving {
        findings.push(Finding::warning(
            "archiving",
            format!("archiving fails, last at {segment}: the backup grows old and the disk fills"),
            "See Postgres' log for what archive_command says.",
        ));
    }
    Ok(findings)
}
