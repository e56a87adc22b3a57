//! The log from a commit on, in one pass, with every hash recomputed: for whoever folds much of it.
//!
//! Beside [`Log::commits_after`], which answers one question. Here a task of its own reads ahead over a connection of its
//! own, so that the database works while its reader verifies and folds; rows come as `COPY` writes them and stay where they
//! came in. Memory is bounded: so many pages are ahead, and the database waits.
//!
//! Left out: what the events mean. A second opinion on all of this is the auditor's, which must not use it.

use std::ops::Range;
use std::time::Duration;

use futures::{Stream, TryStreamExt};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, PgConnection};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::hash::{Hash, Tree, chain, genesis};
use crate::record::{COLUMNS, Column, EventRow};
use crate::{Head, Log, StoreError};

/// Bytes in one page; its last commit may go beyond it.
const PAGE_BYTES: usize = 512 * 1024;

/// Pages that may be ready before they are asked for, beside the one that is being read.
const PAGES_AHEAD: usize = 2;

/// Events in one `COPY`, about: enough that planning it costs nothing, and little that is read for nothing if nobody goes on.
const STRETCH: i64 = 16_384;

/// Far above any commit: an engine's commands are bounded to a tenth of it.
const BYTES_MAX: usize = 256 * 1024 * 1024;

/// How long Postgres may take for a page, or to say anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long the server lets one `COPY` work, in milliseconds, our own pauses between pages included.
const STATEMENT_MILLIS: u32 = 600_000;

/// Commits that follow each other, read in one pass and verified.
#[derive(Debug)]
pub struct Replay {
    pages: mpsc::Receiver<Result<Page, StoreError>>,
    head: Head,
    _reading: JoinSet<()>, // ends with this
}

/// Whole commits, as their rows came in.
#[derive(Debug, Default)]
pub struct Page {
    commits: Vec<CommitRow>,
    /// Rows of all the commits, one after the other in the binary form of `COPY`.
    bytes: Vec<u8>,
    /// Where each row begins.
    rows: Vec<usize>,
    /// Where the log stands with it.
    head: Option<Head>,
}

/// A commit without its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitRow {
    pub number: i64,
    pub first: i64,
    pub last: i64,
    pub previous_chain: Hash,
    pub root: Hash,
    pub chain: Hash,
}

impl Log {
    /// Reads on from a head, which is taken as given; that of commit 0 must be the genesis of this ledger.
    pub async fn replay(&self, after: Head) -> Result<Replay, StoreError> {
        if after.commit == 0 && after.chain != genesis(self.ledger_id().await?) {
            return Err(StoreError::Corrupt("commit 0 is not the beginning of this ledger".to_owned()));
        }
        // The order of positions is that of an index; sorting, or reading all, would be for want of statistics.
        let options = self.pool().connect_options().as_ref().clone();
        let options = options.options([("statement_timeout", STATEMENT_MILLIS)]).options([
            ("enable_sort", "off"),
            ("enable_seqscan", "off"),
            ("enable_bitmapscan", "off"),
        ]);
        let (ready, pages) = mpsc::channel(PAGES_AHEAD);
        let mut reading = JoinSet::new();
        reading.spawn(async move {
            if let Err(error) = read_all(&options, after, &ready).await {
                ready.send(Err(error)).await.ok(); // nobody reads on
            }
        });
        Ok(Replay { pages, head: after, _reading: reading })
    }
}

impl Replay {
    /// The next commits; none where the log ended when it was last looked at. What is not exactly what was sealed, or does
    /// not follow, is an error that names its place, and the end.
    pub async fn next(&mut self) -> Result<Option<Page>, StoreError> {
        let Some(page) = self.pages.recv().await.transpose()? else { return Ok(None) };
        self.head = page.head.unwrap_or(self.head);
        Ok(Some(page))
    }

    /// Where the commits so far end.
    pub fn head(&self) -> Head {
        self.head
    }
}

impl Page {
    /// The commits in their order, each with its events.
    pub fn commits(&self) -> impl Iterator<Item = (&CommitRow, impl Iterator<Item = EventRow<'_>>)> {
        let mut at = 0;
        self.commits.iter().map(move |commit| {
            let rows = at..at + commit.events();
            at = rows.end;
            (commit, self.rows_of(rows))
        })
    }

    /// The events of all commits.
    pub fn events(&self) -> impl Iterator<Item = EventRow<'_>> {
        self.rows_of(0..self.rows.len())
    }

    /// Recomputes every hash of commits that are to follow `head`, and answers where the log stands with them.
    fn verify(&self, mut head: Head) -> Result<Head, StoreError> {
        let mut rows = self.rows.iter();
        for commit in &self.commits {
            let number = commit.number;
            let wrong = |what: &str| Err(StoreError::Corrupt(format!("commit {number}: {what}")));
            if number != head.commit + 1 || commit.first != head.position + 1 || commit.last < commit.first {
                return wrong("it does not follow the one before it");
            }
            let mut tree = Tree::default();
            for position in commit.first..=commit.last {
                let wrong = |what: &str| Err(StoreError::Corrupt(format!("position {position}: {what}")));
                let Some(row) = rows.next() else { return wrong("it is missing") };
                let event = self.event(*row)?;
                if event.position != position {
                    return wrong("it is missing");
                }
                if event.commit != number {
                    return wrong("it says that it is in another commit");
                }
                let leaf = event.leaf();
                if *event.leaf_hash != leaf {
                    return wrong("its leaf hash is not that of what it says");
                }
                tree.push(leaf);
                head.recorded_at = event.recorded_at;
            }
            if commit.root != tree.root() {
                return wrong("its root is not that of its events");
            }
            let follows = chain(&head.chain, &commit.root, commit.first, commit.last);
            if commit.previous_chain != head.chain || commit.chain != follows {
                return wrong("its chain does not follow from the one before it");
            }
            (head.commit, head.position, head.chain) = (number, commit.last, commit.chain);
        }
        Ok(head)
    }

    fn rows_of(&self, rows: Range<usize>) -> impl Iterator<Item = EventRow<'_>> {
        self.rows[rows].iter().map(|row| self.event(*row).expect("it could be read when it was verified"))
    }

    fn event(&self, row: usize) -> Result<EventRow<'_>, StoreError> {
        let mut row = Tuple::at(&self.bytes, row);
        EventRow::of(|| row.next())
    }
}

impl CommitRow {
    /// How many events it has.
    fn events(&self) -> usize {
        usize::try_from(self.last - self.first + 1).unwrap_or(0)
    }
}

/// Reads stretch after stretch and hands it over page by page, until the log ends or nobody takes them.
async fn read_all(
    options: &PgConnectOptions,
    after: Head,
    ready: &mpsc::Sender<Result<Page, StoreError>>,
) -> Result<(), StoreError> {
    let mut connection = in_time(options.connect()).await?;
    let mut head = after;
    loop {
        let commits = commits_of_stretch(&mut connection, &head).await?;
        if commits.is_empty() {
            return Ok(());
        }
        match read_stretch(&mut connection, commits, head, ready).await? {
            Some(reached) => head = reached,
            None => return Ok(()),
        }
    }
}

/// The next commits, of about [`STRETCH`] events together.
async fn commits_of_stretch(connection: &mut PgConnection, after: &Head) -> Result<Vec<CommitRow>, StoreError> {
    // Where the first event too many is says at once which commits these are, however many events each has.
    let (after, beyond) = (after.commit, after.position.saturating_add(STRETCH + 1));
    let copy = format!(
        "copy (select number, first_position, last_position, previous_chain, root, chain from ledger.commits
         where {after} < number and number < greatest({after}::bigint + 2, coalesce(
             (select commit_number from ledger.events where position = {beyond}), {after}::bigint + 1 + {STRETCH}))
         order by number limit {STRETCH}) to stdout (format binary)"
    );
    let mut copied = Copied::default();
    let mut stream = in_time(connection.copy_out_raw(&copy)).await?;
    in_time(copied.fill(&mut stream, usize::MAX)).await?;
    let mut commits = Vec::with_capacity(copied.rows.len());
    for row in &copied.rows {
        let mut row = Tuple::at(&copied.bytes, *row);
        let mut column = |name| Ok::<_, StoreError>(Column { name, value: row.next()? });
        commits.push(CommitRow {
            number: column("number")?.number()?,
            first: column("first_position")?.number()?,
            last: column("last_position")?.number()?,
            previous_chain: *column("previous_chain")?.bytes()?,
            root: *column("root")?.bytes()?,
            chain: *column("chain")?.bytes()?,
        });
    }
    Ok(commits)
}

/// Reads the events of these commits, which are to follow `head`. Answers where the log stands then; none if nobody takes them.
async fn read_stretch(
    connection: &mut PgConnection,
    commits: Vec<CommitRow>,
    mut head: Head,
    ready: &mpsc::Sender<Result<Page, StoreError>>,
) -> Result<Option<Head>, StoreError> {
    let last = commits.iter().map(|commit| commit.last).max().unwrap_or(head.position);
    let copy = format!(
        "copy (select {COLUMNS} from ledger.events where {} < position and position <= {last} order by position)
         to stdout (format binary)",
        head.position
    );
    let mut stream = in_time(connection.copy_out_raw(&copy)).await?;
    let mut commits = commits.into_iter().peekable();
    let mut copied = Copied::default();
    while commits.peek().is_some() {
        let (mut of_page, mut events) = (Vec::new(), 0_usize);
        let filling = async {
            while copied.bytes.len() < PAGE_BYTES
                && let Some(commit) = commits.next()
            {
                events = events.saturating_add(commit.events());
                of_page.push(commit);
                copied.fill(&mut stream, events).await?;
            }
            Ok::<_, StoreError>(())
        };
        in_time(filling).await?;
        let rest = copied.split_off(events);
        let Copied { bytes, rows, .. } = std::mem::replace(&mut copied, rest);
        let mut page = Page { commits: of_page, bytes, rows, head: None };
        head = page.verify(head)?;
        page.head = Some(head);
        if ready.send(Ok(page)).await.is_err() {
            return Ok(None);
        }
    }
    // To its very end, or the connection could not be used again.
    in_time(copied.fill(&mut stream, usize::MAX)).await?;
    if copied.rows.is_empty() {
        Ok(Some(head))
    } else {
        Err(StoreError::Corrupt(format!("up to position {last} there are more events than the commits have")))
    }
}

/// What a `COPY … TO STDOUT (FORMAT binary)` has sent so far.
#[derive(Default)]
struct Copied {
    bytes: Vec<u8>,
    /// Where each whole row begins, and where the first begins that is not whole yet.
    rows: Vec<usize>,
    whole: usize,
    begun: bool,
}

/// What such a `COPY` begins with: its signature, no flags and no further header.
const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

impl Copied {
    /// Until there are so many whole rows, or no more come.
    async fn fill(
        &mut self,
        stream: &mut (impl Stream<Item = Result<impl AsRef<[u8]>, sqlx::Error>> + Unpin),
        rows: usize,
    ) -> Result<(), StoreError> {
        while self.rows.len() < rows
            && let Some(bytes) = stream.try_next().await?
        {
            self.take(bytes.as_ref())?;
        }
        Ok(())
    }

    /// Takes what came in. Its parts are rows as a rule, which nobody has promised.
    fn take(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        if !self.begun {
            if self.bytes.is_empty() && SIGNATURE.len() <= bytes.len() {
                bytes = bytes.strip_prefix(SIGNATURE).ok_or_else(not_a_copy)?;
                self.begun = true;
            } else {
                return Err(not_a_copy());
            }
        }
        self.bytes.extend_from_slice(bytes);
        if BYTES_MAX < self.bytes.len() {
            return Err(StoreError::Corrupt("a commit is larger than any that is written".to_owned()));
        }
        while let Some(end) = Tuple::end(&self.bytes, self.whole)? {
            if end == self.whole {
                break; // the trailer
            }
            self.rows.push(self.whole);
            self.whole = end;
        }
        Ok(())
    }

    /// What follows so many rows.
    fn split_off(&mut self, rows: usize) -> Self {
        let mut rest = Self { begun: true, ..Self::default() };
        let at = self.rows.get(rows).copied().unwrap_or(self.whole);
        rest.bytes.reserve(PAGE_BYTES + PAGE_BYTES / 8);
        rest.bytes.extend_from_slice(&self.bytes[at..]);
        rest.rows.extend(self.rows.drain(rows.min(self.rows.len())..).map(|row| row - at));
        rest.whole = self.whole - at;
        self.bytes.truncate(at);
        rest
    }
}

/// A row of a binary `COPY`: how many columns it has, then each with its length before it.
struct Tuple<'a> {
    rest: &'a [u8],
}

impl<'a> Tuple<'a> {
    fn at(bytes: &'a [u8], row: usize) -> Self {
        Self { rest: bytes.get(row + 2..).unwrap_or_default() }
    }

    /// The next column, or none if it is null.
    fn next(&mut self) -> Result<Option<&'a [u8]>, StoreError> {
        let (length, rest) = self.rest.split_first_chunk().ok_or_else(not_a_copy)?;
        let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
            self.rest = rest;
            return Ok(None);
        };
        let (value, rest) = rest.split_at_checked(length).ok_or_else(not_a_copy)?;
        self.rest = rest;
        Ok(Some(value))
    }

    /// Where the row that begins here ends: at once if it is the trailer, none if it is not whole.
    fn end(bytes: &[u8], row: usize) -> Result<Option<usize>, StoreError> {
        let Some(columns) = bytes.get(row..row + 2) else { return Ok(None) };
        let columns = i16::from_be_bytes([columns[0], columns[1]]);
        let mut at = row + 2;
        if columns == -1 {
            return Ok(Some(row));
        }
        for _ in 0..columns {
            let Some(length) = bytes.get(at..).and_then(|rest| rest.first_chunk()) else { return Ok(None) };
            at += 4 + usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
        }
        Ok((at <= bytes.len()).then_some(at))
    }
}

fn not_a_copy() -> StoreError {
    StoreError::Database(sqlx::Error::Protocol("this is not what COPY sends".to_owned()))
}

async fn in_time<T, E: Into<StoreError>>(work: impl Future<Output = Result<T, E>>) -> Result<T, StoreError> {
    match timeout(PATIENCE, work).await {
        Ok(answer) => answer.map_err(Into::into),
        Err(_) => Err(StoreError::Late(PATIENCE)),
    }
}
