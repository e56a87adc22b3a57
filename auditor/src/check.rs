//! The journal's own order: positions, commands, keys, commits, leaves, roots and the chain.
//!
//! Takes what the log says in the order of an export: a commit's events, then the commit. An audit and the
//! verifying of an export are the same check, fed from two places.

use std::io;

use uuid::Uuid;

use crate::fold::Fold;
use crate::hash::{Hash, Tree, chain, genesis, hex, leaf};
use crate::once::Once;
use crate::payload::FlatObject;
use crate::record::{StoredCommit, StoredEvent};
use crate::report::{Findings, Report, ViewsChecked};

pub(crate) struct Check {
    ledger: Option<Uuid>,
    pub(crate) findings: Findings,
    pub(crate) fold: Fold,
    events: i64,
    commits: i64,
    /// The last position, and what its event said.
    pub(crate) position: i64,
    recorded_at: i64,
    command: Option<(Uuid, i64)>,
    /// The last commit, as it is written.
    commit: i64,
    commit_last: i64,
    chain: Vec<u8>,
    /// The commit that is being read: its leaves by our own hash, where it began, and its first bad position.
    tree: Tree,
    begun_at: Option<i64>,
    bad_at: Option<i64>,
    keys: Once,
    commands: Once,
    streams: Once,
}

impl Check {
    /// A check of a log from its beginning. Without the ledger's id the chain has no beginning.
    pub(crate) fn begin(ledger: Option<Uuid>) -> Self {
        Self {
            ledger,
            findings: Findings::default(),
            fold: Fold::default(),
            events: 0,
            commits: 0,
            position: 0,
            recorded_at: i64::MIN,
            command: None,
            commit: 0,
            commit_last: 0,
            chain: ledger.map(genesis).unwrap_or_default().to_vec(),
            tree: Tree::default(),
            begun_at: None,
            bad_at: None,
            keys: Once::new(),
            commands: Once::new(),
            streams: Once::new(),
        }
    }

    pub(crate) fn event(&mut self, event: &StoredEvent) -> io::Result<()> {
        let found_before = self.findings.total;
        self.place(event);
        self.command(event)?;
        let own = leaf(event);
        self.tree.push(own);
        if event.leaf_hash != own {
            let detail = format!("{} is written where the content gives {}", hex(&event.leaf_hash), hex(&own));
            self.wrong(event, "leaf", detail);
        }
        if serde_json::from_str::<FlatObject>(&event.metadata).is_err() {
            self.wrong(event, "metadata", "not a flat object of strings");
        }
        if let Some(stream) = self.fold.event(event, &mut self.findings) {
            self.streams.see(stream.into_bytes(), event.position)?;
        }
        self.events = self.events.saturating_add(1);
        self.begun_at.get_or_insert(event.position);
        if found_before < self.findings.total {
            self.bad_at.get_or_insert(event.position);
        }
        Ok(())
    }

    /// Positions without a gap, the commit that is next, and a clock that never goes back.
    fn place(&mut self, event: &StoredEvent) {
        let expected = self.position.saturating_add(1);
        if expected < event.position {
            let missing = event.position.saturating_sub(expected);
            let what = if missing == 1 { "the event is".to_owned() } else { format!("{missing} events are") };
            self.findings.add(expected, None, "position", format!("{what} missing before position {}", event.position));
            self.bad_at.get_or_insert(expected);
        } else if event.position < expected {
            self.wrong(event, "position", format!("position {} comes where {expected} belongs", event.position));
        }
        self.position = self.position.max(event.position);
        let commit = self.commit.saturating_add(1);
        if event.commit != commit {
            self.wrong(event, "commit", format!("says commit {}, lies in commit {commit}", event.commit));
        }
        if event.recorded_at < self.recorded_at {
            self.wrong(event, "time", "recordedAt goes back");
        }
        self.recorded_at = self.recorded_at.max(event.recorded_at);
    }

    /// A command's events lie together in one commit; its key stands on the first of them, and never again.
    fn command(&mut self, event: &StoredEvent) -> io::Result<()> {
        let first = self.command.is_none_or(|(id, _)| id != event.command_id);
        if first {
            self.commands.see(event.command_id.into_bytes(), event.position)?;
        } else if self.command.is_some_and(|(_, commit)| commit != event.commit) {
            self.wrong(event, "command", "the command goes on in another commit");
        }
        self.command = Some((event.command_id, event.commit));
        if event.key_hash.is_some() != event.request_hash.is_some() {
            self.wrong(event, "key", "a key's hash and its request's stand together or not at all");
        }
        if let Some(key) = &event.key_hash {
            match <[u8; 16]>::try_from(key.as_slice()) {
                Ok(key) => self.keys.see(key, event.position)?,
                Err(_) => self.wrong(event, "key", "a key's hash has 16 bytes"),
            }
            if !first {
                self.wrong(event, "key", "a key stands on its command's first event only");
            }
        }
        if event.request_hash.as_ref().is_some_and(|hash| hash.len() != 32) {
            self.wrong(event, "key", "a request's hash has 32 bytes");
        }
        Ok(())
    }

    /// Closes a commit over the events that came since the one before.
    pub(crate) fn commit(&mut self, commit: &StoredCommit) {
        let expected = self.commit.saturating_add(1);
        let first = self.commit_last.saturating_add(1);
        let begun_at = self.begun_at.take();
        if self.position < commit.last {
            self.bad_at.get_or_insert(self.position.saturating_add(1).max(first));
        }
        let mut at = self.bad_at.take().or(begun_at).unwrap_or(first);
        if commit.first != first {
            at = at.min(first); // from there on no commit holds the events
        }
        let tree = std::mem::take(&mut self.tree);
        let mut wrong = |check, detail: String| self.findings.add(at, Some(commit.number), check, detail);
        if commit.number != expected {
            wrong("commit", format!("commit {} comes where {expected} belongs", commit.number));
        }
        if commit.first != first || commit.last < commit.first {
            let (from, to) = (commit.first, commit.last);
            wrong("commit", format!("holds positions {from} to {to}, but follows position {}", self.commit_last));
        }
        if begun_at.is_none() {
            wrong("position", "the commit's events are missing".to_owned());
        } else if self.position < commit.last {
            let missing = self.position.saturating_add(1);
            wrong("position", format!("ends before its last position {}: {missing} is missing", commit.last));
        } else if commit.last < self.position {
            wrong("commit", format!("ends at {}, but position {} lies before it", commit.last, self.position));
        }
        let root = tree.root();
        if begun_at.is_some() && commit.root != root {
            wrong("root", format!("{} is written where its events give {}", hex(&commit.root), hex(&root)));
        }
        let own = chain(&self.chain, &commit.root, commit.first, commit.last);
        if commit.chain != own {
            wrong("chain", format!("{} is written where {} follows", hex(&commit.chain), hex(&own)));
        }
        if let Some(row) = &commit.row {
            let previous = (row.previous_number, row.previous_last, row.previous_chain.as_deref());
            if previous != (Some(self.commit), Some(self.commit_last), Some(self.chain.as_slice())) {
                wrong("chain", "the commit before it is not the one it names".to_owned());
            }
            if begun_at.is_some() && row.recorded_at != self.recorded_at {
                wrong("time", "recorded at another time than its events".to_owned());
            }
        }
        // Go on from what is written: each break of the chain is one finding.
        self.position = self.position.max(commit.last);
        self.commit = commit.number;
        self.commit_last = commit.last;
        self.chain.clone_from(&commit.chain);
        self.commits = self.commits.saturating_add(1);
    }

    /// Commit 0, as the table has it; an export begins without it.
    pub(crate) fn genesis(&mut self, commit: &StoredCommit) {
        if self.chain != commit.chain || (commit.first, commit.last) != (0, 0) {
            self.findings.add(0, Some(0), "genesis", "commit 0 is not the beginning of this ledger");
        }
        self.chain.clone_from(&commit.chain);
        if let Some(row) = &commit.row {
            self.recorded_at = row.recorded_at;
        }
    }

    /// What an export says about its own end.
    pub(crate) fn checkpoint(&mut self, position: i64, commit: i64, chain: &[u8]) {
        if (position, commit, chain) != (self.commit_last, self.commit, self.chain.as_slice()) {
            let end = self.commit_last;
            let detail =
                format!("says position {position}, commit {commit}; the log ends at {end}, commit {}", self.commit);
            self.findings.add(position.min(end).saturating_add(1), Some(self.commit), "checkpoint", detail);
        }
    }

    /// All is read: what could only be seen over the whole log.
    pub(crate) fn end(mut self, views: ViewsChecked) -> io::Result<Report> {
        if let Some(begun_at) = self.begun_at {
            let detail = format!("positions {begun_at} to {} are in no commit", self.position);
            self.findings.add(self.bad_at.unwrap_or(begun_at), None, "commit", detail);
        }
        let currencies = self.fold.end_of_log(self.commit_last, &mut self.findings);
        let seen = [
            (self.keys, "key", "the key was used before, at position"),
            (self.commands, "command", "the command's events do not lie together; it was here before, at position"),
            (self.streams, "transaction-life", "the stream began before, at position"),
        ];
        for (once, check, what) in seen {
            once.repeats(|first, again| self.findings.add(again, None, check, format!("{what} {first}")))?;
        }
        let count = |all: usize| i64::try_from(all).unwrap_or(i64::MAX);
        Ok(Report {
            ledger: self.ledger,
            position: self.commit_last,
            commit: self.commit,
            // A chain of another length was a finding already.
            chain: Hash::try_from(self.chain.as_slice()).unwrap_or_default(),
            events: self.events,
            commits: self.commits,
            wallets: count(self.fold.state.wallets.len()),
            transactions: self.fold.state.statuses.values().copied().fold(0, i64::saturating_add),
            currencies,
            views,
            findings_total: self.findings.total,
            findings: self.findings.into_kept(),
        })
    }

    fn wrong(&mut self, event: &StoredEvent, check: &'static str, detail: impl Into<String>) {
        self.findings.add(event.position, Some(event.commit), check, detail);
    }
}
