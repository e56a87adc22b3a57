//! The yardstick: `pgbench`, TPC-B-like and prepared, on a Postgres with the same programs and settings as ours.
//!
//! One of its transactions updates three rows, inserts one and commits durably: what anyone would write who moved
//! money with SQL alone. Its rate is limited by the disk and the processor, and by its own locks when clients meet on
//! a branch: so it gets more branches than clients, and the best of three numbers of clients counts.
//!
//! Beside it the time of a bare `insert` and `commit` on one connection: the least that one caller must wait.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use local_stack::Stack;
use sqlx::{Connection, PgConnection};

use super::Run;
use super::figures::{Figure, Latencies, Parts};
use super::floors::Yardstick;
use super::server::Directory;

/// Branches. With 64 clients at most, two seldom meet on one; the tables take 1.5 GB.
const SCALE: u32 = 100;

const CLIENTS: [u32; 3] = [8, 32, 64];

/// The bare commit, and each number of clients.
pub(crate) const MEASUREMENTS: u64 = 1 + CLIENTS.len() as u64;

/// What others are compared with; no rate without a `pgbench`.
pub(crate) async fn run(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<Yardstick> {
    run.steps.say("starting Postgres");
    let directory = Directory::new()?;
    let stack = Stack::start(directory.path(), local_stack::Options::default()).await?;
    run.steps.begin("a bare insert and commit");
    let mut bare = bare_commits(stack.database_url(), run.time.min(Duration::from_secs(5))).await?;
    let mut yardstick =
        Yardstick { per_second: None, bare_commit_millis: bare.latency.as_ref().map(|latency| latency.p50) };
    if stack.postgres_command("pgbench").is_none() {
        bare.notes.push("there is no pgbench beside this Postgres: no yardstick, and no ratios".to_owned());
        figures.push(bare);
        stack.stop().await?;
        return Ok(yardstick);
    }
    figures.push(bare);
    run.steps.say(format!("pgbench: filling its tables, scale {SCALE}"));
    pgbench(&stack, &["--initialize", "--quiet", &format!("--scale={SCALE}")]).await?;
    for clients in CLIENTS {
        run.steps.begin(format!("pgbench: {clients} clients"));
        let told = pgbench(
            &stack,
            &[
                "--protocol=prepared",
                "--no-vacuum",
                &format!("--client={clients}"),
                "--jobs=2",
                &format!("--time={}", run.time.as_secs()),
            ],
        )
        .await?;
        let rate = figure_after(&told, "tps = ").context("pgbench did not say its rate")?;
        let latency = figure_after(&told, "latency average = ").unwrap_or(0.0);
        let done = figure_after(&told, "number of transactions actually processed: ").unwrap_or(0.0);
        yardstick.per_second = Some(yardstick.per_second.map_or(rate, |best| best.max(rate)));
        let variant = format!("pgbench, {clients} clients");
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pgbench counts in whole numbers")]
        let mut figure = Figure::new("yardstick", Parts::Postgres, variant, done as u64, run.time);
        figure.per_second = rate;
        figure.notes.push(format!("average latency {latency} ms; scale {SCALE}, prepared"));
        figures.push(figure);
    }
    stack.stop().await?;
    Ok(yardstick)
}

/// One connection that inserts a row and commits, again and again.
async fn bare_commits(database_url: &str, time: Duration) -> anyhow::Result<Figure> {
    let mut connection = PgConnection::connect(database_url).await?;
    sqlx::query("create table bench_bare (id bigint generated always as identity, text text)")
        .execute(&mut connection)
        .await?;
    let mut latencies = Latencies::new();
    let begun = Instant::now();
    while begun.elapsed() < time {
        let sent = Instant::now();
        sqlx::query("insert into bench_bare (text) values ($1)").bind("a row").execute(&mut connection).await?;
        latencies.record(sent.elapsed());
    }
    let took = begun.elapsed();
    connection.close().await?;
    let mut figure = Figure::new("yardstick", Parts::Postgres, "bare insert and commit", latencies.count(), took);
    figure.latency = latencies.summary();
    Ok(figure)
}

async fn pgbench(stack: &Stack, arguments: &[&str]) -> anyhow::Result<String> {
    let url = url::Url::parse(stack.database_url())?;
    let mut command = stack.postgres_command("pgbench").context("there is no pgbench")?;
    command
        .args(arguments)
        .arg(url.path().trim_start_matches('/'))
        .env("PGHOST", url.host_str().unwrap_or("127.0.0.1"))
        .env("PGPORT", url.port().unwrap_or(5432).to_string())
        .env("PGUSER", url.username())
        .env("PGPASSWORD", url.password().unwrap_or_default())
        .stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    if !output.status.success() {
        bail!("pgbench ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The number that follows a text: `tps = 1234.5 (without …)`.
fn figure_after(told: &str, text: &str) -> Option<f64> {
    let rest = told.split_once(text)?.1;
    rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_the_number_that_follows_its_name() {
        let told = "latency average = 4.321 ms\ntps = 1851.234567 (without initial connection time)\n";
        assert_eq!(figure_after(told, "tps = "), Some(1851.234567));
        assert_eq!(figure_after(told, "latency average = "), Some(4.321));
        assert_eq!(figure_after(told, "number of failed transactions: "), None);
    }
}
