//! The script: which faults a run has, in which order. It follows from the seed alone.
//!
//! Left out: how each is done (`act.rs`).

use std::fmt;

use serde::Serialize;

use crate::random::Random;
use crate::system::Service;
use crate::wire::{Direction, Fate, Moment, Part, Request, When};

/// Something that goes wrong.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fault {
    /// kill -9 at any time; once more while it starts, if so.
    Kill {
        again_after_ms: Option<u64>,
    },
    /// kill -9 while a message is held. What was held is lost, or arrives when a new process is at work.
    KillAt {
        moment: Moment,
        arrives_late: bool,
    },
    /// kill -9 after the receiver has got a webhook and before it answers.
    KillWhileDelivering,
    /// kill -9 after the bank has accepted a payment and before it says so.
    KillBeforeCallback,
    /// An immediate stop of Postgres, as by a crash.
    StopPostgres {
        down_ms: u64,
    },
    /// The same when an append is in the log and its answer is not out.
    StopPostgresAt {
        moment: Moment,
        down_ms: u64,
    },
    KillNats {
        down_ms: u64,
    },
    WipeNats,
    CutAt {
        moment: Moment,
    },
    CutAll,
    DelayAt {
        moment: Moment,
        ms: u64,
    },
    /// Nothing gets through in one direction.
    Hole {
        server: Server,
        direction: Direction,
        ms: u64,
        fate: Fate,
    },
    /// SIGSTOP of the whole process. The second services go on.
    Pause {
        ms: u64,
    },
    /// SIGSTOP of one second service. The first process goes on.
    PauseSecond {
        service: Service,
        ms: u64,
    },
    KillSecond {
        service: Service,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    Postgres,
    Nats,
}

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Length {
    /// A few faults of each sort; which ones, the seed decides.
    Short,
    Minutes(u64),
}

/// What a fault takes with the calm around it: how many fit into a minute.
const FAULTS_PER_MINUTE: u64 = 8;

/// What a run of five minutes or more has at least.
const KILLS_MIN: u32 = 20;

/// A pause that outlasts the lease of a delivery, which is the longest there is.
const LONG_PAUSE_MS: u64 = 45_000;

pub(crate) fn script(seed: u64, length: Length) -> Vec<Fault> {
    let mut random = Random::of(seed, "faults");
    match length {
        Length::Short => short(&mut random),
        Length::Minutes(minutes) => {
            let wanted = usize::try_from(minutes * FAULTS_PER_MINUTE).unwrap_or(usize::MAX).max(1);
            let mut faults = Vec::new();
            while faults.len() < wanted {
                let (mut kills, mut others) = (kills(&mut random), others(&mut random));
                kills.append(&mut others);
                random.shuffle(&mut kills);
                faults.append(&mut kills);
            }
            faults.truncate(wanted);
            if 5 <= minutes {
                while faults.iter().map(Fault::kills).sum::<u32>() < KILLS_MIN {
                    faults.push(Fault::Kill { again_after_ms: None });
                }
                faults.push(Fault::Pause { ms: LONG_PAUSE_MS });
            }
            faults
        }
    }
}

/// Kills come first: what a dead process was delivering waits for the end of its lease, and meanwhile the rest happens.
fn short(random: &mut Random) -> Vec<Fault> {
    let (mut kills, mut others) = (kills(random), others(random));
    random.shuffle(&mut kills);
    random.shuffle(&mut others);
    kills.truncate(5);
    others.truncate(4);
    // A pause or a hole is as long as what it must outlast; one is enough here.
    kills.append(&mut others);
    kills
}

fn kills(random: &mut Random) -> Vec<Fault> {
    let before = |part, request| Moment { part, request, when: When::BeforeForwarding };
    let after = |part, request| Moment { part, request, when: When::BeforeAnswering };
    let at = |moment| Fault::KillAt { moment, arrives_late: false };
    let again_after_ms = Some(random.within(50, 1_500));
    vec![
        Fault::Kill { again_after_ms: None },
        Fault::Kill { again_after_ms },
        at(before(Part::Engine, Request::Append)),
        at(before(Part::Engine, Request::Commit)),
        Fault::KillAt { moment: before(Part::Engine, Request::Append), arrives_late: true },
        at(after(Part::Engine, Request::Append)),
        at(before(Part::Relay, Request::Publish)),
        at(after(Part::Relay, Request::Publish)),
        at(before(Part::Projector, Request::Commit)),
        Fault::KillAt { moment: before(Part::Projector, Request::Commit), arrives_late: true },
        at(after(Part::Projector, Request::Commit)),
        at(before(Part::Webhooks, Request::Record)),
        at(before(Part::Webhooks, Request::Commit)),
        at(before(Part::Workflows, Request::Commit)),
        at(after(Part::Workflows, Request::Commit)),
        Fault::KillWhileDelivering,
        Fault::KillBeforeCallback,
    ]
}

fn others(random: &mut Random) -> Vec<Fault> {
    let forwarded = |part, request| Fault::CutAt { moment: Moment { part, request, when: When::Forwarded } };
    let append = |when| Moment { part: Part::Engine, request: Request::Append, when };
    let mut hole = |server, direction| {
        let fate = *random.pick(&[Fate::Forward, Fate::Cut]);
        Fault::Hole { server, direction, ms: random.within(3_000, 13_000), fate }
    };
    let mut faults = vec![
        hole(Server::Postgres, Direction::ToServer),
        hole(Server::Postgres, Direction::FromServer),
        hole(Server::Nats, Direction::ToServer),
        hole(Server::Nats, Direction::FromServer),
    ];
    faults.append(&mut vec![
        Fault::StopPostgres { down_ms: random.within(0, 4_000) },
        Fault::StopPostgresAt { moment: append(When::BeforeAnswering), down_ms: random.within(0, 2_000) },
        Fault::KillNats { down_ms: random.within(0, 4_000) },
        Fault::WipeNats,
        Fault::CutAt { moment: append(When::BeforeForwarding) },
        forwarded(Part::Engine, Request::Append),
        forwarded(Part::Engine, Request::Commit),
        Fault::CutAt { moment: append(When::BeforeAnswering) },
        forwarded(Part::Projector, Request::Commit),
        forwarded(Part::Webhooks, Request::Commit),
        forwarded(Part::Workflows, Request::Commit),
        forwarded(Part::Relay, Request::Publish),
        Fault::CutAll,
        Fault::DelayAt { moment: append(When::BeforeForwarding), ms: random.within(6_000, 13_000) },
        Fault::DelayAt { moment: append(When::BeforeAnswering), ms: random.within(6_000, 13_000) },
        Fault::Pause { ms: random.within(4_000, 9_000) },
        Fault::KillSecond { service: *random.pick(&Service::ALL) },
    ]);
    faults.extend(Service::ALL.map(|service| Fault::PauseSecond { service, ms: random.within(4_000, 9_000) }));
    faults
}

impl Fault {
    pub(crate) fn kills(&self) -> u32 {
        match self {
            Self::Kill { again_after_ms: Some(_) } => 2,
            Self::Kill { .. } | Self::KillAt { .. } | Self::KillWhileDelivering | Self::KillBeforeCallback => 1,
            _ => 0,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill { again_after_ms: None } => write!(f, "kill -9"),
            Self::Kill { again_after_ms: Some(ms) } => write!(f, "kill -9, and again {ms} ms into the next start"),
            Self::KillAt { moment, arrives_late: false } => write!(f, "kill -9 {moment}"),
            Self::KillAt { moment, arrives_late: true } => {
                write!(f, "kill -9 {moment}, which arrives after the restart")
            }
            Self::KillWhileDelivering => write!(f, "kill -9 after a webhook was received and before it is answered"),
            Self::KillBeforeCallback => write!(f, "kill -9 between the bank's acceptance and its callback"),
            Self::StopPostgres { down_ms } => write!(f, "Postgres stopped immediately, for {down_ms} ms"),
            Self::StopPostgresAt { moment, down_ms } => {
                write!(f, "Postgres stopped immediately {moment}, for {down_ms} ms")
            }
            Self::KillNats { down_ms } => write!(f, "nats-server killed, for {down_ms} ms"),
            Self::WipeNats => write!(f, "nats-server killed and its data wiped"),
            Self::CutAt { moment } => write!(f, "connection cut {moment}"),
            Self::CutAll => write!(f, "every connection to both servers cut"),
            Self::DelayAt { moment, ms } => write!(f, "held for {ms} ms {moment}"),
            Self::Hole { server, direction, ms, fate } => {
                let direction = match direction {
                    Direction::ToServer => "to",
                    Direction::FromServer => "from",
                };
                let fate = match fate {
                    Fate::Forward => "then everything comes late",
                    Fate::Cut => "then all that waited is lost",
                };
                write!(f, "nothing gets {direction} {server:?} for {ms} ms, {fate}")
            }
            Self::Pause { ms } => write!(f, "SIGSTOP for {ms} ms"),
            Self::PauseSecond { service, ms } => write!(f, "SIGSTOP of the second {} for {ms} ms", service.program()),
            Self::KillSecond { service } => write!(f, "kill -9 of the second {}", service.program()),
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = match self.part {
            Part::Engine => "the engine",
            Part::Projector => "the projector",
            Part::Webhooks => "the webhook-dispatcher",
            Part::Workflows => "the workflows",
            Part::Relay => "the relay",
            Part::Other => "others",
        };
        let request = match self.request {
            Request::Append => "append",
            Request::Commit => "commit",
            Request::Record => "record of an attempt",
            Request::Publish => "publish",
        };
        match self.when {
            When::BeforeForwarding => write!(f, "before the {request} of {part}"),
            When::Forwarded => write!(f, "in the middle of the {request} of {part}"),
            When::BeforeAnswering => write!(f, "after the {request} of {part} and before its answer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_follows_from_its_seed() {
        assert_eq!(script(7, Length::Minutes(5)), script(7, Length::Minutes(5)));
        assert_ne!(script(7, Length::Minutes(5)), script(8, Length::Minutes(5)));
        assert_eq!(script(7, Length::Short), script(7, Length::Short));
    }

    #[test]
    fn a_run_of_five_minutes_kills_at_least_twenty_times_whatever_its_seed() {
        for seed in 0..200 {
            let kills: u32 = script(seed, Length::Minutes(5)).iter().map(Fault::kills).sum();
            assert!(20 <= kills, "seed {seed}: {kills}");
        }
    }

    #[test]
    fn short_runs_come_to_every_fault_over_time() {
        let all: Vec<String> = {
            let mut random = Random::of(0, "faults");
            kills(&mut random).into_iter().chain(others(&mut random)).map(|fault| kind(&fault)).collect()
        };
        let seen: Vec<String> =
            (0..100).flat_map(|seed| script(seed, Length::Short)).map(|fault| kind(&fault)).collect();
        for kind in all {
            assert!(seen.contains(&kind), "{kind}");
        }
    }

    /// A fault without its numbers.
    fn kind(fault: &Fault) -> String {
        fault.to_string().chars().filter(|letter| !letter.is_ascii_digit()).collect()
    }
}
