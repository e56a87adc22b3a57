//! The one task that decides.
//!
//! While one batch is being appended, the next one is decided upon it, and sent after it over a second connection if it
//! is worth a commit of its own; a third is decided meanwhile. When an append ends, its callers are answered and the next
//! batch goes, a small one after a moment in which more may come. A command that needs what is not in memory waits aside until
//! that is read, and holds nobody up.
//!
//! Every failure of an append is sorted into one of: lost to another engine, a key that was used before the memory of
//! this process, refused (nothing happened, say so), not done (try again for a while, then say so), unknown (send the
//! identical commit until its fate is known, whatever else goes wrong). After any of them the book is taken back to
//! what the log has, and the commands are decided again with the turn to append held, when nobody can come between.

#![expect(clippy::vec_box, reason = "jobs are large, and change hands often")]

use std::collections::VecDeque;
use std::future::{poll_fn, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use event_store::{
    AppendError, Commit, EventRow, Head, Log, Recent, SnapshotError, Snapshots, StoreError, Writer, within,
};
use ledger_core::{Book, Missing, Timestamp};
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::batch::{Batch, Closed};
use crate::keys::{KeyUse, RecentKeys, usage};
use crate::ledger::{CommandError, EngineError, Job, Pace, Settings};
use crate::load::{Found, load};
use crate::metrics::{Append, Doing, METRICS, Running};

/// How many events are read from the log at a time.
const PAGE: i64 = 2_000;

/// So many events in a page say that there are many more: those are read before the turn to append is taken.
const FAR_BEHIND: i64 = PAGE / 2;

/// Between attempts to reach a database that is away: doubled up to the second figure.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// After a key from before this process' memory, the keys of so many batches are looked up before they are decided. One
/// such key costs a whole append; a flood of them would halve what everyone else gets.
const WARY_BATCHES: u32 = 64;

/// How often a command may be sent to wait for what it lacks. Once is enough, unless a snapshot ends in between.
const LOADS_MAX: u32 = 8;

/// How often one group may meet keys that the log knows. Once is enough, unless the turn is lost in between.
const KEYS_TAKEN_MAX: u32 = 3;

/// Batches that may be on their way at once.
const SENT_MAX: usize = 2;

/// Decisions, about, after which it is looked whether an append has ended.
const AT_A_TIME: usize = 32;

/// How long a batch may take to fail once the one that it follows has failed. It cannot come in any more; but as long as
/// the server is at it, its keys are in the way.
const FAILING: Duration = Duration::from_secs(1);

/// How long one page of the log may take to be read.
const READING: Duration = Duration::from_secs(30);

/// Events of a replay after which a snapshot is written: what one that is broken off is repeated for, at most. Writing takes
/// longer than folding, and what is written is soon changed again.
const REPLAYED_MAX: i64 = 4_000_000;

/// With fewer commands at a time, nobody waits for others.
const COMPANY_MIN: usize = 6;

/// Between attempts to write a snapshot.
const SNAPSHOT_PAUSE: Duration = Duration::from_secs(2);

pub(crate) struct Engine {
    /// Those that are not appending.
    writers: Vec<Writer>,
    log: Log,
    snapshots: Snapshots,
    /// For those who follow the log in this process, if there are any.
    recent: Option<Recent>,
    settings: Settings,
    pace: Pace,
    /// How many things the book holds, for those who watch.
    in_memory: Arc<AtomicUsize>,
    book: Book,
    keys: RecentKeys,
    /// What the log is known to end with.
    head: Head,
    /// The batches that are being appended, each with the head that it makes: the second was decided upon the first.
    sent: VecDeque<Sent>,
    /// When the last append ended.
    appended_at: Instant,
    /// When a batch was last sent.
    begun_at: Instant,
    /// Commands that were here when the last append ended, in it and decided behind it: about so many may come again.
    expected: usize,
    /// Whether there may be more commands: there are handles left.
    more: bool,
    /// When the log was last looked at for want of anything to do.
    looked_at: Instant,
    /// The batch that is being decided, upon the one before it.
    open: Option<Batch>,
    /// Commands that wait for what they lack.
    cold: Vec<Box<Job>>,
    loading: Option<JoinHandle<Loaded>>,
    /// Since when the oldest of the commands that are loaded for waits.
    loading_since: Option<std::time::Instant>,
    /// Another engine appends as well: commands are decided with the turn held, or the work would be for nothing.
    contended: bool,
    gathered: Vec<Box<Job>>,
    /// Batches whose keys are still looked up beforehand.
    wary: u32,
    snapshot: Snapshot,
}

struct Sent {
    closed: Closed,
    head: Head,
    at: Instant,
    /// Whether it was sent before the one that it follows was through: then it may have come too early.
    ahead: bool,
    append: JoinHandle<Ended>,
}

type Ended = (Writer, Commit, Result<(), Again>);

struct Loaded {
    jobs: Vec<Box<Job>>,
    generation: u64,
    found: Result<Found, EngineError>,
}

struct Snapshot {
    /// The log's position up to which this book's changes are in the snapshot.
    position: i64,
    not_before: Instant,
    writing: Option<JoinHandle<(i64, Result<bool, SnapshotError>)>>,
    /// When the attempt under way began.
    begun: Option<Instant>,
    /// Whether it leaves the server to others half of the time.
    rests: Arc<AtomicBool>,
}

impl Snapshot {
    /// Whether the next attempt to write it must not wait for the next command.
    fn is_wanted(&self, commands_wait: bool) -> bool {
        commands_wait && self.writing.is_none() && Instant::now() < self.not_before
    }
}

impl Engine {
    /// Begins with the snapshot, and folds in what the log says since.
    pub(crate) async fn start(
        mut writer: Writer,
        log: Log,
        settings: Settings,
        pace: Pace,
        in_memory: Arc<AtomicUsize>,
    ) -> Result<Self, EngineError> {
        let begun = Instant::now();
        let snapshots = Snapshots::beside(&log);
        let second = writer.another();
        let snapshot = snapshots.head().await?;
        let begin = writer.head_at(snapshot.map_or(0, |snapshot| snapshot.commit)).await?;
        let head = begin.filter(|head| snapshot.is_none_or(|snapshot| snapshot.chain == head.chain));
        let head = head.ok_or(EngineError::Snapshot)?;
        let mut engine = Self {
            writers: vec![second, writer],
            log,
            snapshots,
            recent: settings.keep_recent.then(Recent::default),
            pace,
            in_memory,
            book: Book::default(),
            keys: RecentKeys::new(settings.keys_max),
            head,
            sent: VecDeque::with_capacity(SENT_MAX),
            appended_at: Instant::now(),
            begun_at: Instant::now(),
            expected: 0,
            more: true,
            looked_at: Instant::now(),
            open: None,
            cold: Vec::new(),
            loading: None,
            loading_since: None,
            contended: false,
            gathered: Vec::new(),
            wary: 0,
            snapshot: Snapshot {
                position: head.position,
                not_before: Instant::now(),
                writing: None,
                begun: None,
                rests: Arc::new(AtomicBool::new(true)),
            },
            settings,
        };
        METRICS.started("snapshot", begun.elapsed());
        let begun = Instant::now();
        engine.replay().await?;
        METRICS.started("tail", begun.elapsed());
        METRICS.head(engine.head.commit, engine.head.position);
        METRICS.snapshot_at(engine.snapshot.position);
        engine.in_memory.store(engine.book.sizes().0, Ordering::Relaxed);
        let (position, commit) = (engine.head.position, engine.head.commit);
        tracing::info!(position, commit, snapshot = head.position, "the book is at the head");
        Ok(engine)
    }

    pub(crate) fn recent(&self) -> Option<&Recent> {
        self.recent.as_ref()
    }

    /// Runs until no handle is left, or the log turns out to be another one or cannot be read any more.
    pub(crate) async fn run(mut self, mut commands: mpsc::Receiver<Box<Job>>) {
        let _running = Running::begin();
        if let Err(error) = self.work(&mut commands).await {
            if let Some(recent) = &self.recent {
                recent.clear(); // it may not be what the log holds
            }
            tracing::error!(
                position = self.head.position,
                commit = self.head.commit,
                %error,
                "the log does not go on from the head that was acknowledged. The engine stops; find out which database \
                 this is, and who else writes to it, before starting it again"
            );
            return; // callers that wait see the channel close
        }
        if self.snapshot.position < self.head.position
            && let Err(error) = self
                .snapshots
                .write(&self.head, self.snapshot.position, &self.book.changes(), &AtomicBool::new(false))
                .await
        {
            tracing::warn!(%error, "no snapshot at the end: the next start reads more of the log");
        }
        for writer in self.writers {
            writer.close().await;
        }
    }

    async fn work(&mut self, commands: &mut mpsc::Receiver<Box<Job>>) -> Result<(), EngineError> {
        loop {
            METRICS.oldest(self.oldest());
            if self.is_gathered(commands.len()) {
                self.send().await?;
            }
            self.load_cold();
            // Nobody may wait for the snapshot, neither who stops us nor for want of room.
            self.snapshot.rests.store(self.more && !self.is_full(), Ordering::Relaxed);
            self.start_snapshot();
            self.show();
            let (mut room, until) = (self.room().min(AT_A_TIME), self.gathers_until());
            let idle = self.sent.is_empty() && self.loading.is_none() && self.snapshot.writing.is_none();
            if !self.more && idle && self.cold.is_empty() && self.open.is_none() {
                return Ok(());
            }
            tokio::select! {
                biased;
                ended = ended(self.sent.front_mut().map(|sent| &mut sent.append)) => {
                    METRICS.now(Doing::Deciding);
                    if let Some((closed, commit)) = self.appended(ended).await? {
                        // The database need not wait until all are told.
                        let sent = if self.is_gathered(commands.len()) { self.send().await } else { Ok(()) };
                        closed.answer(Some(commit));
                        sent?;
                    }
                }
                loaded = ended(self.loading.as_mut()) => {
                    METRICS.now(Doing::Deciding);
                    self.loading = None;
                    self.loading_since = None;
                    self.loaded(loaded)?;
                }
                (position, written) = ended(self.snapshot.writing.as_mut()) => {
                    METRICS.now(Doing::Deciding);
                    self.snapshot.writing = None;
                    self.snapshot_ended(position, written)?;
                }
                () = sleep_until(self.snapshot.not_before), if self.snapshot.is_wanted(!self.cold.is_empty()) => {
                    METRICS.now(Doing::Deciding);
                }
                first = commands.recv(), if self.more && 0 < room => {
                    METRICS.now(Doing::Deciding);
                    self.more = first.is_some();
                    let mut next = first;
                    while let Some(job) = next {
                        room = room.saturating_sub(job.command.decisions());
                        self.take(job);
                        next = if 0 < room { commands.try_recv().ok() } else { None };
                    }
                }
                // Whatever was waited for when it was last looked at: by then it goes.
                () = sleep_until(until), if self.open.is_some() && self.sent.is_empty() => {
                    METRICS.now(Doing::Deciding);
                }
                () = sleep_until(self.looked_at + self.settings.look_every), if idle && self.open.is_none() && self.cold.is_empty() => {
                    METRICS.now(Doing::Reading);
                    self.look().await?;
                }
            }
        }
    }

    /// What whoever watches is shown, before the task waits again.
    fn show(&self) {
        let (all, changed) = self.book.sizes();
        self.in_memory.store(all, Ordering::Relaxed);
        METRICS.book_items.set(i64::try_from(all).unwrap_or(i64::MAX));
        METRICS.book_changed_items.set(i64::try_from(changed).unwrap_or(i64::MAX));
        METRICS.keys.set(i64::try_from(self.keys.count()).unwrap_or(i64::MAX));
        METRICS.oldest(self.oldest());
        METRICS.now(match (self.sent.is_empty(), &self.loading) {
            (false, _) => Doing::Appending,
            (true, Some(_)) => Doing::Reading,
            (true, None) => Doing::Idle,
        });
    }

    /// Since when the oldest command that is here waits.
    fn oldest(&self) -> Option<std::time::Instant> {
        let first = |jobs: &[Box<Job>]| jobs.first().map(|job| job.submitted);
        let sent = self.sent.front().and_then(|sent| sent.closed.oldest());
        let open = self.open.as_ref().and_then(Batch::oldest);
        [sent, open, first(&self.cold), self.loading_since, first(&self.gathered)].into_iter().flatten().min()
    }

    /// Whether what is decided should go. What has come goes together, with who is expected soon; but when most of it is decided,
    /// and worth a commit, the database need not wait for the rest.
    fn is_gathered(&self, queued: usize) -> bool {
        (queued == 0 && !self.waits()) || self.room() == 0 || self.settings.ahead_min.max(queued) <= self.decided()
    }

    fn decided(&self) -> usize {
        self.open.as_ref().map_or(0, Batch::decisions)
    }

    /// A commit costs the machine what some twenty events in it do. Where many call, a small one gives those a moment who have
    /// just been answered, or come on their own as often; when as many are here as there were, nobody waits (ADR 29).
    fn waits(&self) -> bool {
        let Some(batch) = &self.open else { return false };
        let enough = self.settings.gather_min.min(self.expected);
        let alone = enough < COMPANY_MIN || enough <= batch.commands() || batch.writes_nothing();
        self.more && self.sent.is_empty() && !alone && Instant::now() < self.gathers_until()
    }

    /// Until when a small commit may wait: the fewer come, the less a commit of them saves.
    fn gathers_until(&self) -> Instant {
        let Settings { gather_min, gather_within, .. } = self.settings;
        let (all, expected) = (u32::try_from(gather_min.max(1)).unwrap_or(u32::MAX), u32::try_from(self.expected));
        self.begun_at + gather_within / all * expected.unwrap_or(all).min(all)
    }

    /// How many more decisions may be taken up.
    fn room(&self) -> usize {
        let gathered: usize = self.gathered.iter().map(|job| job.command.decisions()).sum();
        self.settings.batch_max.saturating_sub(self.decided() + gathered)
    }

    /// Decides a command, or puts it where it waits for what it lacks.
    fn take(&mut self, job: Box<Job>) {
        // What waited aside has been given room.
        let fits = !job.command.adds_to_book() || 0 < job.loads || !self.is_full();
        if self.contended && fits {
            self.gathered.push(job);
            return;
        }
        let missing = self.book.missing(&job.command);
        let known = self.usage(&job);
        if fits && missing.is_empty() && !self.looks_up_key(&job, known) {
            self.decide(job, known);
            return;
        }
        if 2 * self.settings.batch_max <= self.cold.len() {
            job.refuse(CommandError::Overloaded);
        } else if job.loads < LOADS_MAX {
            self.cold.push(job);
        } else {
            tracing::error!(?missing, "what a command needs does not stay in memory long enough");
            job.refuse(CommandError::Unavailable);
        }
    }

    fn decide(&mut self, job: Box<Job>, known: KeyUse) {
        let tip = self.sent.back().map_or(self.head, |sent| sent.head);
        let book = &self.book;
        self.open.get_or_insert_with(|| Batch::after(&tip, now(), book)).decide(&mut self.book, job, known);
    }

    /// What is known of the command's key, in memory and by what was looked up for it.
    fn usage(&self, job: &Job) -> KeyUse {
        let Some(key) = &job.command.key else { return KeyUse::New };
        let open = self.open.as_ref().map_or(KeyUse::New, |batch| batch.usage(key));
        let in_log = usage(job.key_in_log.flatten().as_ref(), key);
        let sent = self.sent.iter().map(|sent| sent.closed.usage(key));
        let mut known = sent.chain([open, self.keys.usage(key), in_log]);
        known.find(|known| *known != KeyUse::New).unwrap_or(KeyUse::New)
    }

    /// Whether the log must be asked about the key first.
    fn looks_up_key(&self, job: &Job, known: KeyUse) -> bool {
        0 < self.wary && known == KeyUse::New && job.command.key.is_some() && job.key_in_log.is_none()
    }

    /// Sends the open batch if none is on its way, or if it is worth a commit of its own.
    async fn send(&mut self) -> Result<(), EngineError> {
        let ahead = !self.sent.is_empty();
        let worth = |batch: &Batch| self.settings.ahead_min <= batch.decisions() && !batch.writes_nothing();
        if SENT_MAX <= self.sent.len() || (ahead && !self.open.as_ref().is_some_and(worth)) {
            return Ok(());
        }
        if !ahead && !self.gathered.is_empty() {
            let jobs = std::mem::take(&mut self.gathered);
            return self.decide_in_turn(jobs).await;
        }
        let Some(mut batch) = self.open.take() else { return Ok(()) };
        if !batch.take_up() {
            // Some callers have given up in the meantime: nothing of theirs may happen, so the rest is decided again. What
            // it needs may have left memory.
            self.book.take_back(batch.before);
            for job in batch.close().1.into_jobs().filter(|job| job.stage.take()) {
                self.take(job);
            }
            let Some(again) = self.open.take() else { return Ok(()) };
            batch = again;
            if ahead && batch.writes_nothing() {
                self.open = Some(batch); // its answers wait for the commit that they were decided upon
                return Ok(());
            }
        }
        let vouched = !batch.refuses_without_a_trace();
        match batch.close() {
            (Some(commit), closed) => {
                let head = commit.head();
                let writer = self.writers.pop().expect("there is one for each batch that may be on its way");
                let attempt = if ahead { Attempt::Ahead } else { Attempt::First };
                let append = begin(appending(writer, commit, attempt)).await;
                self.begun_at = Instant::now();
                self.sent.push_back(Sent { closed, head, at: self.begun_at, ahead, append });
                Ok(())
            }
            (None, closed) if vouched => {
                closed.answer(None);
                Ok(())
            }
            // Another engine may have changed what was refused.
            (None, closed) => self.decide_in_turn(closed.into_jobs().collect()).await,
        }
    }

    /// The first of the batches on their way has arrived, or has not.
    async fn appended(
        &mut self,
        (writer, commit, appended): Ended,
    ) -> Result<Option<(Closed, Arc<Commit>)>, EngineError> {
        let mut sent = self.sent.pop_front().expect("it was on its way");
        // What it follows is in the log by now. Whether an earlier attempt is still under way need not be known.
        if sent.ahead && matches!(appended, Err(Again::WentBack)) {
            sent.ahead = false;
            sent.append = begin(appending(writer, commit, Attempt::Another)).await;
            self.sent.push_front(sent);
            return Ok(None);
        }
        let behind = self.sent.iter().map(|sent| sent.closed.commands()).sum::<usize>();
        self.expected = sent.closed.commands() + behind + self.open.as_ref().map_or(0, Batch::commands);
        self.writers.push(writer);
        self.measured(sent.at, &appended);
        let again = match appended {
            Ok(()) => return Ok(Some((sent.closed, self.committed(commit)))),
            Err(again) => again,
        };
        let mut upon = Vec::new();
        for sent in std::mem::take(&mut self.sent) {
            upon.extend(self.abandon(sent).await?);
        }
        upon.extend(self.open.take().into_iter().flat_map(|batch| batch.close().1.into_jobs()));
        self.book.take_back(sent.closed.before);
        let mut jobs: Vec<_> = sent.closed.into_jobs().collect();
        match again {
            Again::WentBack => return Err(EngineError::WentBack),
            Again::Never(error) => {
                self.give_up(std::mem::take(&mut jobs), &error);
                jobs.extend(upon);
            }
            Again::Lost => {
                self.contended = true;
                jobs.extend(upon);
            }
            Again::KeyTaken => {
                jobs.extend(upon);
                jobs.iter_mut().for_each(|job| job.key_in_log = None);
                self.wary = WARY_BATCHES;
            }
        }
        if !jobs.is_empty() {
            self.decide_in_turn(jobs).await?;
        }
        Ok(None)
    }

    /// The commands of a batch that follows one which is not in the log: the server refuses it, now or later.
    async fn abandon(&mut self, sent: Sent) -> Result<impl Iterator<Item = Box<Job>> + use<>, EngineError> {
        let Sent { closed, head, mut append, .. } = sent;
        match timeout(FAILING, ended(Some(&mut append))).await {
            Ok((_, commit, Ok(()))) => return Err(EngineError::Chain { commit: commit.number }),
            Ok((writer, _, Err(_))) => self.writers.push(writer),
            Err(_) => {
                tracing::warn!(commit = head.commit, "an append that cannot succeed takes too long to fail");
                append.abort();
                let another = self.writer().another();
                self.writers.push(another);
            }
        }
        Ok(closed.into_jobs())
    }

    /// An append has ended. Of two at a time, only what the later one took beyond the other says how fast appends are.
    fn measured(&mut self, began: Instant, appended: &Result<(), Again>) {
        let now = Instant::now();
        METRICS.appended(now - began, outcome(appended));
        self.pace.measured(now - began.max(self.appended_at));
        self.appended_at = now;
    }

    /// The log ends with this commit now; whoever it is about may know, and is told by the caller.
    fn committed(&mut self, commit: Commit) -> Arc<Commit> {
        self.head = commit.head();
        let upon = self.sent.front().map(|sent| sent.closed.before).or(self.open.as_ref().map(|open| open.before));
        self.book.keep(upon.unwrap_or_else(|| self.book.mark()));
        for event in &commit.events {
            self.keys.remember_event(&event.into());
        }
        self.wary = self.wary.saturating_sub(1);
        let commit = Arc::new(commit);
        if let Some(recent) = &self.recent {
            recent.push(commit.clone());
        }
        commit
    }

    /// Brings commands to their end, whatever other engines do: takes the turn to append, reads what they have appended,
    /// decides, appends. An error is the engine's end.
    async fn decide_in_turn(&mut self, mut jobs: Vec<Box<Job>>) -> Result<(), EngineError> {
        let mut patience = Patience::new();
        let mut keys_taken = 0;
        jobs.retain(|job| job.stage.take());
        loop {
            self.book.make_room(self.settings.wallets_max);
            let ready = match self.load_now(&mut jobs).await {
                Ok(()) => match self.catch_up().await {
                    Ok(foreign) => {
                        self.contended = foreign;
                        self.load_now(&mut jobs).await
                    }
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            };
            match ready {
                Ok(()) => {}
                Err(error) if patience.allow_another(&error).await => {
                    self.writer().disconnect();
                    continue;
                }
                Err(error) if error.is_passing() => {
                    self.give_up(jobs, &error);
                    return Ok(());
                }
                Err(error) => return Err(error), // what cannot be folded in now never will be
            }
            let mut batch = Batch::after(&self.head, now(), &self.book);
            for job in jobs.drain(..) {
                let here = job.command.key.map_or(KeyUse::New, |key| batch.usage(&key));
                let known = if here == KeyUse::New { self.usage(&job) } else { here };
                batch.decide(&mut self.book, job, known);
            }
            let (commit, closed) = batch.close();
            let Some(commit) = commit else {
                self.writer().give_turn_back().await;
                closed.answer(None);
                return Ok(());
            };
            let began = Instant::now();
            METRICS.now(Doing::Appending);
            let appended = append(self.writer(), &commit, Attempt::First).await;
            METRICS.now(Doing::Deciding);
            self.measured(began, &appended);
            let Err(again) = appended else {
                let commit = self.committed(commit);
                closed.answer(Some(commit));
                return Ok(());
            };
            self.book.take_back(closed.before);
            jobs.extend(closed.into_jobs());
            match again {
                Again::Lost => {} // the turn was lost too
                Again::WentBack => return Err(EngineError::WentBack),
                Again::Never(error) => {
                    self.give_up(jobs, &error);
                    return Ok(());
                }
                Again::KeyTaken => {
                    // Asked anew, the log knows which: with the turn held, nobody adds to it.
                    self.wary = WARY_BATCHES;
                    jobs.iter_mut().for_each(|job| job.key_in_log = None);
                    keys_taken += 1;
                    if KEYS_TAKEN_MAX < keys_taken {
                        self.give_up(jobs, &EngineError::Taken); // deciding again would come to the same
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Lays in all that the commands lack. Only while nothing is on its way.
    async fn load_now(&mut self, jobs: &mut [Box<Job>]) -> Result<(), EngineError> {
        let (missing, keys) = self.lacked(jobs);
        if missing.is_empty() && keys.is_empty() {
            return Ok(());
        }
        let found = load(&self.log, &self.snapshots, self.snapshot.position, missing, keys).await?;
        for job in jobs {
            found.tell(job);
        }
        found.lay_in(&mut self.book);
        Ok(())
    }

    /// What the commands lack: things of the book, and keys to look up.
    fn lacked(&mut self, jobs: &[Box<Job>]) -> (Missing, Vec<[u8; 16]>) {
        let (mut missing, mut keys) = (Missing::default(), Vec::new());
        for job in jobs {
            missing.add(&self.book.missing(&job.command));
            if self.looks_up_key(job, self.usage(job)) {
                keys.extend(job.command.key.map(|key| key.hash));
            }
        }
        (missing, keys)
    }

    /// Sends for what the waiting commands lack.
    fn load_cold(&mut self) {
        // Without room they would be decided into a batch that is full.
        if self.loading.is_some() || self.cold.is_empty() || self.room() == 0 {
            return;
        }
        if self.is_full() {
            self.book.make_room(self.settings.wallets_max);
            if self.is_full() {
                return; // until a snapshot is written: then what has changed may leave memory
            }
        }
        self.cold.retain(|job| !job.answer.is_closed());
        let mut room = self.settings.batch_max;
        let fitting = self.cold.iter().take_while(|job| {
            let fits = 0 < room;
            room = room.saturating_sub(job.command.decisions());
            fits
        });
        let count = fitting.count();
        let mut jobs: Vec<_> = self.cold.drain(..count).collect();
        jobs.iter_mut().for_each(|job| job.loads += 1);
        self.loading_since = jobs.first().map(|job| job.submitted);
        let (missing, keys) = self.lacked(&jobs);
        let (log, snapshots, had) = (self.log.clone(), self.snapshots.clone(), self.snapshot.position);
        let generation = self.book.generation();
        self.loading = Some(tokio::spawn(async move {
            let mut patience = Patience::new();
            loop {
                match load(&log, &snapshots, had, missing.clone(), keys.clone()).await {
                    Err(error) if patience.allow_another(&error).await => {}
                    found => return Loaded { jobs, generation, found },
                }
            }
        }));
    }

    fn loaded(&mut self, Loaded { jobs, generation, found }: Loaded) -> Result<(), EngineError> {
        let found = match found {
            Ok(found) => found,
            Err(error @ EngineError::SnapshotWentBack(_)) => return Err(error),
            Err(error) => {
                self.give_up(jobs, &error);
                return Ok(());
            }
        };
        let mut jobs = jobs;
        let old_keys = jobs.iter_mut().map(|job| found.tell(job)).filter(|known| *known).count();
        if 0 < old_keys {
            self.wary = WARY_BATCHES;
        }
        // Otherwise something may have changed and left memory since it was read here: it is read again.
        if generation == self.book.generation() {
            found.lay_in(&mut self.book);
        }
        for job in jobs {
            self.take(job);
        }
        self.book.make_room(self.settings.wallets_max);
        Ok(())
    }

    /// Takes the turn and reads what other engines have appended; whether there was anything. The next append cannot lose.
    async fn catch_up(&mut self) -> Result<bool, EngineError> {
        let mut any = false;
        loop {
            let (commit, before) = (self.head.commit, self.head.position);
            let tail = self.writer().take_turn(commit, PAGE).await?;
            if tail.is_empty() {
                // If nothing gets appended now, nothing else shows that the head is still in the log.
                if !any && self.writer().chain_of(commit).await? != Some(self.head.chain) {
                    return Err(EngineError::WentBack);
                }
                return Ok(any);
            }
            any = true;
            self.absorb(&tail).await?;
            if FAR_BEHIND <= self.head.position - before {
                // The others need not wait until all of it is read.
                self.writer().give_turn_back().await;
                while FAR_BEHIND <= self.read_on().await? {}
            }
        }
    }

    /// Reads on, if that can be done now. Nothing is decided upon the head meanwhile.
    async fn look(&mut self) -> Result<(), EngineError> {
        match self.read_on().await {
            Ok(events) if FAR_BEHIND <= events => {} // and at once more, unless there is something to do
            Ok(_) => self.looked_at = Instant::now(),
            Err(error) if error.is_passing() => self.looked_at = Instant::now(), // whoever has a command will be told
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Folds in the next page of the log, while others go on appending; how many events it had.
    async fn read_on(&mut self) -> Result<i64, EngineError> {
        let before = self.head.position;
        let page = within(READING, self.log.commits_after(self.head.commit, PAGE)).await?;
        self.absorb(&page).await?;
        if self.snapshot_is_due(self.settings.snapshot_every) {
            self.write_snapshot().await?;
        }
        Ok(self.head.position - before)
    }

    /// Folds in all that the log says after the head, in one pass, for there may be much of it; every hash is recomputed.
    async fn replay(&mut self) -> Result<(), EngineError> {
        let end = self.log.head().await?.position;
        let recent = end.saturating_sub(i64::try_from(self.settings.keys_max).unwrap_or(i64::MAX));
        let from_the_beginning = self.head.commit == 0;
        let mut replay = self.log.replay(self.head).await?;
        while let Some(page) = replay.next().await? {
            let complete = from_the_beginning && self.book.generation() == 0;
            self.fold(page.events(), recent, complete).await?;
            self.head = replay.head();
            METRICS.head(self.head.commit, self.head.position);
            if self.snapshot_is_due(REPLAYED_MAX) {
                self.write_snapshot().await?;
            }
        }
        Ok(())
    }

    /// Writes a snapshot and waits for it; or for the one that is being written.
    async fn write_snapshot(&mut self) -> Result<(), EngineError> {
        if Instant::now() < self.snapshot.not_before {
            return Ok(());
        }
        self.snapshot.rests.store(false, Ordering::Relaxed);
        let (position, written) = match self.snapshot.writing.take() {
            Some(mut writing) => ended(Some(&mut writing)).await,
            None => {
                let written = self
                    .snapshots
                    .write(&self.head, self.snapshot.position, &self.book.changes(), &AtomicBool::new(false))
                    .await;
                (self.head.position, written)
            }
        };
        self.snapshot_ended(position, written)
    }

    /// Folds commits of the log in. They must follow the head.
    async fn absorb(&mut self, commits: &[Commit]) -> Result<(), EngineError> {
        let Some(last) = commits.last() else { return Ok(()) };
        let (mut number, mut chain) = (self.head.commit, self.head.chain);
        for commit in commits {
            if commit.number != number + 1 || commit.previous_chain != chain {
                return Err(EngineError::Chain { commit: commit.number });
            }
            (number, chain) = (commit.number, commit.chain);
        }
        let events = commits.iter().flat_map(|commit| &commit.events).map(EventRow::from);
        self.fold(events, 0, false).await?;
        self.head = last.head();
        METRICS.head(self.head.commit, self.head.position);
        Ok(())
    }

    /// Folds in what is in the log and comes next. Keys are remembered of what lies behind the position `recent`; memory
    /// that is `complete` lacks nothing of what the log says so far.
    async fn fold<'a>(
        &mut self,
        rows: impl Iterator<Item = EventRow<'a>>,
        recent: i64,
        complete: bool,
    ) -> Result<(), EngineError> {
        let mut events = Vec::new();
        let mut missing = Missing::default();
        for row in rows {
            let event = row.read().map_err(|error| EngineError::Corrupt { position: row.position, error })?;
            if !complete {
                self.book.missing_of(&event, &mut missing);
            }
            if recent < row.position {
                self.keys.remember_event(&row);
            }
            events.push((row.position, event));
        }
        if !missing.is_empty() {
            let found = load(&self.log, &self.snapshots, self.snapshot.position, missing, Vec::new()).await?;
            found.lay_in(&mut self.book);
        }
        for (position, event) in &events {
            self.book.fold(*position, event);
        }
        self.book.keep(self.book.mark());
        Ok(())
    }

    /// Whether memory has no room for what waiting commands lack or add.
    fn is_full(&self) -> bool {
        2 * self.settings.wallets_max <= self.book.fullest()
    }

    fn snapshot_is_due(&self, every: i64) -> bool {
        let behind = self.head.position - self.snapshot.position;
        every <= behind || self.settings.wallets_max <= 2 * self.book.sizes().1
    }

    /// Begins to write a snapshot beside the road, if it is time.
    fn start_snapshot(&mut self) {
        let snapshot = &self.snapshot;
        let every = self.settings.snapshot_every;
        if snapshot.writing.is_some() || !self.snapshot_is_due(every) || Instant::now() < snapshot.not_before {
            return;
        }
        let (snapshots, head, had, changes, rests) =
            (self.snapshots.clone(), self.head, snapshot.position, self.book.changes(), snapshot.rests.clone());
        let write = async move { (head.position, snapshots.write(&head, had, &changes, &rests).await) };
        self.snapshot.writing = Some(tokio::spawn(write));
        self.snapshot.begun = Some(Instant::now());
    }

    fn snapshot_ended(&mut self, position: i64, written: Result<bool, SnapshotError>) -> Result<(), EngineError> {
        METRICS.snapshot_ended(written.is_ok(), self.snapshot.begun.take().map(|begun| begun.elapsed()));
        match written {
            Ok(ours) => {
                tracing::debug!(position, ours, "the book's snapshot stands");
                self.book.written(position);
                self.snapshot.position = position;
                METRICS.snapshot_at(position);
                self.book.make_room(self.settings.wallets_max);
            }
            Err(error @ SnapshotError::WentBack { .. }) => return Err(error.into()),
            Err(error) => {
                tracing::warn!(position, %error, "the book's snapshot could not be written; trying again");
                self.snapshot.not_before = Instant::now() + SNAPSHOT_PAUSE;
            }
        }
        Ok(())
    }

    /// Nothing of these commands is in the log, and nothing will be.
    fn give_up(&mut self, jobs: Vec<Box<Job>>, error: &EngineError) {
        tracing::error!(%error, commands = jobs.len(), "commands could not be executed; they are not in the log");
        for writer in &mut self.writers {
            writer.disconnect();
        }
        for job in jobs {
            job.refuse(CommandError::Unavailable);
        }
    }

    fn writer(&mut self) -> &mut Writer {
        self.writers.last_mut().expect("one is here while not all batches are on their way")
    }
}

/// Which attempt to append a commit it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    First,
    /// The first, while the commit that it follows is on its way.
    Ahead,
    /// What became of an earlier one is not known.
    Another,
}

async fn appending(mut writer: Writer, commit: Commit, attempt: Attempt) -> Ended {
    let appended = append(&mut writer, &commit, attempt).await;
    (writer, commit, appended)
}

/// Begins at once, for a task that is only spawned waits until this one has nothing to do; goes on as a task.
async fn begin<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    let mut work = Box::pin(work);
    let done = poll_fn(|context| {
        Poll::Ready(match work.as_mut().poll(context) {
            Poll::Ready(done) => Some(done),
            Poll::Pending => None,
        })
    });
    match done.await {
        Some(done) => tokio::spawn(ready(done)),
        None => tokio::spawn(work),
    }
}

/// Appends, and does not come back before it is known what became of it; of one that was sent ahead, before it is known
/// whether it came too early.
async fn append(writer: &mut Writer, commit: &Commit, attempt: Attempt) -> Result<(), Again> {
    let mut pause = PAUSES.0;
    let mut ahead = attempt == Attempt::Ahead;
    let mut sent_before = attempt == Attempt::Another;
    let mut patience = Patience::new();
    loop {
        let appended =
            if std::mem::take(&mut ahead) { writer.append_ahead(commit).await } else { writer.append(commit).await };
        match appended {
            Ok(()) => return Ok(()),
            Err(AppendError::Unknown(reason)) => {
                // Nothing may be told until this is settled, and reading proves nothing: the old backend may still be
                // at it. The identical commit either goes in or collides with itself.
                tracing::warn!(commit = commit.number, reason, "the outcome of an append is unknown; sending it again");
                sent_before = true;
                METRICS.append_again(true);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
            }
            Err(AppendError::NotDone(error)) if sent_before => {
                // Of this attempt that is certain; the one before may have gone in, or may still.
                tracing::warn!(commit = commit.number, %error, "settling an append failed; sending it again");
                METRICS.append_again(false);
                writer.disconnect(); // it may be to a server that is no longer the one that writes
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
            }
            Err(AppendError::NotDone(error)) => {
                let error = error.into();
                if !patience.allow_another(&error).await {
                    return Err(Again::Never(error));
                }
                METRICS.append_again(false);
                writer.disconnect();
            }
            Err(AppendError::Lost) if sent_before => match writer.chain_of(commit.number).await {
                Ok(Some(chain)) if chain == commit.chain => return Ok(()),
                Ok(_) => return Err(Again::Lost),
                Err(error) => {
                    tracing::warn!(commit = commit.number, %error, "asking whose commit it is failed; asking again");
                    writer.disconnect();
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES.1);
                }
            },
            Err(AppendError::Lost) => return Err(Again::Lost),
            Err(AppendError::KeyTaken) => return Err(Again::KeyTaken),
            Err(AppendError::WentBack) => return Err(Again::WentBack),
            Err(AppendError::Rejected(error)) => return Err(Again::Never(StoreError::Database(error).into())),
        }
    }
}

/// Waits for a task, for ever if there is none.
async fn ended<T>(task: Option<&mut JoinHandle<T>>) -> T {
    match task {
        None => std::future::pending().await,
        Some(task) => match task.await {
            Ok(ended) => ended,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => std::future::pending().await, // the process is ending
            },
        },
    }
}

/// Why a batch is not in the log, and what helps.
enum Again {
    Lost,
    KeyTaken,
    WentBack,
    Never(EngineError),
}

fn outcome(appended: &Result<(), Again>) -> Append {
    match appended {
        Ok(()) => Append::Committed,
        Err(Again::Lost) => Append::Lost,
        Err(Again::KeyTaken) => Append::KeyTaken,
        Err(Again::WentBack | Again::Never(_)) => Append::Failed,
    }
}

/// How often one group is tried again while the database is away and nothing of it was sent: giving up is safe then.
struct Patience {
    pause: Duration,
    until: Instant,
}

impl Patience {
    fn new() -> Self {
        Self { pause: PAUSES.0, until: Instant::now() + Duration::from_secs(10) }
    }

    /// Waits a little, and says whether trying again can help.
    async fn allow_another(&mut self, error: &EngineError) -> bool {
        if !error.is_passing() || self.until <= Instant::now() {
            return false;
        }
        tracing::warn!(%error, "the database did not do its part; trying again");
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSES.1);
        true
    }
}

fn now() -> Timestamp {
    OffsetDateTime::now_utc().try_into().expect("the clock is between the years 1 and 9999")
}
