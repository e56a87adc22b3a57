//! What follows from the log and acts on it: whether views, webhooks and workflows keep up, what waits for a person, and
//! whether anybody can log in.

use std::time::Duration;

use api_contract::Seal;
use sqlx::{PgConnection, Row};
use tokio::time::sleep;
use uuid::Uuid;

use super::postgres::Server;
use super::{Finding, Findings};

/// A follower that is further behind is looked at a second time, so much later: it may be on its way.
const BEHIND: i64 = 1_000;
const LOOK_AGAIN: Duration = Duration::from_secs(2);

async fn head(connection: &mut PgConnection) -> anyhow::Result<i64> {
    let head = "select last_position from ledger.commits order by number desc limit 1";
    Ok(sqlx::query_scalar(head).fetch_one(connection).await?)
}

/// Judges how far a follower is behind. `read` asks for its position.
async fn lag(
    connection: &mut PgConnection,
    check: &'static str,
    read: &'static str,
    name: &str,
    stands_for: &str,
) -> anyhow::Result<Finding> {
    let at: Option<i64> = sqlx::query_scalar(read).bind(name).fetch_optional(&mut *connection).await?;
    let Some(at) = at else {
        return Ok(Finding::wrong(check, format!("{stands_for} has no checkpoint"), "Run `daybook rebuild`."));
    };
    let end = head(connection).await?; // after the checkpoint, which is never further
    if end < at {
        return Ok(Finding::wrong(
            check,
            format!("{stands_for} is at position {at}, beyond the log's end at {end}: it followed another history"),
            "If an older backup of the log was restored: run `daybook audit`, then `daybook rebuild`.",
        ));
    }
    if end - at <= BEHIND {
        return Ok(Finding::ok(check, format!("{stands_for} is {} events behind", end - at)));
    }
    sleep(LOOK_AGAIN).await;
    let later: Option<i64> = sqlx::query_scalar(read).bind(name).fetch_optional(&mut *connection).await?;
    let (moved, end) = (later.unwrap_or(at) - at, head(connection).await?);
    let behind = end - later.unwrap_or(at);
    let found =
        format!("{stands_for} is {behind} events behind, and did {moved} of them in {} s", LOOK_AGAIN.as_secs());
    Ok(if moved <= 0 {
        Finding::warning(check, found, "See that its service runs, and what it logs.")
    } else if BEHIND < behind {
        Finding::warning(check, found, "Look again later: it is catching up.")
    } else {
        Finding::ok(check, found)
    })
}

pub(super) async fn views(server: Server) -> anyhow::Result<Findings> {
    let mut connection = server.connect().await?;
    let names: Vec<String> =
        sqlx::query_scalar("select view from views.checkpoints order by view").fetch_all(&mut connection).await?;
    let mut findings = Vec::new();
    for name in &names {
        let read = "select position from views.checkpoints where view = $1";
        let found = lag(&mut connection, "views", read, name, &format!("the view of {name}")).await?;
        findings.push(found);
    }
    // All well is one line.
    if findings.iter().all(|finding| finding.verdict == super::Verdict::Ok) {
        let all = format!("{}: none is more than {BEHIND} events behind", names.join(", "));
        return Ok(vec![Finding::ok("views", all)]);
    }
    findings.retain(|finding| finding.verdict != super::Verdict::Ok);
    Ok(findings)
}

pub(super) async fn webhooks(server: Server) -> anyhow::Result<Findings> {
    const CHECK: &str = "webhooks";
    let mut connection = server.connect().await?;
    let read = "select position from webhooks.checkpoint where $1 <> ''";
    let mut findings = vec![lag(&mut connection, CHECK, read, "it", "the webhook dispatcher").await?];

    let row = sqlx::query(
        "select count(*) as waiting, count(*) filter (where status = 'RETRYING') as retrying,
                coalesce(max(extract(epoch from now() - next_due)) filter (where not in_flight), 0)::bigint as late,
                count(distinct endpoint_id) as endpoints
         from webhooks.deliveries where next_due is not null",
    );
    let row = row.fetch_one(&mut connection).await?;
    let (waiting, retrying, late): (i64, i64, i64) =
        (row.try_get("waiting")?, row.try_get("retrying")?, row.try_get("late")?);
    let endpoints: i64 = row.try_get("endpoints")?;
    let found = format!("{waiting} deliveries to {endpoints} endpoints wait, {retrying} of them after a failure");
    findings.push(if 300 < late {
        Finding::warning(
            "deliveries",
            format!("{found}; the oldest was due {late} s ago"),
            "See that the webhook dispatcher runs, and whether an endpoint hangs: each has a few places only.",
        )
    } else {
        Finding::ok("deliveries", found)
    });

    let dead: i64 = sqlx::query_scalar(
        "select count(*) from webhooks.deliveries where status = 'DEAD' and now() - interval '1 day' < ended_at",
    )
    .fetch_one(&mut connection)
    .await?;
    if 0 < dead {
        findings.push(Finding::warning(
            "dead-letters",
            format!("{dead} deliveries were given up in the last day"),
            "Tell their partners, and send them again with POST /v1/deliveries/{id}/redeliver once the endpoint works.",
        ));
    }
    let gone: i64 = sqlx::query_scalar(
        "select count(*) from webhooks.endpoints
         where deleted_at is null and status = 'DISABLED' and disabled_reason is distinct from 'requested'",
    )
    .fetch_one(&mut connection)
    .await?;
    if 0 < gone {
        findings.push(Finding::warning(
            "endpoints",
            format!("{gone} endpoints were disabled because of how they answered"),
            "Ask their partners, who can enable them again with PATCH /v1/webhooks/{id}.",
        ));
    }
    Ok(findings)
}

pub(super) async fn workflows(server: Server) -> anyhow::Result<Findings> {
    const CHECK: &str = "workflows";
    let mut connection = server.connect().await?;
    let read = "select position from workflows.checkpoint where $1 <> ''";
    let mut findings = vec![lag(&mut connection, CHECK, read, "it", "the workflows' follower").await?];

    let row = sqlx::query(
        "select count(*) as open, count(*) filter (where state = 'BLOCKED') as blocked,
                coalesce(max(extract(epoch from now() - due_at)), 0)::bigint as late
         from workflows.top_ups where due_at is not null",
    );
    let row = row.fetch_one(&mut connection).await?;
    let get = |column: &str| row.try_get::<i64, _>(column);
    let (open, blocked, late) = (get("open")?, get("blocked")?, get("late")?);
    let found = format!("{open} under way, {blocked} of them refused by the ledger for now");
    // Also of what has ended and is never due again: there bank and ledger disagree, and only a person can settle it.
    let row = sqlx::query(
        "select count(*) as alerts, count(*) filter (where state = 'ENDED') as ended, min(alert) as alert
         from workflows.top_ups where alert is not null",
    );
    let row = row.fetch_one(&mut connection).await?;
    let (alerts, ended): (i64, i64) = (row.try_get("alerts")?, row.try_get("ended")?);
    let alert = row.try_get::<Option<String>, _>("alert")?.unwrap_or_default();
    findings.push(if 0 < alerts {
        Finding::warning(
            "top-ups",
            format!("{found}; {alerts} want a person, {ended} of them though they have ended, such as: {alert}"),
            "Compare each with the bank's statement: `select transaction_id, state, alert from workflows.top_ups \
             where alert is not null`. What is under way goes on by itself once its cause is gone. What has ENDED \
             keeps its alert until it is settled with the bank and you say so: `update workflows.top_ups \
             set alert = null where transaction_id = '…' and state = 'ENDED'`.",
        )
    } else if 120 < late {
        Finding::warning(
            "top-ups",
            format!("{found}; the oldest step was due {late} s ago"),
            "See that the workflows run, and whether the bank answers.",
        )
    } else if 0 < blocked {
        Finding::warning(
            "top-ups",
            found,
            "Unfreeze the wallets that they are for, or expect them to be settled later.",
        )
    } else {
        Finding::ok("top-ups", found)
    });

    let row = sqlx::query(
        "select count(*) filter (where verdict in ('MISMATCH', 'CONTRARY', 'SECOND', 'CONFLICT')) as contrary,
                count(*) filter (where verdict = 'QUARANTINED' and received_at < now() - interval '10 minutes') as unknown
         from workflows.callbacks where now() - interval '1 day' < received_last_at",
    );
    let row = row.fetch_one(&mut connection).await?;
    let (contrary, unknown): (i64, i64) = (row.try_get("contrary")?, row.try_get("unknown")?);
    findings.push(if 0 < contrary || 0 < unknown {
        Finding::warning(
            "callbacks",
            format!(
                "in the last day {contrary} from the bank contradicted what is known or decided a payment again, \
                 {unknown} name no payment of ours"
            ),
            "Compare them with the bank's statement: `select * from workflows.callbacks where verdict <> 'ACCEPTED'`.",
        )
    } else {
        Finding::ok("callbacks", "none in the last day that contradicted what is known or decided a payment again")
    });
    Ok(findings)
}

/// Who can log in, and whether tokens can be signed.
pub(super) async fn credentials(server: Server, seal: Option<Seal>) -> anyhow::Result<Findings> {
    const CHECK: &str = "signing-key";
    let mut connection = server.connect().await?;
    let admins: i64 = sqlx::query_scalar(
        "select count(*) from access.clients where 'admin' = any(scopes) and not suspended and secret_hash is not null",
    )
    .fetch_one(&mut connection)
    .await?;
    let mut findings = vec![if admins == 0 {
        Finding::wrong(
            "administrator",
            "no client that is not suspended has the scope admin",
            "Run `daybook migrate --admin-client-id …`.",
        )
    } else {
        Finding::ok("administrator", format!("{admins} of the clients"))
    }];

    let key = sqlx::query(
        "select kid, sealed_private_key, extract(epoch from now() - signs_from)::bigint / 86400 as days,
                replace_at < now() - interval '7 days' as overdue
         from access.signing_keys where retired_at is null and signs_from <= now() order by signs_from desc, kid desc limit 1",
    );
    let Some(key) = key.fetch_optional(&mut connection).await? else {
        findings.push(Finding::ok(CHECK, "none: the first login makes one"));
        return Ok(findings);
    };
    let days: i64 = key.try_get("days")?;
    let kid: Uuid = key.try_get("kid")?;
    let sealed: Option<Vec<u8>> = key.try_get("sealed_private_key")?;
    let opened = seal.map(|seal| seal.open(&format!("access.signing_keys/{kid}"), &sealed.clone().unwrap_or_default()));
    findings.push(match opened {
        _ if sealed.is_none() => Finding::wrong(
            CHECK,
            format!("{kid} is to sign, and its private half is gone: nobody can log in"),
            "Run `daybook access rotate-key`.",
        ),
        Some(Err(error)) => Finding::wrong(
            CHECK,
            format!("{kid} cannot be opened: {error}; nobody can log in"),
            "Give the services the sealing key that it was sealed with, or, if that is lost, `daybook access rotate-key --revoke`.",
        ),
        _ if key.try_get("overdue")? => Finding::warning(
            CHECK,
            format!("{kid} has signed for {days} days, and was to be replaced over a week ago"),
            "The next login replaces it. If there are logins, read what command-api logs.",
        ),
        Some(Ok(_)) => Finding::ok(CHECK, format!("{kid} opens with the sealing key, and has signed for {days} days")),
        None => Finding::ok(CHECK, format!("{kid} has signed for {days} days; without the sealing key it was not opened")),
    });
    Ok(findings)
}
