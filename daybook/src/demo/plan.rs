//! What happens in a demo, and what must have come of it: both follow from the seed and the number of acts alone.
//!
//! A household is a company and those who work there. What a household does is done in its order; households do not wait
//! for each other. So that timing cannot change an outcome, nobody spends what another household has sent: all that
//! leaves a household goes to shops, and shops only take.
//!
//! Left out: ids and keys, which are a run's own.

use std::collections::BTreeMap;
use std::fmt::Write;

use sha2::{Digest, Sha256};

/// Everything that is to happen.
pub(crate) struct Plan {
    pub(crate) partners: Vec<Partner>,
    pub(crate) wallets: Vec<Wallet>,
    /// In the order in which they are due; each is done after the one before of its household.
    pub(crate) acts: Vec<Act>,
    pub(crate) households: usize,
    pub(crate) outcome: Outcome,
}

pub(crate) struct Partner {
    pub(crate) name: &'static str,
    pub(crate) currency: &'static str,
    pub(crate) digits: u32,
}

pub(crate) struct Wallet {
    pub(crate) partner: usize,
    pub(crate) user: String,
    /// What an administrator puts into it at the beginning, in minor units.
    pub(crate) funds: i64,
}

#[derive(Clone, Debug)]
pub(crate) struct Act {
    pub(crate) household: usize,
    pub(crate) kind: Kind,
}

/// Wallets by their place in the plan, amounts in minor units.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    /// `left` is what the payer then has.
    Pay { from: usize, to: usize, amount: i64, left: i64, words: &'static str },
    /// More than there is.
    Overdraw { from: usize, to: usize, amount: i64 },
    /// The act of this number once more, under the same key.
    Again { of: usize },
    /// Another amount under the key of that act.
    AgainOtherwise { of: usize },
    /// One request with several transfers. Of an atomic one with a refused item nothing is done.
    Batch { from: usize, items: Vec<Item>, atomic: bool },
    /// Through the bank, whose customer pays or does not.
    TopUp { wallet: usize, amount: i64, paid: bool },
    /// Frozen, it cannot pay; then it is unfrozen.
    Freeze { wallet: usize, to: usize, amount: i64 },
    /// On behalf of a user whose wallet it is not.
    Stranger { from: usize, to: usize, amount: i64, user: String },
    /// A wallet with money in it cannot be closed.
    Close { wallet: usize },
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item {
    pub(crate) to: usize,
    pub(crate) amount: i64,
    pub(crate) refused: bool,
}

/// What must have come of it, or what was found: two that are equal have the same digest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// By wallet.
    pub(crate) wallets: Vec<WalletOutcome>,
    /// By partner, and by type and status of its transactions.
    pub(crate) transactions: Vec<BTreeMap<(String, String), u64>>,
    /// By partner and type of event.
    pub(crate) webhooks: Vec<BTreeMap<String, u64>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WalletOutcome {
    /// As it is shown.
    pub(crate) balance: String,
    /// Counts everything that has changed it.
    pub(crate) version: i64,
    pub(crate) status: String,
}

const PARTNERS: [Partner; 3] = [
    Partner { name: "Harbour Market", currency: "EUR", digits: 2 },
    Partner { name: "Savanna Pay", currency: "KES", digits: 2 },
    Partner { name: "Sakura Wallet", currency: "JPY", digits: 0 },
];
const SHOPS: [&str; 3] = ["Corner Café", "Green Grocer", "Night Bus"];
const COMPANIES: [&str; 4] = ["Bright Tailors", "Tide Fisheries", "Copper Press", "Hill Dairy"];
const PEOPLE: [[&str; 4]; 4] = [
    ["Amara", "Bilal", "Chiara", "Dmitri"],
    ["Esi", "Farid", "Grace", "Hiro"],
    ["Ines", "Jomo", "Kenji", "Lucia"],
    ["Malik", "Noor", "Oskar", "Priya"],
];
const PURCHASES: [&str; 6] = ["coffee", "groceries", "a ticket", "lunch", "flowers", "bread"];

/// What a company begins with, in minor units. Far more than it can pay out in any run.
const FUNDS: i64 = 100_000_000_000;

impl Plan {
    pub(crate) fn new(seed: u64, acts: usize) -> Self {
        let mut wallets = Vec::new();
        let mut households = Vec::new();
        for partner in 0..PARTNERS.len() {
            let mut add = |user: String, funds| {
                wallets.push(Wallet { partner, user, funds });
                wallets.len() - 1
            };
            let shops: Vec<_> = SHOPS.iter().map(|shop| add((*shop).to_owned(), 0)).collect();
            for (company, people) in COMPANIES.iter().zip(PEOPLE) {
                let employer = add((*company).to_owned(), FUNDS);
                let people = people.iter().map(|name| add(format!("{name} of {company}"), 0)).collect();
                let random = Random(seed ^ (households.len() as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                households.push(Household { shops: shops.clone(), employer, people, random, payments: Vec::new() });
            }
        }
        let mut book = Book::of(&wallets);
        let mut planned = Vec::with_capacity(acts);
        for number in 0..acts {
            let household = number % households.len();
            let kind = households[household].next(&mut book, number);
            planned.push(Act { household, kind });
        }
        let outcome = book.outcome(&wallets);
        Self { partners: PARTNERS.into(), wallets, acts: planned, households: households.len(), outcome }
    }

    /// An amount of a wallet's currency, as it is written.
    pub(crate) fn money(&self, wallet: usize, amount: i64) -> String {
        written(amount, self.partners[self.wallets[wallet].partner].digits)
    }
}

impl Outcome {
    /// Of balances and transactions; webhooks are not in it, since a system may not be allowed to send them here.
    pub(crate) fn digest(&self) -> String {
        let mut text = String::new();
        for wallet in &self.wallets {
            writeln!(text, "{} {} {}", wallet.balance, wallet.version, wallet.status)
                .expect("writing to a String cannot fail");
        }
        for counts in &self.transactions {
            writeln!(text, "{counts:?}").expect("writing to a String cannot fail");
        }
        let hash = Sha256::digest(text);
        hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

struct Household {
    shops: Vec<usize>,
    employer: usize,
    people: Vec<usize>,
    random: Random,
    /// Acts that are payments: what can be repeated.
    payments: Vec<usize>,
}

impl Household {
    /// The next thing that this household does, which the book then knows.
    fn next(&mut self, book: &mut Book, number: usize) -> Kind {
        let kind = self.choose(book);
        if matches!(kind, Kind::Pay { .. }) {
            self.payments.push(number);
        }
        book.enter(&kind);
        kind
    }

    /// In the proportions in which people do such things.
    fn choose(&mut self, book: &Book) -> Kind {
        let person = self.people[self.random.below(self.people.len())];
        let shop = self.shops[self.random.below(self.shops.len())];
        let has = book.balances[person];
        match self.random.below(100) {
            _ if self.people.iter().all(|person| book.balances[*person] == 0) => self.salaries(false),
            ..=3 => self.salaries(self.random.clone().below(2) == 0),
            4..=9 => Kind::TopUp {
                wallet: person,
                amount: 1_000 + self.random.amount(9_000),
                paid: self.random.below(5) != 0,
            },
            10..=15 => Kind::Overdraw { from: person, to: shop, amount: has + self.random.amount(5_000) },
            16..=19 if !self.payments.is_empty() => Kind::Again { of: self.past_payment() },
            20..=21 if !self.payments.is_empty() => Kind::AgainOtherwise { of: self.past_payment() },
            22..=23 => Kind::Freeze { wallet: person, to: shop, amount: self.random.amount(1_000) },
            24..=25 => {
                let user = "a stranger".to_owned();
                Kind::Stranger { from: person, to: shop, amount: self.random.amount(1_000), user }
            }
            26..=27 => self.batch_with_refusal(book, person, true),
            28 => self.batch_with_refusal(book, person, false),
            29 if 0 < has => Kind::Close { wallet: person },
            30..=41 if 0 < has => {
                let others: Vec<_> = self.people.iter().filter(|other| **other != person).copied().collect();
                let to = others[self.random.below(others.len())];
                self.pay(has, person, to, "a friend")
            }
            _ if 0 < has => {
                let words = PURCHASES[self.random.below(PURCHASES.len())];
                self.pay(has, person, shop, words)
            }
            _ => Kind::TopUp { wallet: person, amount: 1_000 + self.random.amount(9_000), paid: true },
        }
    }

    /// Small against what one has, as purchases are; all of it at times.
    fn pay(&mut self, has: i64, from: usize, to: usize, words: &'static str) -> Kind {
        let amount = if self.random.below(40) == 0 { has } else { self.random.amount((has / 5).clamp(1, 6_000)) };
        Kind::Pay { from, to, amount, left: has - amount, words }
    }

    fn salaries(&mut self, atomic: bool) -> Kind {
        let pay =
            |random: &mut Random, to: &usize| Item { to: *to, amount: 10_000 + random.amount(30_000), refused: false };
        let items = self.people.iter().map(|person| pay(&mut self.random, person)).collect();
        Kind::Batch { from: self.employer, items, atomic }
    }

    /// A small payment that would do, and one that nobody can pay.
    fn batch_with_refusal(&mut self, book: &Book, person: usize, atomic: bool) -> Kind {
        let shop = self.shops[self.random.below(self.shops.len())];
        let has = book.balances[person];
        let good = Item { to: shop, amount: (has / 10).max(1), refused: has == 0 };
        let bad = Item { to: shop, amount: has + 1, refused: true };
        Kind::Batch { from: person, items: vec![good, bad], atomic }
    }

    fn past_payment(&mut self) -> usize {
        self.payments[self.random.below(self.payments.len())]
    }
}

/// The simplest book that can be right: what each wallet has, and how often it changed.
struct Book {
    balances: Vec<i64>,
    versions: Vec<i64>,
    partners: Vec<usize>,
    transactions: Vec<BTreeMap<(String, String), u64>>,
    webhooks: Vec<BTreeMap<String, u64>>,
}

impl Book {
    fn of(wallets: &[Wallet]) -> Self {
        let mut book = Self {
            balances: vec![0; wallets.len()],
            versions: vec![1; wallets.len()],
            partners: wallets.iter().map(|wallet| wallet.partner).collect(),
            transactions: vec![BTreeMap::new(); PARTNERS.len()],
            webhooks: vec![BTreeMap::new(); PARTNERS.len()],
        };
        for (number, wallet) in wallets.iter().enumerate() {
            book.told(number, "wallet.opened");
            if 0 < wallet.funds {
                book.change(number, wallet.funds);
                book.done(number, "ADJUSTMENT");
            }
        }
        book
    }

    fn enter(&mut self, kind: &Kind) {
        match kind {
            Kind::Pay { from, to, amount, .. } => self.transfer(*from, *to, *amount),
            Kind::Overdraw { from, .. } | Kind::Stranger { from, .. } => self.count(*from, "TRANSFER", "FAILED"),
            Kind::Again { .. } | Kind::AgainOtherwise { .. } | Kind::Close { .. } => {}
            Kind::Batch { items, atomic: true, .. } if items.iter().any(|item| item.refused) => {}
            Kind::Batch { from, items, .. } => {
                for item in items {
                    if item.refused {
                        self.count(*from, "TRANSFER", "FAILED");
                    } else {
                        self.transfer(*from, item.to, item.amount);
                    }
                }
            }
            Kind::TopUp { wallet, amount, paid: true } => {
                self.change(*wallet, *amount);
                self.done(*wallet, "TOP_UP");
            }
            Kind::TopUp { wallet, paid: false, .. } => {
                self.count(*wallet, "TOP_UP", "FAILED");
                self.told(*wallet, "transaction.created");
                self.told(*wallet, "transaction.failed");
            }
            Kind::Freeze { wallet, .. } => {
                self.versions[*wallet] += 2;
                self.count(*wallet, "TRANSFER", "FAILED");
                self.told(*wallet, "wallet.frozen");
            }
        }
    }

    fn transfer(&mut self, from: usize, to: usize, amount: i64) {
        self.change(from, -amount);
        self.change(to, amount);
        self.done(from, "TRANSFER");
    }

    fn change(&mut self, wallet: usize, amount: i64) {
        self.balances[wallet] += amount;
        self.versions[wallet] += 1;
    }

    fn done(&mut self, wallet: usize, of_type: &str) {
        self.count(wallet, of_type, "SUCCESS");
        self.told(wallet, "transaction.created");
        self.told(wallet, "transaction.completed");
    }

    fn count(&mut self, wallet: usize, of_type: &str, status: &str) {
        *self.transactions[self.partners[wallet]].entry((of_type.to_owned(), status.to_owned())).or_default() += 1;
    }

    fn told(&mut self, wallet: usize, event: &str) {
        *self.webhooks[self.partners[wallet]].entry(event.to_owned()).or_default() += 1;
    }

    fn outcome(self, wallets: &[Wallet]) -> Outcome {
        let outcome = |number: usize, wallet: &Wallet| WalletOutcome {
            balance: written(self.balances[number], PARTNERS[wallet.partner].digits),
            version: self.versions[number],
            status: "ACTIVE".to_owned(),
        };
        Outcome {
            wallets: wallets.iter().enumerate().map(|(number, wallet)| outcome(number, wallet)).collect(),
            transactions: self.transactions,
            webhooks: self.webhooks,
        }
    }
}

fn written(amount: i64, digits: u32) -> String {
    let unit = 10_i64.pow(digits);
    match digits {
        0 => amount.to_string(),
        _ => format!("{}.{:0width$}", amount / unit, amount % unit, width = digits as usize),
    }
}

/// SplitMix64: the same seed, the same demo.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        usize::try_from(mixed % bound as u64).expect("below a usize")
    }

    /// From 1.
    fn amount(&mut self, most: i64) -> i64 {
        let most = usize::try_from(most).expect("amounts are positive");
        1 + i64::try_from(self.below(most)).expect("below an i64")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_plans_the_same_and_another_one_otherwise() {
        let digest = |seed, acts| Plan::new(seed, acts).outcome.digest();
        assert_eq!(digest(7, 500), digest(7, 500));
        assert_ne!(digest(7, 500), digest(8, 500));
        assert_ne!(digest(7, 500), digest(7, 501));
    }

    #[test]
    fn nobody_is_planned_to_pay_what_another_household_may_still_send() {
        for seed in 0..20 {
            let plan = Plan::new(seed, 2_000);
            let household_of = |act: &Act, wallet: usize| {
                // Wallets come by partner: shops first, then each company with its people.
                let partner = act.household / COMPANIES.len();
                let size = SHOPS.len() + COMPANIES.len() * 5;
                let first = partner * size + SHOPS.len() + (act.household % COMPANIES.len()) * 5;
                (first..first + 5).contains(&wallet)
            };
            for act in &plan.acts {
                let payer = match &act.kind {
                    Kind::Pay { from, .. } | Kind::Overdraw { from, .. } | Kind::Batch { from, .. } => *from,
                    Kind::Stranger { from, .. } => *from,
                    Kind::TopUp { wallet, .. } | Kind::Freeze { wallet, .. } | Kind::Close { wallet } => *wallet,
                    Kind::Again { of } | Kind::AgainOtherwise { of } => {
                        assert_eq!(plan.acts[*of].household, act.household, "seed {seed}");
                        continue;
                    }
                };
                assert!(household_of(act, payer), "seed {seed}: {act:?}");
            }
        }
    }

    #[test]
    fn planned_money_is_neither_made_nor_lost() {
        for seed in 0..20 {
            let plan = Plan::new(seed, 3_000);
            let mut book = Book::of(&plan.wallets);
            let mut from_bank = 0;
            for act in &plan.acts {
                if let Kind::TopUp { amount, paid: true, .. } = act.kind {
                    from_bank += amount;
                }
                book.enter(&act.kind);
                assert!(book.balances.iter().all(|balance| 0 <= *balance), "seed {seed}: {act:?}");
            }
            let funds: i64 = plan.wallets.iter().map(|wallet| wallet.funds).sum();
            assert_eq!(book.balances.iter().sum::<i64>(), funds + from_bank, "seed {seed}");
        }
    }

    #[test]
    fn every_kind_of_act_is_planned() {
        let plan = Plan::new(1, 2_000);
        let kinds: std::collections::BTreeSet<_> = plan
            .acts
            .iter()
            .map(|act| format!("{:?}", act.kind).split([' ', '{']).next().unwrap().to_owned())
            .collect();
        assert_eq!(kinds.len(), 9, "{kinds:?}");
    }
}
