//! The adversary at work: does to the system what the script says, and measures how it comes back.

use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::check::{Promise, Violation};
use crate::history::History;
use crate::receiver::Receiver;
use crate::script::{Fault, Server};
use crate::system::{Connection, Service, System};
use crate::wire::{Fate, Held, Moment, Part};
use crate::workload::World;

/// How long a moment is waited for. One that does not come is reported; the fault happens all the same.
const MOMENT_TIME: Duration = Duration::from_secs(10);

/// Within this time after a fault commands are acknowledged again, and views have caught up.
const RECOVERY_TIME: Duration = Duration::from_secs(60);

/// A fault that was done, and what came after it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Done {
    pub fault: String,
    /// Whether the moment came at which it was to happen.
    pub at_its_moment: bool,
    pub kills: u32,
    /// From the fault's end to the first acknowledgement of a command that was sent after it.
    pub acknowledged_ms: u64,
    /// And until the views showed everything that was in the log.
    pub views_ms: u64,
}

pub(crate) struct Adversary<'a> {
    pub(crate) system: &'a System,
    pub(crate) receiver: &'a Receiver,
    pub(crate) history: &'a History,
    pub(crate) world: &'a World,
    pub(crate) connection: &'a watch::Sender<Connection>,
}

impl Adversary<'_> {
    /// Does it and waits until the system is itself again; `Err` of `Err`: the run cannot go on.
    pub(crate) async fn act(&self, fault: &Fault) -> anyhow::Result<Result<Done, Violation>> {
        let at_its_moment = self.inflict(fault).await.with_context(|| fault.to_string())?;
        let end = Instant::now();
        let acknowledged = self.recovered(self.history.acknowledged_after(end), end).await?;
        let views = match acknowledged {
            Some(_) => self.recovered(self.views_are_level(), end).await?,
            None => None,
        };
        let not_recovered = |what: &str| Violation {
            promise: Promise::Recovery,
            what: format!("{fault}: {what} within {RECOVERY_TIME:?}"),
        };
        Ok(match (acknowledged, views) {
            (None, _) => Err(not_recovered("no command was acknowledged")),
            (_, None) => Err(not_recovered("the views have not caught up")),
            (Some(acknowledged_ms), Some(views_ms)) => {
                Ok(Done { fault: fault.to_string(), at_its_moment, kills: fault.kills(), acknowledged_ms, views_ms })
            }
        })
    }

    /// Returns when nothing is in the system's way any more. Whether the moment came.
    async fn inflict(&self, fault: &Fault) -> anyhow::Result<bool> {
        match fault {
            Fault::Kill { again_after_ms } => {
                self.system.daybook.kill().await?;
                if let Some(ms) = again_after_ms {
                    self.system.daybook.spawn().await?;
                    sleep(Duration::from_millis(*ms)).await;
                    self.system.daybook.kill().await?;
                }
                self.system.daybook.spawn().await?;
                Ok(true)
            }
            Fault::KillAt { moment, arrives_late } => {
                let held = self.catch(*moment).await?;
                self.system.daybook.kill().await?;
                let caught = held.is_some();
                if let Some(held) = held {
                    if *arrives_late {
                        self.system.daybook.spawn().await?;
                        self.ready().await?;
                        held.release(Fate::Forward);
                        return Ok(caught);
                    }
                    held.release(Fate::Cut);
                }
                self.system.daybook.spawn().await?;
                Ok(caught)
            }
            Fault::KillWhileDelivering => {
                let held = self.without(Some(Service::Dispatcher), self.receiver.catch(MOMENT_TIME)).await?;
                self.system.daybook.kill().await?;
                self.system.daybook.spawn().await?;
                Ok(held.is_some())
            }
            Fault::KillBeforeCallback => {
                let accepted = timeout(MOMENT_TIME, self.world.payment_with_a_late_callback()).await.is_ok();
                self.system.daybook.kill().await?;
                self.system.daybook.spawn().await?;
                Ok(accepted)
            }
            Fault::StopPostgres { down_ms } => {
                self.stop_postgres(*down_ms).await?;
                Ok(true)
            }
            Fault::StopPostgresAt { moment, down_ms } => {
                let held = self.catch(*moment).await?;
                self.stop_postgres(*down_ms).await?;
                let caught = held.is_some();
                if let Some(held) = held {
                    held.release(Fate::Cut);
                }
                Ok(caught)
            }
            Fault::KillNats { down_ms } => {
                self.system.stack.kill_nats().await?;
                sleep(Duration::from_millis(*down_ms)).await;
                self.system.stack.start_nats().await?;
                Ok(true)
            }
            Fault::WipeNats => {
                self.system.wipe_nats().await?;
                Ok(true)
            }
            Fault::CutAt { moment } => {
                let held = self.catch(*moment).await?;
                let caught = held.is_some();
                if let Some(held) = held {
                    held.release(Fate::Cut);
                }
                Ok(caught)
            }
            Fault::CutAll => {
                self.system.postgres.cut_all();
                self.system.nats.cut_all();
                Ok(true)
            }
            Fault::DelayAt { moment, ms } => {
                let held = self.catch(*moment).await?;
                sleep(Duration::from_millis(*ms)).await;
                let caught = held.is_some();
                if let Some(held) = held {
                    held.release(Fate::Forward);
                }
                Ok(caught)
            }
            Fault::Hole { server, direction, ms, fate } => {
                let wire = match server {
                    Server::Postgres => &self.system.postgres,
                    Server::Nats => &self.system.nats,
                };
                wire.close(*direction);
                sleep(Duration::from_millis(*ms)).await;
                wire.open(*fate);
                Ok(true)
            }
            Fault::PauseSecond { service, ms } => {
                let process = self.system.second(*service)?;
                process.pause().await?;
                sleep(Duration::from_millis(*ms)).await;
                process.go_on().await?;
                Ok(true)
            }
            Fault::KillSecond { service } => {
                let process = self.system.second(*service)?;
                process.kill().await?;
                process.spawn().await?;
                self.system.until_second_listens(*service).await?;
                Ok(true)
            }
            Fault::Pause { ms } => {
                self.system.daybook.pause().await?;
                sleep(Duration::from_millis(*ms)).await;
                self.system.daybook.go_on().await?;
                Ok(true)
            }
        }
    }

    async fn stop_postgres(&self, down_ms: u64) -> anyhow::Result<()> {
        self.system.stack.kill_postgres().await?;
        sleep(Duration::from_millis(down_ms)).await;
        Ok(self.system.stack.start_postgres().await?)
    }

    /// The next message at a moment of the first process. A second service that shares its work could take all of it,
    /// so that one rests meanwhile.
    async fn catch(&self, moment: Moment) -> anyhow::Result<Option<Held>> {
        let (wire, rival) = match moment.part {
            Part::Relay => (&self.system.nats, Some(Service::Relay)),
            Part::Projector => (&self.system.postgres, Some(Service::Projector)),
            Part::Webhooks => (&self.system.postgres, Some(Service::Dispatcher)),
            Part::Engine | Part::Workflows | Part::Other => (&self.system.postgres, None),
        };
        self.without(rival, wire.catch(moment, MOMENT_TIME)).await
    }

    async fn without<T>(&self, rival: Option<Service>, work: impl Future<Output = T>) -> anyhow::Result<T> {
        let Some(rival) = rival else { return Ok(work.await) };
        let rival = self.system.second(rival)?;
        rival.pause().await?;
        let done = work.await;
        rival.go_on().await?;
        Ok(done)
    }

    /// How long after `end` it was so, if it ever was. Meanwhile a process that ends by itself is started again.
    async fn recovered(&self, so: impl Future<Output = ()>, end: Instant) -> anyhow::Result<Option<u64>> {
        let mut so = std::pin::pin!(so);
        while end.elapsed() < RECOVERY_TIME {
            self.ready().await?;
            if timeout(Duration::from_millis(250), &mut so).await.is_ok() {
                return Ok(Some(u64::try_from(end.elapsed().as_millis()).unwrap_or(u64::MAX)));
            }
        }
        Ok(None)
    }

    async fn ready(&self) -> anyhow::Result<()> {
        self.system.revive().await?;
        let connection = self.system.ready().await?;
        self.connection.send_replace(connection);
        Ok(())
    }

    /// Everything that is in the log now is shown.
    async fn views_are_level(&self) {
        let mut head = None;
        loop {
            let route = match head {
                None => "/v1/head".to_owned(),
                Some(head) => format!("/v1/wallets?limit=1&minPosition={head}&waitMs=1000"),
            };
            match self.world.get(true, &route, Duration::from_secs(5)).await {
                Ok((answer, _)) if answer.status == 200 && head.is_some() => return,
                Ok((answer, body)) if answer.status == 200 => head = body["position"].as_i64(),
                _ => sleep(Duration::from_millis(50)).await,
            }
        }
    }
}
