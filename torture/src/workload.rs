//! The workload: clients who open wallets, move money and pay at the bank, all at once, and who never let a question
//! rest before its key has answered it.
//!
//! Left out: whether what they are told is right (`check.rs`).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::history::{Answer, History, Intent, Outcome, Read, Transfer, Verdict};
use crate::money::{CURRENCIES, Money};
use crate::random::Random;
use crate::system::{Connection, Credentials};

/// How many act at once.
const CLIENTS: u64 = 12;

/// Longer than the ledger takes to say that it does not know.
const ANSWER_TIME: Duration = Duration::from_secs(20);

/// After the last fault a question may stay open for so long.
const SETTLE_TIME: Duration = Duration::from_secs(60);

/// When somebody wants to act between the bank's acceptance and its callback.
const LATE_CALLBACK_MS: u64 = 2_000;

/// Amounts, in minor units: most transfers find their money, and some do not.
const TRANSFER_BELOW: u64 = 3_000;
const CREDIT_BELOW: u64 = 20_000;

/// Items of a batch.
const ITEMS_BELOW: u64 = 6;

/// Of so many wallets one is frozen now and then.
const FREEZE_EVERY: usize = 10;

const USERS: u64 = 20;
const WALLETS_MAX: usize = 60;

pub(crate) struct Workload {
    clients: JoinSet<()>,
    stop: watch::Sender<bool>,
}

/// What all clients share.
pub(crate) struct World {
    pub(crate) http: reqwest::Client,
    pub(crate) connection: watch::Receiver<Connection>,
    pub(crate) history: Arc<History>,
    pub(crate) admin: Login,
    pub(crate) partner: Login,
    /// Other doors to the same ledger, if there are any.
    pub(crate) second_commands: Option<String>,
    pub(crate) second_queries: Option<String>,
    wallets: Mutex<Vec<(String, &'static str)>>,
    /// Whoever waits for a payment of which the bank says nothing for a while.
    late_callback: Mutex<Option<oneshot::Sender<()>>>,
}

/// Credentials, and the token that they were last given.
pub(crate) struct Login {
    pub(crate) credentials: Credentials,
    token: tokio::sync::Mutex<Option<String>>,
}

impl Login {
    pub(crate) fn new(credentials: Credentials) -> Self {
        Self { credentials, token: tokio::sync::Mutex::new(None) }
    }

    /// A token, as soon as one is to be had.
    async fn token(&self, world: &World) -> String {
        let mut token = self.token.lock().await;
        loop {
            if let Some(token) = &*token {
                return token.clone();
            }
            match log_in(&world.http, &world.base_url(), &self.credentials).await {
                Ok(new) => *token = Some(new),
                Err(_) => sleep(Duration::from_millis(100)).await, // an outage: whoever waits for it has its own bound
            }
        }
    }

    async fn forget(&self, used: &str) {
        let mut token = self.token.lock().await;
        if token.as_deref() == Some(used) {
            *token = None;
        }
    }
}

pub(crate) async fn log_in(http: &reqwest::Client, base_url: &str, who: &Credentials) -> anyhow::Result<String> {
    let body = json!({"clientId": who.client_id, "clientSecret": who.client_secret});
    let answer = http.post(format!("{base_url}/v1/auth/token")).json(&body).timeout(Duration::from_secs(5)).send();
    let body: Value = answer.await?.error_for_status()?.json().await?;
    Ok(body["accessToken"].as_str().context("a login brings a token")?.to_owned())
}

impl World {
    pub(crate) fn new(
        http: reqwest::Client,
        connection: watch::Receiver<Connection>,
        history: Arc<History>,
        admin: Credentials,
        partner: Credentials,
    ) -> Self {
        let (admin, partner) = (Login::new(admin), Login::new(partner));
        let (second_commands, second_queries) = (None, None);
        Self {
            http,
            connection,
            history,
            admin,
            partner,
            second_commands,
            second_queries,
            wallets: Mutex::default(),
            late_callback: Mutex::default(),
        }
    }

    fn base_url(&self) -> String {
        self.connection.borrow().base_url.clone()
    }

    /// A GET as the operator, or as the partner.
    pub(crate) async fn get(&self, as_admin: bool, route: &str, within: Duration) -> anyhow::Result<(Answer, Value)> {
        self.get_at(&self.base_url(), as_admin, route, within).await
    }

    async fn get_at(
        &self,
        base_url: &str,
        as_admin: bool,
        route: &str,
        within: Duration,
    ) -> anyhow::Result<(Answer, Value)> {
        let login = if as_admin { &self.admin } else { &self.partner };
        let token = tokio::time::timeout(within, login.token(self)).await.context("no login in time")?;
        let asked = self.http.get(format!("{base_url}{route}")).bearer_auth(&token).timeout(within);
        let answer = read(asked.send().await?).await?;
        if answer.status == 401 {
            login.forget(&token).await;
        }
        let body = serde_json::from_str(&answer.body).unwrap_or_default();
        Ok((answer, body))
    }

    /// Until the bank has accepted a payment and keeps its callback to itself for a while.
    pub(crate) async fn payment_with_a_late_callback(&self) {
        let (accepted, wait) = oneshot::channel();
        *self.late_callback.lock().unwrap_or_else(PoisonError::into_inner) = Some(accepted);
        wait.await.ok(); // nobody else takes its place while we wait
    }

    fn knows(&self, wallet: Option<(String, &'static str)>) {
        self.wallets.lock().unwrap_or_else(PoisonError::into_inner).extend(wallet);
    }

    fn wallets(&self) -> Vec<(String, &'static str)> {
        self.wallets.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sends the request of a call once and writes down what came of it.
    async fn attempt(&self, number: u64) -> Outcome {
        let login =
            if self.history.with(|known| known.calls[place(number)].as_admin) { &self.admin } else { &self.partner };
        let token = login.token(self).await;
        let sent_at = Instant::now();
        let (call, attempt) = self.history.sent(number);
        let (route, body) = request(&call.intent, &call.marker);
        // A repetition may come to the other engine, which must know of the first attempt all the same.
        let second = (number + attempt as u64) % 3 == 2;
        let second = self.second_commands.as_ref().filter(|_| second);
        let sent_at = second.is_none().then_some(sent_at);
        let base_url = second.cloned().unwrap_or_else(|| self.base_url());
        let asked = self.http.post(format!("{base_url}{route}")).bearer_auth(&token).json(&body);
        let outcome = send(asked.header("Idempotency-Key", &call.marker)).await;
        if let Outcome::Answered(answer) = &outcome
            && answer.status == 401
        {
            login.forget(&token).await;
        }
        self.history.answered(number, attempt, sent_at, outcome.clone());
        outcome
    }
}

impl Workload {
    pub(crate) fn start(world: &Arc<World>, seed: u64) -> Self {
        let stop = watch::Sender::new(false);
        let mut clients = JoinSet::new();
        for number in 0..CLIENTS {
            let client = Client {
                world: world.clone(),
                random: Random::of(seed, &format!("client {number}")),
                stop: stop.subscribe(),
                give_up: None,
            };
            clients.spawn(client.run());
        }
        Self { clients, stop }
    }

    /// Lets every client settle what it has begun; what stays open stays so in the history.
    pub(crate) async fn finish(mut self) {
        self.stop.send_replace(true);
        let all = async { while self.clients.join_next().await.is_some() {} };
        // Each has its own bound; this one is for a client that waits for a login.
        tokio::time::timeout(SETTLE_TIME + ANSWER_TIME * 2, all).await.ok();
    }
}

struct Client {
    world: Arc<World>,
    random: Random,
    stop: watch::Receiver<bool>,
    /// When what is open stays open.
    give_up: Option<Instant>,
}

impl Client {
    async fn run(mut self) {
        while !*self.stop.borrow() {
            let number = self.intend();
            if let Some(answer) = self.settle(number).await {
                self.follow_up(number, &answer).await;
            }
            sleep(Duration::from_millis(self.random.within(2, 40))).await;
        }
    }

    /// What this client wants next.
    fn intend(&mut self) -> u64 {
        let wallets = self.world.wallets();
        let chance = self.random.within(0, 100);
        let (intent, as_admin) = if wallets.is_empty() || (chance < 5 && wallets.len() < WALLETS_MAX) {
            let user = format!("user-{}", self.random.within(0, USERS));
            let (currency, _) = self.random.pick(&CURRENCIES);
            (Intent::OpenWallet { user, currency: (*currency).to_owned() }, false)
        } else {
            let number = self.random.index(wallets.len());
            let (wallet, currency) = wallets[number].clone();
            // What has been paid for waits until a wallet thaws: those that may be frozen get none of it.
            let may_freeze = number % FREEZE_EVERY == FREEZE_EVERY - 1;
            match chance {
                ..5 => {
                    let atomic = self.random.percent(50);
                    (Intent::Batch { atomic, transfers: self.transfers(&wallets, currency) }, false)
                }
                5..70 => {
                    // Now and then to any wallet, of another currency or the same one: refusals are answers too.
                    let others: Vec<_> = wallets.iter().filter(|(id, of)| *of == currency && *id != wallet).collect();
                    let to = match others.is_empty() || self.random.percent(2) {
                        true => self.random.pick(&wallets).0.clone(),
                        false => self.random.pick(&others).0.clone(),
                    };
                    (Intent::Transfer { from: wallet, to, money: self.money(currency, TRANSFER_BELOW) }, false)
                }
                70..80 if may_freeze => match self.random.percent(20) {
                    true => (Intent::Freeze { wallet }, true),
                    false => (Intent::Unfreeze { wallet }, true),
                },
                70..80 => (Intent::TopUp { wallet, money: self.money(currency, CREDIT_BELOW) }, false),
                _ => {
                    let credit = self.random.percent(80);
                    (Intent::Adjust { wallet, credit, money: self.money(currency, CREDIT_BELOW) }, true)
                }
            }
        };
        self.world.history.intend(intent, as_admin)
    }

    /// Some transfers in one currency, a later one perhaps of what an earlier one brings.
    fn transfers(&mut self, wallets: &[(String, &'static str)], currency: &'static str) -> Vec<Transfer> {
        let among: Vec<_> = wallets.iter().filter(|(_, of)| *of == currency).map(|(id, _)| id.clone()).collect();
        let items = self.random.within(1, ITEMS_BELOW);
        (0..items)
            .map(|_| {
                let from = self.random.index(among.len());
                let to = (from + 1 + self.random.index(among.len().max(2) - 1)) % among.len();
                let money = self.money(currency, TRANSFER_BELOW);
                Transfer { from: among[from].clone(), to: among[to].clone(), money }
            })
            .collect()
    }

    fn money(&mut self, currency: &str, below: u64) -> Money {
        Money { minor: i128::from(self.random.within(1, below)), currency: currency.to_owned() }
    }

    /// Repeats a call under its key until the matter has ended.
    async fn settle(&mut self, number: u64) -> Option<Answer> {
        let twice = self.random.percent(3);
        loop {
            let outcome = if twice {
                // The same request twice at once: one of the two answers ends it, or neither does.
                let (one, other) = tokio::join!(self.world.attempt(number), self.world.attempt(number));
                [one, other].into_iter().max_by_key(ends).expect("there are two")
            } else {
                self.world.attempt(number).await
            };
            let verdict = match outcome {
                Outcome::Answered(answer) if matches!(answer.verdict(), Verdict::Done | Verdict::Refused) => {
                    return Some(answer);
                }
                Outcome::Answered(answer) => answer.verdict(),
                Outcome::NotSent => Verdict::NotExecuted,
                Outcome::NoAnswer(_) => Verdict::Unknown,
            };
            let may_have = self.world.history.with(|known| known.calls[place(number)].may_have_happened());
            if verdict == Verdict::NotExecuted && !may_have && self.random.percent(5) {
                self.world.history.abandon(number);
                return None;
            }
            if self.is_over() {
                return None;
            }
            sleep(Duration::from_millis(self.random.within(30, 300))).await;
        }
    }

    /// What a client does with an answer: reads what it has done, pays, or asks once more to be sure.
    async fn follow_up(&mut self, number: u64, answer: &Answer) {
        if self.random.percent(5) {
            self.world.attempt(number).await; // must be told the same
        }
        if self.random.percent(1) {
            self.reuse(number).await;
        }
        if answer.verdict() != Verdict::Done {
            return;
        }
        let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        let id = body["id"].as_str().unwrap_or_default().to_owned();
        let intent = self.world.history.with(|known| known.calls[place(number)].intent.clone());
        match intent {
            Intent::OpenWallet { currency, .. } => {
                let currency = CURRENCIES.iter().map(|(code, _)| *code).find(|code| *code == currency);
                self.world.knows(currency.map(|currency| (id.clone(), currency)));
                self.look_for(&format!("/v1/wallets/{id}")).await;
            }
            Intent::Transfer { from, to, .. } => {
                if self.random.percent(20) {
                    self.look_for(&format!("/v1/transactions/{id}")).await;
                }
                let wallet = if self.random.percent(50) { from } else { to };
                self.look_at_balance(&wallet, answer.position).await;
            }
            Intent::Adjust { wallet, .. } => self.look_at_balance(&wallet, answer.position).await,
            Intent::TopUp { .. } => {
                if let Some(token) = body["token"].as_str() {
                    self.pay(token, &id).await;
                }
            }
            Intent::Batch { transfers, .. } => {
                self.look_at_balance(&transfers[0].from, answer.position).await;
            }
            Intent::Freeze { .. } | Intent::Unfreeze { .. } => {}
        }
    }

    /// The same key for another request must be refused.
    async fn reuse(&self, number: u64) {
        let call = self.world.history.with(|known| known.calls[place(number)].clone());
        let (route, mut body) = request(&call.intent, &call.marker);
        body["reason"] = json!("another request");
        body["reference"] = json!("another request");
        if !matches!(call.intent, Intent::Transfer { .. } | Intent::TopUp { .. }) {
            body.as_object_mut().expect("a request is an object").remove("reference");
        }
        if !matches!(call.intent, Intent::Adjust { .. } | Intent::Freeze { .. } | Intent::Unfreeze { .. }) {
            body.as_object_mut().expect("a request is an object").remove("reason");
        }
        if let Intent::OpenWallet { .. } = call.intent {
            body["userId"] = json!("another user");
        }
        if let Intent::Batch { atomic, .. } = call.intent {
            body["atomic"] = json!(!atomic);
        }
        let login = if call.as_admin { &self.world.admin } else { &self.world.partner };
        let token = login.token(&self.world).await;
        let asked = self.world.http.post(format!("{}{route}", self.world.base_url())).bearer_auth(token).json(&body);
        if let Outcome::Answered(answer) = send(asked.header("Idempotency-Key", &call.marker)).await
            && matches!(answer.verdict(), Verdict::Done | Verdict::Refused)
            && answer.slug.as_deref() != Some("idempotency-key-reused")
        {
            self.world.history.mixed_up(format!("{}: {} {}", call.marker, answer.status, answer.body));
        }
    }

    /// Either of those who show what is there.
    fn queries(&mut self) -> String {
        let second = self.random.percent(30).then(|| self.world.second_queries.clone()).flatten();
        second.unwrap_or_else(|| self.world.base_url())
    }

    /// What was answered 201 is never 404.
    async fn look_for(&mut self, route: &str) {
        let queries = self.queries();
        if let Ok((answer, _)) = self.world.get_at(&queries, false, route, ANSWER_TIME).await
            && answer.status == 404
        {
            self.world.history.missing(format!("{route}: {}", answer.body));
        }
    }

    async fn look_at_balance(&mut self, wallet: &str, position: Option<i64>) {
        if self.random.percent(60) {
            return;
        }
        let Some(min_position) = position else { return };
        let route = format!("/v1/wallets/{wallet}/balance?minPosition={min_position}&waitMs=5000");
        let queries = self.queries();
        let Ok((answer, body)) = self.world.get_at(&queries, false, &route, ANSWER_TIME).await else { return };
        match (answer.status, answer.position, body["balance"].as_str()) {
            (200, Some(position), Some(balance)) => self.world.history.read(Read {
                wallet: wallet.to_owned(),
                min_position,
                position,
                balance: balance.to_owned(),
            }),
            (404, ..) => self.world.history.missing(format!("{route}: {}", answer.body)),
            _ => {}
        }
    }

    /// Decides a top-up at the bank, which may tell it twice, late or never.
    async fn pay(&mut self, token: &str, transaction: &str) {
        let pays = self.random.percent(80);
        self.world.history.pays(token, transaction, pays);
        let waiting = self.world.late_callback.lock().unwrap_or_else(PoisonError::into_inner).take();
        let callback = match self.random.within(0, 10) {
            _ if waiting.is_some() => json!({"copies": 1, "delayMs": LATE_CALLBACK_MS}),
            0 => json!({"drop": true}),
            1 | 2 => json!({"copies": 2, "delayEachMs": 300}),
            3 | 4 => json!({"copies": 1, "delayMs": 700}),
            _ => json!({"copies": 1}),
        };
        let outcome = if pays { "success" } else { "failure" };
        let body = json!({"token": token, "outcome": outcome, "callback": callback});
        loop {
            let url = format!("{}/bank/simulate", self.world.connection.borrow().bank_url);
            if let Outcome::Answered(answer) = send(self.world.http.post(url).json(&body)).await
                && answer.status == 200
            {
                self.world.history.bank_has_taken(token);
                if let Some(waiting) = waiting {
                    waiting.send(()).ok(); // the adversary may have given up
                }
                return;
            }
            if self.is_over() {
                return;
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// Whether the run has ended, and the time that it leaves for questions too.
    fn is_over(&mut self) -> bool {
        if !*self.stop.borrow() {
            return false;
        }
        *self.give_up.get_or_insert_with(|| Instant::now() + SETTLE_TIME) < Instant::now()
    }
}

/// Of two outcomes the one that says more.
fn ends(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::Answered(answer) => match answer.verdict() {
            Verdict::Done | Verdict::Refused => 3,
            Verdict::Unknown | Verdict::Unclear => 2,
            Verdict::NotExecuted => 1,
        },
        Outcome::NoAnswer(_) => 2,
        Outcome::NotSent => 0,
    }
}

/// Route and body of an intent.
fn request(intent: &Intent, marker: &str) -> (String, Value) {
    match intent {
        Intent::OpenWallet { user, currency } => {
            ("/v1/wallets".to_owned(), json!({"userId": user, "currency": currency, "metadata": {"call": marker}}))
        }
        Intent::Transfer { from, to, money } => (
            "/v1/transactions/transfer".to_owned(),
            json!({"fromWalletId": from, "toWalletId": to, "amount": money.text(), "currency": money.currency,
                   "reference": marker}),
        ),
        Intent::Batch { atomic, transfers } => {
            let item = |(number, Transfer { from, to, money }): (usize, &Transfer)| {
                json!({"fromWalletId": from, "toWalletId": to, "amount": money.text(), "currency": money.currency,
                       "reference": format!("{marker}/{number}")})
            };
            let items: Vec<Value> = transfers.iter().enumerate().map(item).collect();
            ("/v1/transactions/batch".to_owned(), json!({"atomic": atomic, "transactions": items}))
        }
        Intent::Adjust { wallet, credit, money } => (
            "/v1/transactions/adjustment".to_owned(),
            json!({"walletId": wallet, "direction": if *credit { "CREDIT" } else { "DEBIT" },
                   "amount": money.text(), "currency": money.currency, "reason": marker}),
        ),
        Intent::TopUp { wallet, money } => (
            "/v1/transactions/top-up".to_owned(),
            json!({"walletId": wallet, "amount": money.text(), "currency": money.currency, "reference": marker}),
        ),
        Intent::Freeze { wallet } => (format!("/v1/wallets/{wallet}/freeze"), json!({"reason": marker})),
        Intent::Unfreeze { wallet } => (format!("/v1/wallets/{wallet}/unfreeze"), json!({"reason": marker})),
    }
}

async fn send(request: RequestBuilder) -> Outcome {
    let sent = async { read(request.timeout(ANSWER_TIME).send().await?).await };
    match sent.await {
        Ok(answer) => Outcome::Answered(answer),
        Err(error) if error.is_connect() => Outcome::NotSent,
        Err(error) => Outcome::NoAnswer(error.without_url().to_string()),
    }
}

async fn read(response: Response) -> Result<Answer, reqwest::Error> {
    let header = |name| response.headers().get(name)?.to_str().ok();
    let position = header("ledger-position").and_then(|position| position.parse().ok());
    let replayed = header("idempotent-replayed") == Some("true");
    let is_problem = header("content-type") == Some("application/problem+json");
    let status = response.status().as_u16();
    let body = response.text().await?;
    let problem: Option<Value> = is_problem.then(|| serde_json::from_str(&body).ok()).flatten();
    let slug = problem.and_then(|problem| problem["type"].as_str()?.rsplit('/').next().map(str::to_owned));
    Ok(Answer { status, slug, position, replayed, body })
}

fn place(number: u64) -> usize {
    usize::try_from(number).expect("a call's number is its place")
}
