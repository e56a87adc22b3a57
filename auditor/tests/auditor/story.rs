//! A small history to audit: decided by the real book and sealed as the real writer seals, in memory or on Postgres.

use std::sync::Arc;

use event_store::{Commit, Draft, Head, Writer, hash};
use ledger_core::*;
use uuid::Uuid;

/// A log as it grows.
pub(crate) struct Story {
    pub(crate) ledger: LedgerId,
    pub(crate) commits: Vec<Commit>,
    pub(crate) alice: WalletId,
    pub(crate) bob: WalletId,
    pub(crate) partner: PartnerId,
    book: Book,
    head: Head,
    keys: u8,
}

impl Story {
    /// A partner with wallets in euros and yen; nobody has anything yet.
    pub(crate) fn begin(ledger: LedgerId) -> Self {
        let recorded_at = Timestamp::from_micros(1_800_000_000_000_000).unwrap();
        let head = Head { position: 0, commit: 0, chain: hash::genesis(ledger), recorded_at };
        let wallet = || WalletId::from_uuid(Uuid::now_v7());
        let partner = PartnerId::from_uuid(Uuid::now_v7());
        let (alice, bob) = (wallet(), wallet());
        let mut story = Self { ledger, commits: Vec::new(), alice, bob, partner, book: Book::default(), head, keys: 0 };
        let eur = "EUR".parse().unwrap();
        story.commit([Action::RegisterPartner {
            partner,
            name: "Café Münz".to_owned(),
            currencies: vec![(eur, wallet()), ("JPY".parse().unwrap(), wallet())],
            client: ClientId::from_uuid(Uuid::now_v7()),
        }]);
        for (wallet, user) in [(alice, "alice"), (bob, "bob")] {
            let metadata = Metadata::from_iter([("tier".to_owned(), "gold".into())]);
            story.commit([Action::OpenWallet { wallet, user: user.into(), currency: eur, metadata }]);
        }
        story
    }

    /// Everything that can happen to wallets and transactions, once at least, in commits of one and of many events.
    pub(crate) fn told(ledger: LedgerId) -> Self {
        let mut story = Self::begin(ledger);
        let (alice, bob) = (story.alice, story.bob);
        story.fund(alice, "100.00");
        story.commit((0..5).map(|_| transfer(alice, bob, "1.00")).collect::<Vec<_>>());
        story.commit([transfer(bob, alice, "2.50")]);
        story.commit([transfer(alice, bob, "1000000.00")]); // refused: kept, because it has a key
        let items = ["3.00", "1000000.00", "0.50"];
        story.commit([batch(false, items.map(|amount| (alice, bob, amount)))]); // the second is refused
        story.commit([batch(true, items.map(|amount| (alice, bob, amount)))]); // refused
        story.commit([batch(true, [(alice, bob, "2.00"), (bob, alice, "5.50")])]);
        let [settled, failed, expired] = [(); 3].map(|()| TransactionId::from_uuid(Uuid::now_v7()));
        story.commit([settled, failed, expired].map(|transaction| Action::RequestTopUp {
            transaction,
            instruction: Arc::new(instruction(TransactionKind::TopUp, alice, None, "20.00")),
            payment: Payment { token: "tok".to_owned(), redirect_url: "https://bank".to_owned(), return_url: None },
        }));
        let failure = Failure { code: "declined".to_owned(), detail: "no".to_owned() };
        story.commit([
            Action::Settle { transaction: settled, money: euros("20.00"), provider_reference: "b-1".to_owned() },
            Action::Fail { transaction: failed, failure },
        ]);
        story.commit([Action::Expire { transaction: expired }]);
        story.commit([Action::FreezeWallet { wallet: bob, reason: "asked".to_owned() }]);
        story.commit([transfer(alice, bob, "1.00")]); // refused
        story.commit([Action::FreezeWallet { wallet: bob, reason: "again".to_owned() }]); // refused
        story.commit([Action::UnfreezeWallet { wallet: bob, reason: "done".to_owned() }]);
        story.commit([transfer(bob, alice, "2.50")]);
        story.commit([Action::CloseWallet { wallet: bob, reason: "left".to_owned() }]);
        let partner = story.partner;
        let suspend = || Action::SuspendPartner { partner, reason: Some("leaked".to_owned()) };
        story.commit([suspend(), Action::RotateSecret { partner }, Action::ResumePartner { partner }, suspend()]);
        story.fund(alice, "0.01");
        story
    }

    pub(crate) fn fund(&mut self, wallet: WalletId, amount: &str) {
        let mut funding = instruction(TransactionKind::Adjustment, wallet, None, amount);
        funding.direction = Some(Direction::Credit);
        let transaction = TransactionId::from_uuid(Uuid::now_v7());
        self.commit([Action::Adjust { transaction, instruction: Arc::new(funding) }]);
    }

    /// Decides the actions one after another, each under a key of its own, and seals what follows as one commit.
    pub(crate) fn commit(&mut self, actions: impl IntoIterator<Item = Action>) {
        let mut drafts = Vec::new();
        for action in actions {
            self.keys += 1;
            let caller = match action {
                Action::Transfer { .. }
                | Action::Batch { .. }
                | Action::OpenWallet { .. }
                | Action::RequestTopUp { .. } => Caller::Partner { partner: self.partner, user: None },
                _ => Caller::Admin,
            };
            let command = Command {
                id: CommandId::from_uuid(Uuid::now_v7()),
                key: Some(Key { hash: [self.keys; 16], request: [self.keys; 32] }),
                caller,
                action,
                metadata: r#"{"clientId":"cli_1","requestId":"req_1"}"#.into(),
            };
            let position = self.head.position + 1 + drafts.len() as i64;
            let events = self.book.execute(&command, position).unwrap();
            for (place, event) in events.into_iter().enumerate() {
                let key = command.key.filter(|_| place == 0);
                drafts.push(Draft::new(command.id, key, &command.metadata, event));
            }
        }
        let now = Timestamp::from_micros(self.head.recorded_at.micros() + 1_500_000).unwrap();
        self.seal(now, &drafts);
    }

    /// Seals drafts that nobody decided.
    pub(crate) fn seal(&mut self, now: Timestamp, drafts: &[Draft]) {
        let commit = Commit::seal(&self.head, now, drafts);
        self.head = commit.head();
        self.commits.push(commit);
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.head.recorded_at
    }

    /// The position of the nth event of a type.
    pub(crate) fn position(&self, event_type: &str, nth: usize) -> i64 {
        let mut found = self.commits.iter().flat_map(|commit| &commit.events).filter(|it| it.event_type == event_type);
        found.nth(nth).expect("the story has such an event").position
    }

    /// An export, written by the store's own JSON rather than by the auditor's.
    pub(crate) fn export(&self) -> String {
        let hex = |hash: &[u8]| hash::hex(hash);
        let mut lines = vec![format!(r#"{{"ledger":{{"id":"{}","format":1}}}}"#, self.ledger)];
        for commit in &self.commits {
            lines.extend(commit.events.iter().map(|event| serde_json::to_string(event).unwrap()));
            let Commit { number, first, last, root, chain, .. } = commit;
            let (root, chain) = (hex(root), hex(chain));
            lines.push(format!(
                r#"{{"commit":{{"number":{number},"first":{first},"last":{last},"root":"{root}","chain":"{chain}"}}}}"#
            ));
        }
        let Head { position, commit, chain, .. } = self.head;
        let chain = hex(&chain);
        lines.push(format!(r#"{{"checkpoint":{{"position":{position},"commit":{commit},"chain":"{chain}"}}}}"#));
        lines.iter().map(|line| format!("{line}\n")).collect()
    }

    /// Appends the whole story to a database that has none yet.
    pub(crate) async fn write(&mut self, writer: &mut Writer) {
        for commit in &self.commits {
            writer.append(commit).await.unwrap();
        }
    }
}

pub(crate) fn euros(amount: &str) -> Money {
    Money::parse(amount, "EUR".parse().unwrap()).unwrap()
}

pub(crate) fn transfer(from: WalletId, to: WalletId, amount: &str) -> Action {
    Action::Transfer {
        transaction: TransactionId::from_uuid(Uuid::now_v7()),
        instruction: Arc::new(instruction(TransactionKind::Transfer, from, Some(to), amount)),
    }
}

fn batch<const ITEMS: usize>(atomic: bool, items: [(WalletId, WalletId, &str); ITEMS]) -> Action {
    let transfers = items.map(|(from, to, amount)| {
        let instruction = instruction(TransactionKind::Transfer, from, Some(to), amount);
        (TransactionId::from_uuid(Uuid::now_v7()), Arc::new(instruction))
    });
    Action::Batch { atomic, transfers: transfers.into() }
}

pub(crate) fn instruction(kind: TransactionKind, wallet: WalletId, to: Option<WalletId>, amount: &str) -> Instruction {
    Instruction {
        kind,
        partner_id: None,
        user_id: None,
        wallet_id: wallet,
        to_wallet_id: to,
        direction: None,
        amount: euros(amount).amount(),
        currency: euros(amount).currency(),
        reference: Some("order 7 — „ü“".to_owned()),
        description: None,
        metadata: Metadata::new(),
        effective_at: None,
    }
}
