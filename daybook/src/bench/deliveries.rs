//! Webhooks that a receiver on this machine takes: one endpoint, and a hundred, with a backlog in front of them.
//!
//! Transfers are made in batches, 4,000 deliveries for each second of the run; what counts is what `webhooks.deliveries`
//! calls delivered when the time is over, or all is delivered. The batches, and turning events into deliveries, are in
//! it. A partner has at most fifty endpoints, so the hundred are of two. All of them are one host and port, which
//! connections are kept to; the receiver answers at once and checks nothing. The views' lag is watched while the batches
//! are made.
//!
//! Left out: latencies. What comes out of a backlog has waited for all that was before it, so the time from an event to
//! its arrival would only tell how long the backlog has lasted. Slow and failing receivers, signatures at the receiver.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use sqlx::{Connection, PgConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::figures::{Figure, Parts};
use super::load::{Answer, Extent, Load, Pace};
use super::machine::Meter;
use super::random::Random;
use super::server::{Partner, Server};
use super::{Run, lag};

/// Partners, and the endpoints of each.
const SHAPES: [(usize, usize); 2] = [(1, 1), (2, 50)];

pub(crate) const MEASUREMENTS: u64 = SHAPES.len() as u64;

const WALLETS: u64 = 100;

/// So many are there to be delivered in a second.
const PER_SECOND: u64 = 4_000;

/// Of a transfer, to each endpoint of its partner: that it was created, and that it is completed.
const NOTICES: u64 = 2;

/// Transfers in a request.
const BATCH: usize = 100;

pub(crate) async fn run(run: &Run<'_>, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let server = Server::start(Parts::EverythingOn, WALLETS, run.steps).await?;
    for (partners, each) in SHAPES {
        let endpoints = partners * each;
        let receiver = Receiver::start().await?;
        let mut registered = Vec::new();
        for number in 0..partners {
            let partner = server.register_partner(&format!("{endpoints}-{number}"), WALLETS, run.steps)?;
            for endpoint in 0..each {
                let url = format!("{}/{endpoint}", receiver.url);
                server.register_webhook(&partner, &url, &format!("webhook-{endpoints}-{number}-{endpoint}"))?;
            }
            registered.push(partner);
        }
        run.steps.begin(format!("deliveries: {endpoints} endpoints"));
        figures.push(measure(run, &server, &registered, endpoints, &receiver).await?);
        // The others shall not wait behind what is left over.
        disable(&server.database_url).await?;
    }
    server.stop().await
}

async fn measure(
    run: &Run<'_>,
    server: &Server,
    partners: &[Partner],
    endpoints: usize,
    receiver: &Receiver,
) -> anyhow::Result<Figure> {
    let url = &server.database_url;
    lag::until_level(url).await?; // with what opened and funded the wallets
    let before = delivered(url).await?;
    let watch = lag::Watch::start(url);
    let meter = Meter::start(server.pid(), url).await?;
    let begun = Instant::now();
    let each = NOTICES * u64::try_from(endpoints / partners.len())?;
    let batches = (PER_SECOND * run.time.as_secs() / each).div_ceil(u64::try_from(BATCH)?).max(1);
    let mut random = Random::new(run.seed);
    let mut failure = None;
    let load = Load { address: server.address, connections: 2, pace: Pace::Closed, extent: Extent::Count(batches) };
    let write = |number: u64, out: &mut Vec<u8>| {
        let partner = &partners[usize::try_from(number).expect("counted") % partners.len()];
        server.batch(partner, BATCH, format_args!("deliveries-{endpoints}-{number}"), &mut random, out);
    };
    let take = |answer: Answer<'_>| {
        if answer.status != Some(201) {
            failure = Some(answer.status);
        }
    };
    tokio::task::block_in_place(|| load.run(write, take))?;
    if let Some(status) = failure {
        bail!("a batch was answered {status:?}");
    }
    let transfers = batches * u64::try_from(BATCH)?;
    let all = transfers * each;
    let drained = async {
        while begun.elapsed() < run.time
            && (receiver.taken.load(Ordering::Relaxed) < all || delivered(url).await? - before < all)
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let done = delivered(url).await? - before;
        let took = begun.elapsed();
        anyhow::Ok((done, took, meter.stop(done).await?))
    };
    // The last batch is answered: until the views are level, deliveries go on.
    let (lag, (done, took, used)) = tokio::try_join!(watch.stop(), drained)?;
    let variant = format!("{endpoints} endpoint{}", if endpoints == 1 { "" } else { "s" });
    let mut figure = Figure::new("deliveries", Parts::EverythingOn, variant, done, took);
    figure.used = Some(used);
    figure.lag = Some(lag);
    figure.notes.push(format!("of {all} due, from {transfers} transfers; over in {:.2} s", took.as_secs_f64()));
    figure.notes.push("no latencies: out of a backlog they only tell how long it has lasted".to_owned());
    Ok(figure)
}

async fn delivered(database_url: &str) -> anyhow::Result<u64> {
    let mut connection = PgConnection::connect(database_url).await?;
    let count: i64 = sqlx::query_scalar("select count(*) from webhooks.deliveries where status = 'DELIVERED'")
        .fetch_one(&mut connection)
        .await?;
    connection.close().await?;
    Ok(u64::try_from(count)?)
}

/// As if each had been disabled by its partner, but all at once.
async fn disable(database_url: &str) -> anyhow::Result<()> {
    let mut connection = PgConnection::connect(database_url).await?;
    sqlx::query("update webhooks.endpoints set status = 'DISABLED', disabled_reason = 'requested'")
        .execute(&mut connection)
        .await?;
    connection.close().await?;
    Ok(())
}

/// Takes whatever is posted, on a thread of its own.
struct Receiver {
    url: String,
    taken: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
}

impl Receiver {
    async fn start() -> anyhow::Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let url = format!("http://{}", listener.local_addr()?);
        let (taken, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, stop) = (taken.clone(), over.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::spawn(move || {
            runtime.block_on(async move {
                let Ok(listener) = TcpListener::from_std(listener) else { return };
                while !stop.load(Ordering::Relaxed) {
                    let next = tokio::time::timeout(Duration::from_millis(100), listener.accept()).await;
                    if let Ok(Ok((stream, _))) = next {
                        tokio::spawn(take(stream, count.clone()));
                    }
                }
            });
        });
        Ok(Self { url, taken, over })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Answers each request of a connection as soon as it is whole.
async fn take(mut stream: TcpStream, taken: Arc<AtomicU64>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut bytes = Vec::with_capacity(8 * 1024);
    while stream.read_buf(&mut bytes).await? != 0 {
        while let Some(length) = whole(&bytes) {
            bytes.drain(..length);
            taken.fetch_add(1, Ordering::Relaxed);
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await?;
        }
    }
    Ok(())
}

/// The length of the first request, if all of it is there.
fn whole(bytes: &[u8]) -> Option<usize> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut request = httparse::Request::new(&mut headers);
    let Ok(httparse::Status::Complete(head)) = request.parse(bytes) else { return None };
    let length = request.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let length = length.map_or(Some(0), |header| std::str::from_utf8(header.value).ok()?.parse::<usize>().ok())?;
    (head + length <= bytes.len()).then_some(head + length)
}
