//! From the start of the process until `/readyz` says yes, with a log of a million and of five million events.
//!
//! *Engine alone*: the commands' service on a Postgres that runs. *Everything on*: `daybook up`, which starts Postgres
//! and NATS as well. Both after a clean end, and after `kill -9` in the middle of batches: then the snapshot is behind, and the
//! Postgres of `daybook up` has to end and start first. The views are level before each end.

use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::figures::{Figure, Parts};
use super::floors::{Floor, Measure};
use super::lag::until_level;
use super::load::{Extent, Load, Pace};
use super::machine::Used;
use super::random::Random;
use super::server::Server;
use super::{Run, check};

/// Of each size: after a clean end, and after a kill.
pub(crate) const MEASUREMENTS_EACH: u64 = 2;

/// Events in the log, and the time in seconds that a start may take after a clean end.
pub(crate) const SIZES: [i64; 2] = [1_000_000, 5_000_000];
const READY_SECONDS: [(i64, f64); 2] = [(1_000_000, 2.0), (5_000_000, 4.0)];

/// Under load before a kill.
const BEFORE_KILL: Duration = Duration::from_secs(2);

pub(crate) async fn run(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let mut server = Server::start(Parts::EngineAlone, run.wallets, run.steps).await?;
    let sizes = if run.events.is_empty() { &SIZES } else { run.events };
    for (number, size) in sizes.iter().enumerate() {
        if 0 < number && run.parts == Parts::EverythingOn {
            server.end().await?;
            server.start_again(Parts::EngineAlone).await?;
        }
        run.steps.say(format!("making a log of {size} events"));
        server.fill(*size, run.seed).await?;
        if run.parts == Parts::EverythingOn {
            server.end().await?;
            server.start_again(run.parts).await?;
            run.steps.say("waiting until the views are level");
            until_level(&server.database_url).await?;
        }

        run.steps.begin(format!("start: {size} events, a clean end, {}", run.parts));
        server.end().await?;
        let took = server.start_again(run.parts).await?;
        let mut figure = figure(run, &server, "a clean end", took).await?;
        let floor = READY_SECONDS.iter().find(|(events, _)| events == size);
        figure.floors.extend(floor.map(|(_, bound)| Floor::of(Measure::ReadySeconds, *bound, took.as_secs_f64())));
        figures.push(figure);

        run.steps.begin(format!("start: {size} events, kill -9, {}", run.parts));
        kill_under_load(&mut server, run.seed + 1)?;
        let took = server.start_again(run.parts).await?;
        figures.push(self::figure(run, &server, "kill -9", took).await?);
    }
    server.stop().await
}

async fn figure(run: &Run<'_>, server: &Server, after: &str, took: Duration) -> anyhow::Result<Figure> {
    let used = Used::since_start(server.pid(), took);
    let events = u64::try_from(check::head(&server.database_url).await?)?;
    let variant = format!("{events} events, {after}");
    let mut figure = Figure::new("start", run.parts, variant, events, took);
    figure.per_second = 0.0;
    figure.notes.push(format!("ready after {:.2} s", took.as_secs_f64()));
    figure.used = Some(used);
    Ok(figure)
}

/// Whatever is under way is cut off; the load finds nobody to connect to any more, and ends.
fn kill_under_load(server: &mut Server, seed: u64) -> anyhow::Result<()> {
    let pid = server.pid();
    let killer = thread::spawn(move || {
        thread::sleep(BEFORE_KILL);
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    });
    let mut random = Random::new(seed);
    let (pace, extent) = (Pace::Closed, Extent::Time(BEFORE_KILL * 2));
    let load = Load { address: server.address, connections: 3, pace, extent };
    let name = format!("killed-{pid}");
    let write = |number, out: &mut Vec<u8>| {
        server.batch(&server.partner, 1000, format_args!("{name}-{number}"), &mut random, out)
    };
    let ended = tokio::task::block_in_place(|| load.run(write, |_| ()));
    killer.join().map_err(|_| anyhow::anyhow!("the thread that kills panicked"))?;
    anyhow::ensure!(ended.is_err(), "the server outlived its kill");
    server.kill()
}
