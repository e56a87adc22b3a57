//! What is applied to the database: the migrations of this build and no others; roles with the rights that they need
//! and no more; and what keeps the log append-only.
//!
//! Rights are judged by what they would allow, and functions by the text of the migrations: a list of both kept here
//! would be a second truth.

use std::collections::BTreeMap;

use anyhow::Context;
use migrations::MIGRATOR;
use sqlx::{PgConnection, Row};

use super::postgres::Server;
use super::{Finding, Findings};

/// Each room's schema, and its role.
const ROOMS: [(&str, &str); 5] = [
    ("ledger", "daybook_ledger"),
    ("access", "daybook_access"),
    ("views", "daybook_projector"),
    ("webhooks", "daybook_webhooks"),
    ("workflows", "daybook_workflows"),
];
const READER: &str = "daybook_reader";

/// The tables that nobody may change.
const LOG: [&str; 3] = ["events", "commits", "identity"];

pub(super) async fn migrations(server: Server) -> anyhow::Result<Findings> {
    const CHECK: &str = "migrations";
    const MIGRATE: &str = "Stop the services, run `daybook migrate` with this build, and start them again.";
    let mut connection = server.connect().await?;
    let there: bool =
        sqlx::query_scalar("select to_regclass('_sqlx_migrations') is not null").fetch_one(&mut connection).await?;
    if !there {
        return Ok(vec![Finding::wrong(CHECK, "none: this database holds no Daybook", "Run `daybook migrate`.")]);
    }
    let rows = sqlx::query("select version, checksum, success, description from _sqlx_migrations order by version");
    let mut applied = BTreeMap::new();
    for row in rows.fetch_all(&mut connection).await? {
        let found: (Vec<u8>, bool, String) =
            (row.try_get("checksum")?, row.try_get("success")?, row.try_get("description")?);
        applied.insert(row.try_get::<i64, _>("version")?, found);
    }
    let mut findings = Vec::new();
    for known in MIGRATOR.iter() {
        let name = format!("{} ({})", known.version, known.description);
        match applied.remove(&known.version) {
            None => findings.push(Finding::wrong(CHECK, format!("{name} is not applied"), MIGRATE)),
            Some((_, false, _)) => findings.push(Finding::wrong(
                CHECK,
                format!("{name} was begun and not finished"),
                "Restore the backup from before, or finish it by hand and set `success` in _sqlx_migrations.",
            )),
            Some((checksum, true, _)) if checksum != known.checksum.as_ref() => findings.push(Finding::wrong(
                CHECK,
                format!("{name} was applied with another content than this build has"),
                "Use the build that this database was migrated with, or a new database: nobody knows how they differ.",
            )),
            Some(_) => {}
        }
    }
    for (version, (_, _, description)) in applied {
        findings.push(Finding::wrong(
            CHECK,
            format!("{version} ({description}) is newer than this build"),
            "Use the newer build: this one does not know what that changed.",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, format!("all {} of this build, and no others", MIGRATOR.iter().count())));
    }
    Ok(findings)
}

/// Whether every role is there, without powers over others, and can be taken on by the services' login.
pub(super) async fn roles(server: Server) -> anyhow::Result<Findings> {
    const CHECK: &str = "roles";
    let mut connection = server.connect().await?;
    let wanted: Vec<&str> = ROOMS.iter().map(|(_, role)| *role).chain([READER]).collect();
    let rows = sqlx::query(
        "select wanted, r.oid is not null as there,
                coalesce(r.rolsuper or r.rolcreaterole or r.rolcreatedb or r.rolbypassrls or r.rolreplication, false) as mighty,
                coalesce(pg_has_role(current_user, r.oid, 'member'), false) as ours,
                (select string_agg(g.rolname::text, ', ' order by g.rolname)
                 from pg_auth_members m join pg_roles g on g.oid = m.roleid
                 where m.member = r.oid and g.rolname <> $2) as member_of,
                wanted in ('daybook_reader', 'daybook_access') or coalesce(pg_has_role(r.oid, to_regrole($2), 'member'), false)
                    as reads
         from unnest($1::text[]) wanted left join pg_roles r on r.rolname = wanted",
    );
    let mut findings = Vec::new();
    for row in rows.bind(&wanted).bind(READER).fetch_all(&mut connection).await? {
        let role: String = row.try_get("wanted")?;
        if !row.try_get::<bool, _>("there")? {
            let restore =
                "Run `daybook migrate` on a new database of this server, which makes the roles, and then grant anew.";
            findings.push(Finding::wrong(CHECK, format!("{role} does not exist"), restore));
            continue;
        }
        if row.try_get("mighty")? {
            let advice =
                format!("Do `alter role {role} nosuperuser nocreaterole nocreatedb nobypassrls noreplication`.");
            findings.push(Finding::wrong(CHECK, format!("{role} has powers over other roles or databases"), &advice));
        }
        if let Some(other) = row.try_get::<Option<String>, _>("member_of")? {
            findings.push(Finding::wrong(
                CHECK,
                format!("{role} is a member of {other}"),
                &format!("Do `revoke {other} from {role}`: no room writes in another one's schema."),
            ));
        }
        if !row.try_get::<bool, _>("ours")? {
            findings.push(Finding::wrong(
                CHECK,
                format!("the user of this address may not act as {role}"),
                &format!("Do `grant {role} to …` for the user that services connect as."),
            ));
        }
        if !row.try_get::<bool, _>("reads")? {
            let advice = format!("Do `grant {READER} to {role}`.");
            findings.push(Finding::wrong(CHECK, format!("{role} may not read the log"), &advice));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, format!("all {}, with no powers beyond their own", wanted.len())));
    }
    Ok(findings)
}

/// Who may do what to our tables and functions, beside their owners.
pub(super) async fn rights(server: Server) -> anyhow::Result<Findings> {
    let mut connection = server.connect().await?;
    let mut findings = too_much(&mut connection).await?;
    findings.extend(too_little(&mut connection).await?);
    if findings.is_empty() {
        findings.push(Finding::ok("rights", "each role has those of its own schema, and may read the log"));
    }
    Ok(findings)
}

async fn too_much(connection: &mut PgConnection) -> anyhow::Result<Findings> {
    const CHECK: &str = "rights";
    // Also rights on single columns, and functions that run with their owner's rights.
    let rows = sqlx::query(
        "with ours as (select oid, nspname::text as schema from pg_namespace where nspname = any($1)),
              granted as (
                  select schema, relname::text as name, relowner as owner, a.* from pg_class c
                  join ours on ours.oid = relnamespace cross join lateral aclexplode(relacl) a
                  union all
                  select schema, relname::text, relowner, a.* from pg_class c
                  join ours on ours.oid = relnamespace join pg_attribute t on t.attrelid = c.oid
                  cross join lateral aclexplode(t.attacl) a
                  union all
                  select schema, proname::text, proowner, a.* from pg_proc
                  join ours on ours.oid = pronamespace
                  cross join lateral aclexplode(coalesce(proacl, acldefault('f', proowner))) a
                  where prosecdef
              )
         select schema, name, coalesce(r.rolname::text, 'public') as role, string_agg(distinct privilege_type, ', ') as rights
         from granted left join pg_roles r on r.oid = grantee
         where grantee <> owner group by 1, 2, 3 order by 1, 2, 3",
    );
    let schemas: Vec<&str> = ROOMS.iter().map(|(schema, _)| *schema).chain(["views_next"]).collect();
    let mut findings = Vec::new();
    for row in rows.bind(schemas).fetch_all(connection).await? {
        let get = |column: &str| row.try_get::<String, _>(column);
        let (schema, name, role, rights) = (get("schema")?, get("name")?, get("role")?, get("rights")?);
        let reads_only = rights == "SELECT";
        let room = ROOMS.iter().find(|(of, _)| schema.starts_with(of)).map_or("", |(_, role)| *role);
        let of_log = schema == "ledger" && LOG.contains(&name.as_str());
        let of_audit = schema == "access" && name == "audit";
        let fine = match role.as_str() {
            READER => schema == "ledger" && reads_only,
            role if role == room => {
                (!of_log || reads_only)
                    && (!of_audit || !["UPDATE", "DELETE", "TRUNCATE"].iter().any(|right| rights.contains(right)))
            }
            _ => false,
        };
        if fine {
            continue;
        }
        let (found, advice) = (
            format!("{role} has {rights} on {schema}.{name}"),
            format!("Unless you know why, do `revoke {} on {schema}.{name} from {role}`.", rights.to_lowercase()),
        );
        let foreign_reader = reads_only && !role.starts_with("daybook_") && role != "public";
        findings.push(if foreign_reader {
            Finding::warning(CHECK, found, &advice)
        } else {
            Finding::wrong(CHECK, found, &advice)
        });
    }
    Ok(findings)
}

async fn too_little(connection: &mut PgConnection) -> anyhow::Result<Findings> {
    let mut findings = Vec::new();
    let mut lacks = |role: &str, what: String| {
        findings.push(Finding::wrong(
            "rights",
            format!("{role} may not {what}"),
            "Do the grants at the end of that schema's migration again.",
        ));
    };
    let there = "select r.oid is not null and n.oid is not null from (select 1) one
         left join pg_roles r on r.rolname = $1 left join pg_namespace n on n.nspname = $2";
    for (schema, role) in ROOMS.into_iter().chain([("ledger", READER)]) {
        if !sqlx::query_scalar(there).bind(role).bind(schema).fetch_one(&mut *connection).await? {
            continue; // told elsewhere: of roles, or of migrations
        }
        let usage = sqlx::query_scalar("select has_schema_privilege($1, $2, 'usage')").bind(role).bind(schema);
        if !usage.fetch_one(&mut *connection).await? {
            lacks(role, format!("use the schema {schema}"));
        }
        // The log is appended to by a function; everything else is written by its room.
        let wanted = match (schema, role) {
            ("ledger", _) => "select",
            _ => "select, insert",
        };
        let lacking: Option<String> = sqlx::query_scalar(
            "select string_agg(c.relname::text, ', ' order by c.relname)
             from pg_class c join pg_namespace n on n.oid = c.relnamespace
             where n.nspname = $2 and c.relkind in ('r', 'p')
               and ($1 <> $4 or c.relname = any($5))
               and not (select bool_and(has_table_privilege($1, c.oid, wanted)) from unnest(string_to_array($3, ', ')) wanted)",
        )
        .bind(role)
        .bind(schema)
        .bind(wanted)
        .bind(READER)
        .bind(LOG.as_slice())
        .fetch_one(&mut *connection)
        .await?;
        if let Some(tables) = lacking {
            lacks(role, format!("{wanted} on {schema}.{tables}"));
        }
    }
    let append: Option<bool> = sqlx::query_scalar(
        "select bool_or(has_function_privilege('daybook_ledger', p.oid, 'execute'))
         from pg_proc p join pg_namespace n on n.oid = p.pronamespace
         where n.nspname = 'ledger' and p.prosecdef and to_regrole('daybook_ledger') is not null",
    )
    .fetch_one(&mut *connection)
    .await?;
    if append != Some(true) {
        lacks("daybook_ledger", "append to the log".to_owned());
    }
    Ok(findings)
}

/// What stands between the log and whoever would change it.
pub(super) async fn append_only(server: Server) -> anyhow::Result<Findings> {
    const CHECK: &str = "append-only";
    let mut connection = server.connect().await?;
    let mut findings = Vec::new();
    let schema: bool =
        sqlx::query_scalar("select to_regclass('ledger.events') is not null").fetch_one(&mut connection).await?;
    if !schema {
        return Ok(vec![Finding::not_looked_at(CHECK, "there is no log")]);
    }

    // A trigger that refuses, before each statement that would change something; for the owner too.
    let rows = sqlx::query(
        "select wanted, exists (
             select from pg_trigger t
             where t.tgrelid = to_regclass('ledger.' || wanted) and t.tgenabled in ('O', 'A') and t.tgtype & 58 = 58
               and t.tgtype & 1 = 0 and t.tgqual is null and t.tgfoid = to_regproc('ledger.refuse_change')
         ) as guarded
         from unnest($1::text[]) wanted", // 58: before, delete, update, truncate; 1: for each row
    );
    for row in rows.bind(LOG.as_slice()).fetch_all(&mut connection).await? {
        if !row.try_get::<bool, _>("guarded")? {
            let table: String = row.try_get("wanted")?;
            findings.push(Finding::wrong(
                CHECK,
                format!("no trigger refuses changes of ledger.{table}"),
                &format!("Do `alter table ledger.{table} enable trigger all`, and run `daybook audit`: it may have been changed."),
            ));
        }
    }
    let disabled: Option<String> = sqlx::query_scalar(
        "select string_agg(distinct c.relname::text, ', ') from pg_trigger t
         join pg_class c on c.oid = t.tgrelid join pg_namespace n on n.oid = c.relnamespace
         where n.nspname = 'ledger' and t.tgisinternal and t.tgenabled not in ('O', 'A')",
    )
    .fetch_one(&mut connection)
    .await?;
    if let Some(tables) = disabled {
        findings.push(Finding::wrong(
            CHECK,
            format!("foreign keys are not enforced on ledger.{tables}"),
            "Do `alter table … enable trigger all`, and run `daybook audit`.",
        ));
    }

    // Functions as the migrations have made them: replacing one needs no trigger to be disabled.
    let texts: String = MIGRATOR.iter().map(|migration| migration.sql.as_ref()).collect();
    let rows = sqlx::query(
        "select p.proname::text as name, p.prosrc as body from pg_proc p join pg_namespace n on n.oid = p.pronamespace
         where n.nspname = 'ledger' order by 1",
    );
    for row in rows.fetch_all(&mut connection).await? {
        let (name, body): (String, String) = (row.try_get("name")?, row.try_get("body")?);
        if !texts.contains(&body) {
            findings.push(Finding::wrong(
                CHECK,
                format!("the function ledger.{name} is not as a migration has made it"),
                "Make it anew from the migration's text, and run `daybook audit`.",
            ));
        }
    }

    // Whoever else may write, by any path: grants, memberships, predefined roles, owning.
    let rows = sqlx::query(
        "select r.rolname::text as role, string_agg(c.relname::text, ', ' order by c.relname) as tables
         from pg_class c join pg_namespace n on n.oid = c.relnamespace cross join pg_roles r
         where n.nspname = 'ledger' and c.relname = any($1) and not r.rolsuper and r.oid <> c.relowner
           and r.rolname not like 'pg\\_%'
           and has_table_privilege(r.oid, c.oid, 'insert, update, delete, truncate, trigger')
         group by 1 order by 1",
    );
    for row in rows.bind(LOG.as_slice()).fetch_all(&mut connection).await? {
        let (role, tables): (String, String) = (row.try_get("role")?, row.try_get("tables")?);
        findings.push(Finding::wrong(
            CHECK,
            format!("{role} may change ledger.{tables}"),
            &format!("Take from {role} what gives it that: grants, or memberships (`\\du {role}` in psql)."),
        ));
    }
    let owner: Option<String> = sqlx::query_scalar(
        "select string_agg(distinct pg_get_userbyid(c.relowner)::text, ', ')
         from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where n.nspname = 'ledger' and c.relkind in ('r', 'p') and pg_get_userbyid(c.relowner) like 'daybook\\_%'",
    )
    .fetch_one(&mut connection)
    .await?;
    if let Some(owner) = owner {
        findings.push(Finding::wrong(
            CHECK,
            format!("{owner} owns tables of the log, so it can take the triggers away"),
            "Give them to the user that migrates: `alter table … owner to …`.",
        ));
    }

    let broken: Option<String> = sqlx::query_scalar(
        "select string_agg(name, ', ') from (
             select i.indexrelid::regclass::text as name from pg_index i join pg_class c on c.oid = i.indrelid
             join pg_namespace n on n.oid = c.relnamespace
             where n.nspname = any($1) and not (i.indisvalid and i.indisready)
             union all
             select conname::text from pg_constraint k join pg_namespace n on n.oid = k.connamespace
             where n.nspname = any($1) and not k.convalidated
         ) broken",
    )
    .bind(ROOMS.iter().map(|(schema, _)| *schema).collect::<Vec<_>>())
    .fetch_one(&mut connection)
    .await
    .context("indexes and constraints")?;
    if let Some(names) = broken {
        findings.push(Finding::wrong(
            "constraints",
            format!("not in force: {names}"),
            "Do `reindex index …` or `alter table … validate constraint …`.",
        ));
    }
    for (column, indexes, what) in [
        ("key_hash", 1, "no unique index on the keys of ledger.events: a repeated key could move money twice"),
        ("aggregate_id", 2, "no unique indexes on the streams of ledger.events: two events could take one place"),
    ] {
        let found: i64 = sqlx::query_scalar(
            "select count(*) from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any(i.indkey)
             where i.indrelid = to_regclass('ledger.events') and i.indisunique and i.indisvalid and a.attname = $1",
        )
        .bind(column)
        .fetch_one(&mut connection)
        .await?;
        if found < indexes {
            findings.push(Finding::wrong(
                "constraints",
                what,
                "Stop the services, and make the index again as in the migration.",
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(
            CHECK,
            "triggers, functions, foreign keys and indexes are as migrated; nobody else may change the log",
        ));
    }
    Ok(findings)
}
