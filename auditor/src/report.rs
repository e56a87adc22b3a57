//! What was looked at and what was found: for people by `Display`, for programs by `Serialize`.

use std::collections::BTreeMap;
use std::fmt;

use rust_decimal::Decimal;
use serde::{Serialize, Serializer};
use uuid::Uuid;

use crate::hash::hex;

/// How many findings are kept: those at the lowest positions. One break can show in everything that follows it.
const FINDINGS_MAX: usize = 100;

/// The outcome of an audit, or of verifying an export.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub ledger: Option<Uuid>,
    /// Where the log ends; with `commit` and `chain` it is the checkpoint to keep elsewhere.
    pub position: i64,
    pub commit: i64,
    #[serde(serialize_with = "as_hex")]
    pub chain: [u8; 32],
    /// How many were read.
    pub events: i64,
    pub commits: i64,
    pub wallets: i64,
    pub transactions: i64,
    /// What the wallets hold by our own fold, by currency.
    pub currencies: BTreeMap<String, CurrencyTotal>,
    pub views: ViewsChecked,
    /// At the lowest positions first; at most 100 of `findings_total`.
    pub findings: Vec<Finding>,
    pub findings_total: i64,
}

/// Something that should not be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// The position that is wrong; for a commit as a whole, its first bad or else its first position.
    pub position: Option<i64>,
    pub commit: Option<i64>,
    /// Which check says so.
    pub check: &'static str,
    pub detail: String,
}

/// The sums of balances in one currency. All wallets together hold nothing: what some have, others owe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CurrencyTotal {
    pub wallets: i64,
    #[serde(with = "rust_decimal_text")]
    pub customers: Decimal,
    #[serde(with = "rust_decimal_text")]
    pub partners: Decimal,
    #[serde(with = "rust_decimal_text")]
    pub system: Decimal,
}

/// Whether the views were compared with the fold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ViewsChecked {
    #[serde(rename_all = "camelCase")]
    Checked {
        views: Vec<ViewChecked>,
    },
    NotChecked {
        why: &'static str,
    },
}

/// One view, compared at the position that it had reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ViewChecked {
    pub name: String,
    pub position: i64,
    /// How many rows were compared; `None`: it could not be, or it is a view that this auditor does not know.
    pub compared: Option<i64>,
}

impl Report {
    /// Whether nothing was found. Views that were not there to be compared are not unsound.
    pub fn is_sound(&self) -> bool {
        self.findings_total == 0
    }

    /// The lowest position at which something is wrong; 0 is the ledger itself, before its first event.
    pub fn first_bad_position(&self) -> Option<i64> {
        self.findings.iter().find_map(|finding| finding.position)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(finding) = self.findings.first() {
            match self.first_bad_position() {
                Some(position) => writeln!(f, "NOT SOUND: first bad position {position}: {finding}")?,
                None => writeln!(f, "NOT SOUND: {finding}")?,
            }
        } else {
            writeln!(f, "sound")?;
        }
        let ledger = self.ledger.map_or("unknown".to_owned(), |id| id.to_string());
        writeln!(f, "ledger       {ledger}")?;
        writeln!(f, "position     {}", self.position)?;
        writeln!(f, "commit       {}", self.commit)?;
        writeln!(f, "chain        {}", hex(&self.chain))?;
        writeln!(f, "read         {} events, {} commits", self.events, self.commits)?;
        writeln!(f, "folded       {} wallets, {} transactions", self.wallets, self.transactions)?;
        if !self.currencies.is_empty() {
            writeln!(f, "\ncurrency  wallets             customers              partners                system")?;
            for (currency, total) in &self.currencies {
                let CurrencyTotal { wallets, customers, partners, system } = total;
                writeln!(f, "{currency:<8} {wallets:>8}  {customers:>20}  {partners:>20}  {system:>20}")?;
            }
        }
        match &self.views {
            ViewsChecked::NotChecked { why } => writeln!(f, "\nviews        not checked: {why}")?,
            ViewsChecked::Checked { views } => {
                writeln!(f, "\nview                  position      compared")?;
                for ViewChecked { name, position, compared } in views {
                    let compared = compared.map_or("not compared".to_owned(), |rows| format!("{rows} rows"));
                    writeln!(f, "{name:<16} {position:>13} {compared:>13}")?;
                }
            }
        }
        if !self.findings.is_empty() {
            writeln!(f, "\nposition  commit  check  detail")?;
            for finding in &self.findings {
                let number = |n: Option<i64>| n.map_or("-".to_owned(), |n| n.to_string());
                let Finding { position, commit, check, detail } = finding;
                writeln!(f, "{:>8}  {:>6}  {check}  {detail}", number(*position), number(*commit))?;
            }
            let kept = i64::try_from(self.findings.len()).unwrap_or(i64::MAX);
            if kept < self.findings_total {
                writeln!(f, "and {} more", self.findings_total.saturating_sub(kept))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.check, self.detail)
    }
}

/// The findings so far: those at the lowest positions are kept, all are counted.
#[derive(Default)]
pub(crate) struct Findings {
    kept: Vec<Finding>,
    pub(crate) total: i64,
}

impl Findings {
    pub(crate) fn add(&mut self, position: i64, commit: Option<i64>, check: &'static str, detail: impl Into<String>) {
        self.total = self.total.saturating_add(1);
        let place = self.kept.partition_point(|kept| kept.position <= Some(position));
        if place < FINDINGS_MAX {
            let detail = detail.into();
            self.kept.insert(place, Finding { position: Some(position), commit, check, detail });
            self.kept.truncate(FINDINGS_MAX);
        }
    }

    pub(crate) fn into_kept(self) -> Vec<Finding> {
        self.kept
    }
}

fn as_hex<S: Serializer>(hash: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hex(hash))
}

/// Decimals as text, whatever features of rust_decimal others switch on.
mod rust_decimal_text {
    use super::*;

    pub(super) fn serialize<S: Serializer>(number: &Decimal, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(number)
    }
}
