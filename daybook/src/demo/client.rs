//! A run: what was planned, done over the public API under ids and keys of its own, and what came of it, read back.
//!
//! Whatever is not answered, or answered "not now", is asked again under the same key, within a bound: what happened is
//! known in the end, and happened once.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use reqwest::header::HeaderMap;
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

use super::plan::{Act, Item, Kind, Outcome, Plan, WalletOutcome};
use super::receiver::Receiver;
use super::system::System;

pub(crate) struct Run {
    pub(crate) plan: Arc<Plan>,
    /// Ids of the plan's wallets.
    pub(crate) wallets: Vec<String>,
    /// `None`: webhooks may not be sent here.
    pub(crate) receiver: Option<Receiver>,
    client: Client,
    base_url: String,
    bank_url: String,
    /// The administrator, and behind it the plan's partners as far as they are registered.
    partners: Vec<PartnerAccess>,
    /// Whose webhook was asked for without an answer that we know: it may be registered, or still be about to be.
    unanswered: Option<usize>,
    /// What all keys of this run begin with.
    name: String,
    /// The furthest position that an answer has named.
    position: AtomicI64,
    /// By act, the transaction that a payment became.
    payments: Mutex<BTreeMap<usize, String>>,
    /// By partner.
    completed: Mutex<Vec<BTreeSet<String>>>,
}

struct PartnerAccess {
    credentials: Value,
    token: Mutex<String>,
}

/// An act that came out as planned.
pub(crate) struct Done {
    pub(crate) words: String,
    pub(crate) latency: Duration,
    pub(crate) refused: bool,
    pub(crate) repeated: bool,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Value,
    latency: Duration,
}

/// For one request, and for one act with its repetitions, where nothing else bounds it.
const REQUEST_TIME: Duration = Duration::from_secs(20);
const ACT_TIME: Duration = Duration::from_secs(90);
const PAUSE: Duration = Duration::from_millis(200);

/// For taking everything back: whoever waits for it has seen enough.
const CLEAN_UP_TIME: Duration = Duration::from_secs(10);

/// A server goes on with a request whose client has left. This long is looked for what may come of it.
const SETTLE_TIME: Duration = Duration::from_secs(2);

impl Run {
    /// Nothing of it is in the system yet.
    pub(crate) async fn new(system: &System, plan: Arc<Plan>) -> anyhow::Result<Self> {
        let admin = serde_json::to_value(&system.connection.admin)?;
        Ok(Self {
            client: Client::builder().no_proxy().timeout(REQUEST_TIME).build()?,
            base_url: system.connection.base_url.clone(),
            bank_url: system.connection.bank_url.clone(),
            wallets: Vec::new(),
            receiver: Some(Receiver::start(plan.partners.len()).await?),
            partners: vec![PartnerAccess { credentials: admin, token: Mutex::default() }],
            unanswered: None,
            name: format!("demo-{}", Uuid::now_v7().simple()),
            position: AtomicI64::new(0),
            payments: Mutex::default(),
            completed: Mutex::new(vec![BTreeSet::new(); plan.partners.len()]),
            plan,
        })
    }

    /// Registers the partners, asks for webhooks, and opens and funds the wallets.
    pub(crate) async fn prepare(&mut self) -> anyhow::Result<()> {
        let plan = self.plan.clone();
        for (number, partner) in plan.partners.iter().enumerate() {
            let body = json!({"name": self.name_of(number), "currencies": [partner.currency]});
            let key = format!("partner-{number}");
            let registered = self.expect(ADMIN, "/v1/partners", &key, &body, StatusCode::CREATED).await?.body;
            let mut secret = registered["clientSecret"].clone();
            if secret.is_null() {
                // The answer that had it was lost on its way.
                let route = format!("/v1/partners/{}/rotate-secret", text(&registered["id"]));
                let rotated = self.expect(ADMIN, &route, &format!("{key}-secret"), &json!({}), StatusCode::OK).await?;
                secret = rotated.body["clientSecret"].clone();
            }
            let credentials = json!({"clientId": registered["clientId"], "clientSecret": secret});
            self.partners.push(PartnerAccess { credentials, token: Mutex::default() });
        }
        for partner in 0..plan.partners.len() {
            self.ask_for_webhooks(partner).await?;
        }
        for (number, wallet) in plan.wallets.iter().enumerate() {
            let (who, currency) = (wallet.partner + 1, plan.partners[wallet.partner].currency);
            let body = json!({"userId": wallet.user, "currency": currency});
            let key = format!("wallet-{number}");
            let opened = self.expect(who, "/v1/wallets", &key, &body, StatusCode::CREATED).await?;
            self.wallets.push(text(&opened.body["id"]));
            if 0 < wallet.funds {
                let body = json!({
                    "walletId": self.wallets[number], "direction": "CREDIT", "amount": plan.money(number, wallet.funds),
                    "currency": currency, "reason": "what the company begins with"
                });
                let key = format!("funds-{number}");
                let route = "/v1/transactions/adjustment";
                let funded = self.expect(ADMIN, route, &key, &body, StatusCode::CREATED).await?;
                self.note_completed(wallet.partner, &funded.body["id"]);
            }
        }
        Ok(())
    }

    async fn ask_for_webhooks(&mut self, partner: usize) -> anyhow::Result<()> {
        let Some(receiver) = &self.receiver else { return Ok(()) };
        let body = json!({"url": receiver.url_of(partner), "events": ["*"]});
        self.unanswered = Some(partner);
        let answer = self.send(partner + 1, Method::POST, "/v1/webhooks", None, None, Some(&body), self.soon()).await?;
        self.unanswered = None;
        if answer.slug() == "webhook-url-forbidden" {
            self.receiver = None;
            return Ok(());
        }
        ensure!(answer.status == StatusCode::CREATED, "registering a webhook: {}", answer.told());
        receiver.knows(partner, &text(&answer.body["secret"]));
        Ok(())
    }

    /// Does one act, and sees that its answer is as planned.
    pub(crate) async fn act(&self, number: usize, act: &Act, deadline: Instant) -> anyhow::Result<Done> {
        let deadline = deadline.min(Instant::now() + ACT_TIME);
        let key = format!("{}-{number}", self.name);
        match &act.kind {
            Kind::Pay { from, to, amount, left, words } => {
                let answer = self.transfer(&key, *from, *to, *amount, words, None, deadline).await?;
                answer.must_be(StatusCode::CREATED, "")?;
                let left = self.plan.money(*from, *left);
                let found = answer.balance_after(&self.wallets[*from]);
                ensure!(found == left, "{} has {found} left, not {left}", self.who(*from));
                let id = text(&answer.body["id"]);
                self.note_completed(self.partner_of(*from), &answer.body["id"]);
                self.lock_payments().insert(number, id);
                let amount = self.amount(*from, *amount);
                Ok(answer.done(format!("{} pays {} {amount}, {words}; {left} left", self.who(*from), self.who(*to))))
            }
            Kind::Overdraw { from, to, amount } => {
                let answer = self.transfer(&key, *from, *to, *amount, "too much", None, deadline).await?;
                answer.must_be(StatusCode::UNPROCESSABLE_ENTITY, "insufficient-funds")?;
                let amount = self.amount(*from, *amount);
                Ok(answer.refused(format!("{} cannot pay {amount}", self.who(*from))))
            }
            Kind::Again { of } => {
                let Kind::Pay { from, to, amount, words, .. } = &self.plan.acts[*of].kind else {
                    bail!("act {of} is no payment")
                };
                let key = format!("{}-{of}", self.name);
                let answer = self.transfer(&key, *from, *to, *amount, words, None, deadline).await?;
                answer.must_be(StatusCode::CREATED, "")?;
                ensure!(answer.headers.contains_key("idempotent-replayed"), "it was done a second time");
                let first = self.lock_payments().get(of).cloned();
                let again = text(&answer.body["id"]);
                ensure!(first.as_deref() == Some(&again), "it became {again}, and {first:?} at first");
                let words = format!("{} sends a payment again: the first answer comes back", self.who(*from));
                Ok(Done { repeated: true, ..answer.done(words) })
            }
            Kind::AgainOtherwise { of } => {
                let Kind::Pay { from, to, amount, words, .. } = &self.plan.acts[*of].kind else {
                    bail!("act {of} is no payment")
                };
                let key = format!("{}-{of}", self.name);
                let answer = self.transfer(&key, *from, *to, *amount + 1, words, None, deadline).await?;
                answer.must_be(StatusCode::UNPROCESSABLE_ENTITY, "idempotency-key-reused")?;
                Ok(answer.refused(format!("{} uses a key for another amount", self.who(*from))))
            }
            Kind::Batch { from, items, atomic } => self.batch(&key, *from, items, *atomic, deadline).await,
            Kind::TopUp { wallet, amount, paid } => self.top_up(&key, *wallet, *amount, *paid, deadline).await,
            Kind::Freeze { wallet, to, amount } => {
                let life = |what: &str| format!("/v1/wallets/{}/{what}", self.wallets[*wallet]);
                let reason = json!({"reason": "the card was lost"});
                let who = self.partner_of(*wallet) + 1;
                let (freezing, thawing) = (format!("{key}-freeze"), format!("{key}-unfreeze"));
                let frozen = self.post(who, &life("freeze"), &freezing, &reason, deadline).await?;
                frozen.must_be(StatusCode::OK, "")?;
                let answer = self.transfer(&key, *wallet, *to, *amount, "while frozen", None, deadline).await?;
                // First of all it can be used again: what comes later counts on that.
                let thawed = self.post(who, &life("unfreeze"), &thawing, &reason, deadline).await?;
                answer.must_be(StatusCode::CONFLICT, "wallet-frozen")?;
                thawed.must_be(StatusCode::OK, "")?;
                Ok(answer.refused(format!("{}'s wallet is frozen and does not pay", self.who(*wallet))))
            }
            Kind::Stranger { from, to, amount, user } => {
                let answer = self.transfer(&key, *from, *to, *amount, "not mine", Some(user), deadline).await?;
                answer.must_be(StatusCode::FORBIDDEN, "wallet-not-owned")?;
                Ok(answer.refused(format!("{user} may not spend what is {}'s", self.who(*from))))
            }
            Kind::Close { wallet } => {
                let route = format!("/v1/wallets/{}/close", self.wallets[*wallet]);
                let body = json!({"reason": "moving away"});
                let answer = self.post(self.partner_of(*wallet) + 1, &route, &key, &body, deadline).await?;
                answer.must_be(StatusCode::CONFLICT, "wallet-not-empty")?;
                Ok(answer.refused(format!("{}'s wallet has money in it and is not closed", self.who(*wallet))))
            }
        }
    }

    async fn batch(
        &self,
        key: &str,
        from: usize,
        items: &[Item],
        atomic: bool,
        deadline: Instant,
    ) -> anyhow::Result<Done> {
        let transactions: Vec<_> =
            items.iter().map(|item| self.transfer_body(from, item.to, item.amount, "one of several")).collect();
        let body = json!({"atomic": atomic, "transactions": transactions});
        let who = self.partner_of(from);
        let answer = self.post(who + 1, "/v1/transactions/batch", key, &body, deadline).await?;
        if atomic && items.iter().any(|item| item.refused) {
            answer.must_be(StatusCode::UNPROCESSABLE_ENTITY, "insufficient-funds")?;
            return Ok(answer.refused(format!("{} cannot pay all of a batch, so none of it is done", self.who(from))));
        }
        answer.must_be(StatusCode::CREATED, "")?;
        let results = answer.body["results"].as_array().cloned().unwrap_or_default();
        ensure!(results.len() == items.len(), "{} results of {} items", results.len(), items.len());
        for (item, result) in items.iter().zip(&results) {
            let expected = if item.refused { "FAILED" } else { "SUCCESS" };
            ensure!(result["status"] == expected, "an item is {}, not {expected}", result["status"]);
            if !item.refused {
                self.note_completed(who, &result["transactionId"]);
            }
        }
        Ok(answer.done(format!("{} pays {} in one request", self.who(from), items.len())))
    }

    async fn top_up(
        &self,
        key: &str,
        wallet: usize,
        amount: i64,
        paid: bool,
        deadline: Instant,
    ) -> anyhow::Result<Done> {
        let who = self.partner_of(wallet);
        let body = json!({
            "walletId": self.wallets[wallet], "amount": self.plan.money(wallet, amount), "currency": self.currency(wallet)
        });
        let asked = self.post(who + 1, "/v1/transactions/top-up", key, &body, deadline).await?;
        asked.must_be(StatusCode::ACCEPTED, "")?;
        let outcome = if paid { "success" } else { "failure" };
        self.simulate(&json!({"token": asked.body["token"], "outcome": outcome}), deadline).await?;
        let route = format!("/v1/transactions/{}?waitMs=5000", text(&asked.body["id"]));
        let expected = if paid { "SUCCESS" } else { "FAILED" };
        loop {
            let answer = self.send(who + 1, Method::GET, &route, None, None, None, deadline).await?;
            answer.must_be(StatusCode::OK, "")?;
            let status = text(&answer.body["status"]);
            if status == "PENDING" && Instant::now() < deadline {
                continue;
            }
            ensure!(status == expected, "the top-up is {status}, not {expected}");
            self.note_position(answer.body["ledgerPosition"].as_i64().unwrap_or(0));
            let (name, amount) = (self.who(wallet), self.amount(wallet, amount));
            if paid {
                self.note_completed(who, &asked.body["id"]);
                return Ok(asked.done(format!("{name} tops up {amount} from the bank")));
            }
            return Ok(asked.refused(format!("the bank declines {name}'s {amount}")));
        }
    }

    async fn simulate(&self, body: &Value, deadline: Instant) -> anyhow::Result<()> {
        loop {
            let sent = self.client.post(format!("{}/bank/simulate", self.bank_url)).json(body).send().await;
            match sent {
                Ok(answer) if answer.status().is_success() => return Ok(()),
                Ok(answer) if deadline <= Instant::now() => bail!("the bank answers {}", answer.status()),
                Err(error) if deadline <= Instant::now() => return Err(error).context("asking the bank"),
                _ => sleep(PAUSE).await,
            }
        }
    }

    /// Balances, counts and states as the system shows them now.
    pub(crate) async fn read(&self) -> anyhow::Result<Outcome> {
        let position = self.position.load(Ordering::Relaxed);
        let mut outcome = Outcome::default();
        for (number, id) in self.wallets.iter().enumerate() {
            let route = format!("/v1/wallets/{id}?minPosition={position}&waitMs=10000");
            let wallet =
                self.send(self.partner_of(number) + 1, Method::GET, &route, None, None, None, self.soon()).await?;
            wallet.must_be(StatusCode::OK, "")?;
            outcome.wallets.push(WalletOutcome {
                balance: text(&wallet.body["balance"]),
                version: wallet.body["version"].as_i64().unwrap_or(-1),
                status: text(&wallet.body["status"]),
            });
        }
        for partner in 0..self.plan.partners.len() {
            let mut counts = BTreeMap::new();
            let mut cursor = String::new();
            loop {
                let route = format!("/v1/transactions?limit=100&minPosition={position}&waitMs=10000{cursor}");
                let page = self.send(partner + 1, Method::GET, &route, None, None, None, self.soon()).await?;
                page.must_be(StatusCode::OK, "")?;
                for transaction in page.body["data"].as_array().into_iter().flatten() {
                    let what = (text(&transaction["type"]), text(&transaction["status"]));
                    *counts.entry(what).or_default() += 1;
                }
                match page.body["nextCursor"].as_str() {
                    Some(next) => cursor = format!("&cursor={next}"),
                    None => break,
                }
            }
            outcome.transactions.push(counts);
        }
        Ok(outcome)
    }

    /// The transactions of a partner that were answered as done.
    pub(crate) fn completed(&self, partner: usize) -> BTreeSet<String> {
        self.completed.lock().unwrap_or_else(PoisonError::into_inner)[partner].clone()
    }

    /// Takes back what the system would go on doing for us: the webhooks, of as many partners as were registered.
    pub(crate) async fn clean_up(&self) {
        let deadline = Instant::now() + CLEAN_UP_TIME;
        for partner in 0..self.partners.len() - 1 {
            let removed = timeout_at(deadline, self.remove_webhooks(partner, deadline)).await;
            if let Err(error) = removed.unwrap_or_else(|_| Err(anyhow!("not answered in time"))) {
                // Whoever read this may have left, and the others' webhooks must go all the same.
                let name = self.name_of(partner);
                _ = writeln!(std::io::stderr(), "daybook: webhooks of {name} may stay registered: {error:#}");
            }
        }
    }

    /// All that the partner has, since all are ours: the answer that named one may have been lost.
    async fn remove_webhooks(&self, partner: usize, deadline: Instant) -> anyhow::Result<()> {
        let who = partner + 1;
        let settled = Instant::now() + if self.unanswered == Some(partner) { SETTLE_TIME } else { Duration::ZERO };
        loop {
            let list = "/v1/webhooks?limit=100"; // a partner has no more
            let registered = self.send(who, Method::GET, list, None, None, None, deadline).await?;
            registered.must_be(StatusCode::OK, "")?;
            for webhook in registered.body["data"].as_array().into_iter().flatten() {
                let route = format!("/v1/webhooks/{}", text(&webhook["id"]));
                let removed = self.send(who, Method::DELETE, &route, None, None, None, deadline).await?;
                // Not found, it was removed by a request whose answer was lost.
                let gone = [StatusCode::NO_CONTENT, StatusCode::NOT_FOUND].contains(&removed.status);
                ensure!(gone, "removing one: {}", removed.told());
            }
            if settled <= Instant::now() {
                return Ok(());
            }
            sleep(PAUSE).await;
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a transfer has these parts")]
    async fn transfer(
        &self,
        key: &str,
        from: usize,
        to: usize,
        amount: i64,
        words: &str,
        user: Option<&str>,
        deadline: Instant,
    ) -> anyhow::Result<Answer> {
        let body = self.transfer_body(from, to, amount, words);
        let (who, route) = (self.partner_of(from) + 1, "/v1/transactions/transfer");
        self.send(who, Method::POST, route, Some(key), user, Some(&body), deadline).await
    }

    fn transfer_body(&self, from: usize, to: usize, amount: i64, words: &str) -> Value {
        json!({
            "fromWalletId": self.wallets[from], "toWalletId": self.wallets[to], "amount": self.plan.money(from, amount),
            "currency": self.currency(from), "description": words
        })
    }

    async fn post(
        &self,
        who: usize,
        route: &str,
        key: &str,
        body: &Value,
        deadline: Instant,
    ) -> anyhow::Result<Answer> {
        self.send(who, Method::POST, route, Some(key), None, Some(body), deadline).await
    }

    /// A step of the preparation, which can only succeed.
    async fn expect(
        &self,
        who: usize,
        route: &str,
        key: &str,
        body: &Value,
        status: StatusCode,
    ) -> anyhow::Result<Answer> {
        let key = format!("{}-{key}", self.name);
        let answer = self.post(who, route, &key, body, self.soon()).await?;
        ensure!(answer.status == status, "{route}: {}", answer.told());
        Ok(answer)
    }

    /// Sends until there is an answer that is final, however often that takes, up to the deadline.
    #[expect(clippy::too_many_arguments, reason = "a request has these parts, and one place sends them all")]
    async fn send(
        &self,
        who: usize,
        method: Method,
        route: &str,
        key: Option<&str>,
        user: Option<&str>,
        body: Option<&Value>,
        deadline: Instant,
    ) -> anyhow::Result<Answer> {
        loop {
            let token = self.token(who, deadline).await?;
            let mut request =
                self.client.request(method.clone(), format!("{}{route}", self.base_url)).bearer_auth(token);
            if let Some(key) = key {
                request = request.header("Idempotency-Key", key);
            }
            if let Some(user) = user {
                request = request.header("X-User-ID", user);
            }
            if let Some(body) = body {
                request = request.json(body);
            }
            let asked = Instant::now();
            let problem = match answer_of(request.send().await, asked).await {
                Ok(answer) if answer.status == StatusCode::UNAUTHORIZED => {
                    self.partners[who].token.lock().unwrap_or_else(PoisonError::into_inner).clear();
                    answer.told()
                }
                Ok(answer) if !answer.is_final() => answer.told(),
                Ok(answer) => {
                    let position =
                        answer.headers.get("ledger-position").and_then(|value| value.to_str().ok()?.parse().ok());
                    if method != Method::GET {
                        self.note_position(position.unwrap_or(0));
                    }
                    return Ok(answer);
                }
                Err(error) => format!("{:#}", anyhow::Error::from(error)),
            };
            ensure!(Instant::now() < deadline, "no final answer in time: {problem}");
            sleep(PAUSE).await;
        }
    }

    /// The token of a partner, or of the administrator; one that is not good any more is replaced.
    async fn token(&self, who: usize, deadline: Instant) -> anyhow::Result<String> {
        let known = self.partners[who].token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if !known.is_empty() {
            return Ok(known);
        }
        loop {
            let request =
                self.client.post(format!("{}/v1/auth/token", self.base_url)).json(&self.partners[who].credentials);
            let problem = match answer_of(request.send().await, Instant::now()).await {
                Ok(answer) if answer.status == StatusCode::OK => {
                    let token = text(&answer.body["accessToken"]);
                    *self.partners[who].token.lock().unwrap_or_else(PoisonError::into_inner) = token.clone();
                    return Ok(token);
                }
                Ok(answer) if answer.is_final() => bail!("logging in: {}", answer.told()),
                Ok(answer) => answer.told(),
                Err(error) => format!("{:#}", anyhow::Error::from(error)),
            };
            ensure!(Instant::now() < deadline, "logging in: no final answer in time: {problem}");
            sleep(PAUSE).await;
        }
    }

    fn soon(&self) -> Instant {
        Instant::now() + ACT_TIME
    }

    fn note_position(&self, position: i64) {
        self.position.fetch_max(position, Ordering::Relaxed);
    }

    fn note_completed(&self, partner: usize, id: &Value) {
        self.completed.lock().unwrap_or_else(PoisonError::into_inner)[partner].insert(text(id));
    }

    fn lock_payments(&self) -> std::sync::MutexGuard<'_, BTreeMap<usize, String>> {
        self.payments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As the system has it: with what sets it apart from those of other runs.
    fn name_of(&self, partner: usize) -> String {
        format!("{} ({})", self.plan.partners[partner].name, &self.name[..13])
    }

    fn partner_of(&self, wallet: usize) -> usize {
        self.plan.wallets[wallet].partner
    }

    fn currency(&self, wallet: usize) -> &'static str {
        self.plan.partners[self.partner_of(wallet)].currency
    }

    fn amount(&self, wallet: usize, amount: i64) -> String {
        format!("{} {}", self.plan.money(wallet, amount), self.currency(wallet))
    }

    fn who(&self, wallet: usize) -> &str {
        &self.plan.wallets[wallet].user
    }
}

/// Among those who have tokens, the first.
const ADMIN: usize = 0;

async fn answer_of(sent: reqwest::Result<reqwest::Response>, asked: Instant) -> reqwest::Result<Answer> {
    let response = sent.map_err(reqwest::Error::without_url)?;
    let (status, headers) = (response.status(), response.headers().clone());
    let body = response.bytes().await.map_err(reqwest::Error::without_url)?;
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null); // a webhook that is deleted leaves none
    Ok(Answer { status, headers, body, latency: asked.elapsed() })
}

impl Answer {
    /// Not "not now".
    fn is_final(&self) -> bool {
        !self.status.is_server_error()
            && self.status != StatusCode::TOO_MANY_REQUESTS
            && self.slug() != "idempotency-in-flight"
    }

    fn slug(&self) -> &str {
        self.body["type"].as_str().and_then(|name| name.strip_prefix("/problems/")).unwrap_or_default()
    }

    fn told(&self) -> String {
        format!("{} {} {}", self.status, self.slug(), self.body["detail"].as_str().unwrap_or_default())
    }

    fn must_be(&self, status: StatusCode, slug: &str) -> anyhow::Result<()> {
        ensure!(
            self.status == status && (slug.is_empty() || self.slug() == slug),
            "answered {}, not {status} {slug}",
            self.told()
        );
        Ok(())
    }

    fn balance_after(&self, wallet: &str) -> String {
        let entries = self.body["entries"].as_array().into_iter().flatten();
        let of_wallet = entries.into_iter().find(|entry| entry["walletId"] == wallet);
        of_wallet.map(|entry| text(&entry["balanceAfter"])).unwrap_or_default()
    }

    fn done(&self, words: String) -> Done {
        Done { words, latency: self.latency, refused: false, repeated: false }
    }

    fn refused(&self, words: String) -> Done {
        Done { refused: true, ..self.done(words) }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
