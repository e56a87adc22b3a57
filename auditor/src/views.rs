//! The views beside the log: what they show must be what the fold comes to, at the position each has reached.
//!
//! A view behind the head is compared with the fold as it was at the view's position. Statements and
//! transactions are as many as events, so they are not kept but added up: two sides that show the same have the
//! same [`Fingerprint`], in whatever order their rows come.
//!
//! Left out: what is only shape (names, descriptions, metadata, times). The log has them; a rebuild makes them anew.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::Context;
use rust_decimal::Decimal;
use sha2::{Digest, Sha256};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use crate::fold::{Fold, State, Wallet};
use crate::report::{Findings, ViewChecked, ViewsChecked};

/// Rows fetched at a time.
const PAGE: i64 = 5_000;

/// The sum of the hashes of many rows. A changed, missing or surplus row changes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fingerprint(u128);

impl Fingerprint {
    pub(crate) fn add(&mut self, row: &[&str]) {
        self.0 = self.0.wrapping_add(Self::of(row));
    }

    pub(crate) fn take(&mut self, row: &[&str]) {
        self.0 = self.0.wrapping_sub(Self::of(row));
    }

    fn of(row: &[&str]) -> u128 {
        let hash = Sha256::digest(row.join("\n"));
        let (half, _) = hash.split_first_chunk().expect("a SHA-256 has 32 bytes");
        u128::from_be_bytes(*half)
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
        "balances" => balances(connection, position, state, findings).await?,
        "entries" => entries(connection, position, state, findings).await?,
        "transactions" => transactions(connection, position, state, findings).await?,
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
    of_wallets.missing(|_| true);
    Ok(rows)
}

async fn balances(
    connection: &mut PgConnection,
    position: i64,
    state: &State,
    findings: &mut Findings,
) -> anyhow::Result<i64> {
    let mut of_wallets = OfWallets::new("balances", position, state, findings);
    let rows = each(connection, "select wallet_id, version, balance from views.balances", |row| {
        let (version, balance): (i64, Decimal) = (row.try_get("version")?, row.try_get("balance")?);
        let shown = format!("{} at version {version}", balance.normalize());
        of_wallets.compare(row.try_get("wallet_id")?, &shown, |wallet| {
            format!("{} at version {}", wallet.balance.normalize(), wallet.version)
        });
        Ok(())
    });
    let rows = rows.await?;
    of_wallets.missing(|_| true);
    Ok(rows)
}

/// One line of a wallet's statement, as both sides write it.
pub(crate) fn statement_line(
    version: i64,
    position: i64,
    transaction: Uuid,
    change: Decimal,
    balance_after: Decimal,
) -> [String; 5] {
    let number = |number: Decimal| number.normalize().to_string();
    [version.to_string(), position.to_string(), transaction.to_string(), number(change), number(balance_after)]
}

async fn entries(
    connection: &mut PgConnection,
    position: i64,
    state: &State,
    findings: &mut Findings,
) -> anyhow::Result<i64> {
    let query = "select wallet_id, wallet_version, position, transaction_id, change, balance_after from views.entries";
    let mut statements: HashMap<Uuid, (i64, Fingerprint)> = HashMap::new();
    let rows = each(connection, query, |row| {
        let (lines, fingerprint) = statements.entry(row.try_get("wallet_id")?).or_default();
        *lines = lines.saturating_add(1);
        let transaction = row.try_get("transaction_id")?;
        let (change, after) = (row.try_get("change")?, row.try_get("balance_after")?);
        let line = statement_line(row.try_get("wallet_version")?, row.try_get("position")?, transaction, change, after);
        fingerprint.add(&line.each_ref().map(String::as_str));
        Ok(())
    });
    let rows = rows.await?;
    let mut of_wallets = OfWallets::new("entries", position, state, findings);
    for (id, (lines, fingerprint)) in statements {
        let differs =
            state.wallets.get(&id).is_some_and(|wallet| wallet.entries == lines && wallet.statement != fingerprint);
        let others = if differs { ", other ones" } else { "" };
        of_wallets.compare(id, &format!("{lines} lines{others}"), |wallet| format!("{} lines", wallet.entries));
    }
    of_wallets.missing(|wallet| wallet.entries != 0);
    Ok(rows)
}

async fn transactions(
    connection: &mut PgConnection,
    position: i64,
    state: &State,
    findings: &mut Findings,
) -> anyhow::Result<i64> {
    let query =
        "select id, position, status, kind, wallet_id, body->>'status' as body_status, body->>'amount' as amount,
                     body->>'currency' as currency
                 from views.transactions";
    let (mut statuses, mut fingerprint) = (BTreeMap::<String, i64>::new(), Fingerprint::default());
    let rows = each(connection, query, |row| {
        let text = |column| Ok::<_, sqlx::Error>(row.try_get::<Option<String>, _>(column)?.unwrap_or_default());
        let (status, in_body) = (text("status")?, text("body_status")?);
        let ids = ["id", "wallet_id"].map(|column| row.try_get::<Uuid, _>(column));
        let [id, wallet] = ids.map(|id| id.map(|id| id.to_string()));
        let position = row.try_get::<i64, _>("position")?.to_string();
        let shown = if status == in_body { &status } else { "two statuses" };
        fingerprint.add(&[&id?, &position, shown, &text("kind")?, &wallet?, &text("amount")?, &text("currency")?]);
        let count = statuses.entry(status).or_default();
        *count = count.saturating_add(1);
        Ok(())
    });
    let rows = rows.await?;
    let ours = state.statuses.iter().filter(|(_, count)| **count != 0);
    let ours: BTreeMap<_, _> = ours.map(|(status, count)| ((*status).to_owned(), *count)).collect();
    if statuses != ours {
        findings.add(position, None, "view", format!("transactions: {statuses:?} are shown where {ours:?} belong"));
    } else if fingerprint != state.transactions {
        findings.add(position, None, "view", "transactions: as many as in the log, and not the same");
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

    fn missing(self, should_be_there: impl Fn(&Wallet) -> bool) {
        let wallets =
            self.state.wallets.iter().filter(|(id, wallet)| should_be_there(wallet) && !self.seen.contains(id));
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
