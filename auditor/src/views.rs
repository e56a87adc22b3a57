//! The views beside the log: what they show must be what the fold comes to, at the position each has reached.
//!
//! A view behind the head is compared with the fold as it was at the view's position. Postings are more than events, so
//! they are not kept but added up: two sides that have the same come to the same [`Tally`], in whatever order. What they
//! lead to is read in the log itself, which is checked anyway.
//!
//! Left out: what is only shape (names, descriptions, metadata, times). The log has them; a rebuild makes them anew.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::Context;
use sha2::{Digest, Sha256};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use crate::fold::{Fold, State, Wallet};
use crate::report::{Findings, ViewChecked, ViewsChecked};

/// Rows fetched at a time.
const PAGE: i64 = 5_000;

/// How many postings, and the sum of their hashes. A changed, missing or surplus one changes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    count: i64,
    sum: u128,
}

/// All of them: which events answer which question.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Postings(Tally);

impl Tally {
    pub(crate) fn add(&mut self, term: Uuid, position: i64) {
        let hash = Sha256::new().chain_update(term.as_bytes()).chain_update(position.to_be_bytes()).finalize();
        let (half, _) = hash.split_first_chunk().expect("a SHA-256 has 32 bytes");
        self.count = self.count.saturating_add(1);
        self.sum = self.sum.wrapping_add(u128::from_be_bytes(*half));
    }
}

impl Postings {
    /// The event answers what is asked by an id: what changed this wallet, how this partner's transactions began.
    pub(crate) fn add(&mut self, id: Uuid, position: i64) {
        self.0.add(id, position);
    }

    /// Or by something else: the term is the first half of SHA-256(word ‖ 0 ‖ bytes).
    pub(crate) fn add_of(&mut self, word: &str, bytes: &[u8], position: i64) {
        let hash = Sha256::new().chain_update(word).chain_update([0]).chain_update(bytes).finalize();
        let (half, _) = hash.split_first_chunk().expect("a SHA-256 has 32 bytes");
        self.0.add(Uuid::from_bytes(*half), position);
    }
}

/// The views as this snapshot has them, and what the fold was at their positions.
pub(crate) struct Views {
    /// None: there are no views here.
    checkpoints: Option<Vec<(String, i64)>>,
    head: i64,
    /// By position; `None` until the fold has been there. The head is not among them: there the fold itself is compared.
    remembered: BTreeMap<i64, Option<State>>,
}

impl Views {
    pub(crate) async fn open(connection: &mut PgConnection, head: i64) -> anyhow::Result<Self> {
        let exist: bool = sqlx::query_scalar("select to_regclass('views.checkpoints') is not null")
            .fetch_one(&mut *connection)
            .await?;
        if !exist {
            return Ok(Self { checkpoints: None, head, remembered: BTreeMap::new() });
        }
        let checkpoints: Vec<(String, i64)> =
            sqlx::query_as("select view, position from views.checkpoints order by view")
                .fetch_all(connection)
                .await
                .context("reading the views' positions")?;
        let behind = checkpoints.iter().map(|(_, position)| *position).filter(|position| (1..head).contains(position));
        let mut remembered: BTreeMap<_, _> = behind.map(|position| (position, None)).collect();
        remembered.insert(0, Some(State::default()));
        Ok(Self { checkpoints: Some(checkpoints), head, remembered })
    }

    /// The fold is at the end of a commit.
    pub(crate) fn reached(&mut self, position: i64, fold: &Fold) {
        if position < self.head
            && let Some(remembered) = self.remembered.get_mut(&position)
        {
            *remembered = Some(fold.state.clone());
        }
    }

    pub(crate) async fn compare(
        self,
        connection: &mut PgConnection,
        fold: &Fold,
        findings: &mut Findings,
    ) -> anyhow::Result<ViewsChecked> {
        let Some(checkpoints) = self.checkpoints else {
            return Ok(ViewsChecked::NotChecked { why: "this database has no views" });
        };
        let mut views = Vec::new();
        for (name, position) in checkpoints {
            let state = match self.remembered.get(&position) {
                _ if position == self.head => Some(&fold.state),
                Some(remembered) => remembered.as_ref(),
                None => None,
            };
            let compared = match state {
                Some(state) => {
                    let comparing = format!("comparing the view {name}");
                    compare(connection, &name, position, state, findings).await.context(comparing)?
                }
                None if self.head < position => {
                    let detail =
                        format!("{name} is at position {position}: the log that it was made from went further");
                    findings.add(self.head.saturating_add(1), None, "view", detail);
                    None
                }
                None => {
                    findings.add(position, None, "view", format!("{name} stands within a commit"));
                    None
                }
            };
            views.push(ViewChecked { name, position, compared });
        }
        Ok(ViewsChecked::Checked { views })
    }
}

/// Compares one view by its name; answers how many rows were looked at, or `None` if no such view is known here.
async fn compare(
    connection: &mut PgConnection,
    name: &str,
    position: i64,
    state: &State,
    findings: &mut Findings,
) -> anyhow::Result<Option<i64>> {
    let compared = match name {
        "partners" => partners(connection, position, state, findings).await?,
        "wallets" => wallets(connection, position, state, findings).await?,
        "postings" => postings(connection, position, state, findings).await?,
        _ => return Ok(None),
    };
    Ok(Some(compared))
}

async fn partners(
    connection: &mut PgConnection,
    position: i64,
    state: &State,
    findings: &mut Findings,
) -> anyhow::Result<i64> {
    let mut shown = HashMap::new();
    let rows = each(connection, "select id, status from views.partners", |row| {
        shown.insert(row.try_get::<Uuid, _>("id")?, row.try_get::<String, _>("status")?);
        Ok(())
    });
    let rows = rows.await?;
    for (id, status) in &shown {
        let told = match state.partners.get(id) {
            None => format!("partners: par_{id} is shown and not in the log"),
            Some(partner) if (status == "SUSPENDED") != partner.suspended => {
                format!("partners: par_{id} is shown as {status}, which it is not")
            }
            Some(_) => continue,
        };
        findings.add(position, None, "view", told);
    }
    for id in state.partners.keys().filter(|id| !shown.contains_key(*id)) {
        findings.add(position, None, "view", format!("partners: par_{id} is not shown"));
    }
    Ok(rows)
}

async fn wallets(
    connection: &mut PgConnection,
    position: i64,
    state: &State,
    findings: &mut Findings,
) -> anyhow::Result<i64> {
    let query = "select id, partner_id, kind, currency, status from views.wallets";
    let mut of_wallets = OfWallets::new("wallets", position, state, findings);
    let rows = each(connection, query, |row| {
        let partner: Option<Uuid> = row.try_get("partner_id")?;
        let [kind, currency, status] = ["kind", "currency", "status"].map(|column| row.try_get::<String, _>(column));
        let shown = format!("{} {} {} of {}", kind?, currency?, status?, partner.unwrap_or_default());
        of_wallets.compare(row.try_get("id")?, &shown, |wallet| {
            let (kind, code, status) = (wallet.kind.name(), wallet.currency.code(), wallet.status.name());
            format!("{kind} {code} {status} of {}", wallet.partner.unwrap_or_default())
        });
        Ok(())
    });
    let rows = rows.await?;
    of_wallets.missing();
    Ok(rows)
}

async fn postings(
    connection: &mut PgConnection,
    position: i64,
    state: &State,
    findings: &mut Findings,
) -> anyhow::Result<i64> {
    let query = "select term, unnest(earlier || position) as position from views.postings";
    let mut all = Postings::default();
    let mut of_each: HashMap<Uuid, Tally> = HashMap::with_capacity(state.wallets.len());
    let rows = each(connection, query, |row| {
        let (term, position): (Uuid, i64) = (row.try_get("term")?, row.try_get("position")?);
        all.add(term, position);
        if state.wallets.contains_key(&term) {
            of_each.entry(term).or_default().add(term, position);
        }
        Ok(())
    });
    let rows = rows.await?;
    if all == state.postings {
        return Ok(rows);
    }
    let mut told = false;
    for (id, wallet) in &state.wallets {
        let found = of_each.get(id).copied().unwrap_or_default();
        if found != wallet.changes {
            let (count, belong) = (found.count, wallet.changes.count);
            let others = if count == belong { ", other ones" } else { "" };
            let detail = format!("postings: wal_{id}: {count} changes{others} are found where {belong} belong");
            findings.add(wallet.position, None, "view", detail);
            told = true;
        }
    }
    if !told {
        let (count, belong) = (all.0.count, state.postings.0.count);
        let others = if count == belong { ", other ones" } else { "" };
        let detail = format!("postings: {count}{others} where {belong} belong, and no wallet's changes are among them");
        findings.add(position, None, "view", detail);
    }
    Ok(rows)
}

/// A view with something to show about wallets.
struct OfWallets<'a> {
    view: &'static str,
    position: i64,
    state: &'a State,
    findings: &'a mut Findings,
    seen: HashSet<Uuid>,
}

impl<'a> OfWallets<'a> {
    fn new(view: &'static str, position: i64, state: &'a State, findings: &'a mut Findings) -> Self {
        Self { view, position, state, findings, seen: HashSet::new() }
    }

    fn compare(&mut self, id: Uuid, shown: &str, belongs: impl Fn(&Wallet) -> String) {
        self.seen.insert(id);
        let Some(wallet) = self.state.wallets.get(&id) else {
            let detail = format!("{}: wal_{id} is shown and not in the log", self.view);
            self.findings.add(self.position, None, "view", detail);
            return;
        };
        let belongs = belongs(wallet);
        if belongs != shown {
            let detail = format!("{}: wal_{id}: {shown} is shown where {belongs} belongs", self.view);
            self.findings.add(wallet.position, None, "view", detail);
        }
    }

    fn missing(self) {
        let wallets = self.state.wallets.iter().filter(|(id, _)| !self.seen.contains(id));
        for (id, wallet) in wallets {
            self.findings.add(wallet.position, None, "view", format!("{}: wal_{id} is not shown", self.view));
        }
    }
}

/// Reads all rows of a query in bounded memory; answers how many there were.
async fn each(
    connection: &mut PgConnection,
    query: &str,
    mut read: impl FnMut(&PgRow) -> Result<(), sqlx::Error>,
) -> Result<i64, sqlx::Error> {
    sqlx::raw_sql(&format!("declare view no scroll cursor for {query}")).execute(&mut *connection).await?;
    let mut count = 0_i64;
    loop {
        // Not kept as a prepared statement: the cursor of this name is another one the next time.
        let fetch = format!("fetch forward {PAGE} from view");
        let rows = sqlx::query(&fetch).persistent(false).fetch_all(&mut *connection).await?;
        if rows.is_empty() {
            break;
        }
        for row in &rows {
            read(row)?;
            count = count.saturating_add(1);
        }
    }
    sqlx::raw_sql("close view").execute(connection).await?;
    Ok(count)
}
