//! Memory of the process after a million single transfers over HTTP between a hundred thousand wallets.
//!
//! With everything on, the views' lag is watched meanwhile.

use anyhow::bail;

use super::figures::{Figure, Parts};
use super::floors::{Floor, Measure};
use super::http::run_load;
use super::keys::Keys;
use super::load::{Extent, Load, Pace};
use super::machine::{Meter, rss_mib};
use super::server::Server;
use super::{Run, check, lag};

pub(crate) const MEASUREMENTS: u64 = 1;

const WALLETS: u64 = 100_000;
const CONNECTIONS: usize = 256;
const RSS_MIB: f64 = 512.0;

pub(crate) async fn run(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let transfers = u64::try_from(run.events())?;
    let server = Server::start(run.parts, WALLETS, run.steps).await?;
    run.steps.begin(format!("memory: {transfers} transfers between {WALLETS} wallets, {}", run.parts));
    let url = &server.database_url;
    if run.parts == Parts::EverythingOn {
        lag::until_level(url).await?; // with what opened and funded the wallets
    }
    let position = check::head(url).await?;
    let before = rss_mib(server.pid());
    let watch = (run.parts == Parts::EverythingOn).then(|| lag::Watch::start(url));
    let meter = Meter::start(server.pid(), url).await?;
    let (pace, extent) = (Pace::Closed, Extent::Count(transfers));
    let load = Load { address: server.address, connections: CONNECTIONS, pace, extent };
    let (tally, sent) = run_load(&load, &server, 1, &Keys::new(run.keys), run.seed, |_| ())?;
    let used = meter.stop(transfers).await?;
    let lag = match watch {
        Some(watch) => Some(watch.stop().await?),
        None => None,
    };
    if tally.accepted.count() != transfers {
        bail!("not every transfer was granted: {}", tally.statuses());
    }
    check::in_log_since(url, position, check::POSTED, transfers).await?;
    let variant = format!("{transfers} over {WALLETS} wallets");
    let mut figure = Figure::new("memory", run.parts, variant, transfers, sent.took);
    figure.latency = tally.accepted.summary();
    figure.used = Some(used);
    figure.lag = lag;
    figure.floors.push(Floor::new(Measure::RssMib, RSS_MIB));
    figure.notes.push(format!("{before} MiB before, with all wallets opened and funded"));
    figures.push(figure);
    server.stop().await
}
