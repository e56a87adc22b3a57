//! Planted bugs: does the judge see what it is there to see? Into a copy of a run's own evidence one bug at a time is
//! planted, as consistent with everything else as it can be, and the judge must call it by its name.
//!
//! A judge that passes a good run has shown nothing until it has failed these.

use serde_json::Value;
use uuid::Uuid;

use crate::check::{Promise, check};
use crate::evidence::Evidence;
use crate::fold::Fold;
use crate::history::{Answer, Attempt, Call, Intent, Outcome, Read, Verdict};
use crate::log::{self, Commit, Event};
use crate::money::Money;

/// A bug, the promise that it breaks, and how it is planted. `None`: this run has nothing to plant it in.
type Plant = (&'static str, Promise, fn(&mut Evidence) -> Option<()>);

const PLANTS: [Plant; 22] = [
    ("a lost acknowledgement", Promise::Lost, lost_acknowledgement),
    ("an acknowledgement of something else", Promise::Lost, other_effect),
    ("a payment that never came in", Promise::Lost, payment_not_booked),
    ("a command applied twice", Promise::Doubled, applied_twice),
    ("a transfer that nobody asked for", Promise::Phantom, nobodys_transfer),
    ("a refused command that was executed", Promise::Phantom, refused_and_done),
    ("an abandoned command that was executed", Promise::Phantom, abandoned_and_done),
    ("a webhook about nothing", Promise::Phantom, nobodys_webhook),
    ("a call that never got its answer", Promise::Unsettled, no_answer),
    ("another answer for the same key", Promise::Unequal, another_answer),
    ("an internal error", Promise::Unclear, internal_error),
    ("money out of nothing", Promise::Conserved, money_out_of_nothing),
    ("a wallet below its floor", Promise::Floor, below_the_floor),
    ("a missing event", Promise::Gap, missing_event),
    ("an event that was changed", Promise::Chain, changed_event),
    ("a chain that was broken", Promise::Chain, broken_chain),
    ("an event that the balances skipped", Promise::View, skipped_in_balances),
    ("an event that a statement skipped", Promise::View, skipped_in_statement),
    ("a read older than asked for", Promise::Stale, older_read),
    ("a read that missed the last change", Promise::Stale, stale_read),
    ("a webhook that never came", Promise::Undelivered, lost_webhook),
    ("a webhook whose body changed on its way", Promise::Altered, altered_webhook),
];

/// How many bugs were planted, and those that the judge has not called by their name.
pub(crate) fn planted(evidence: &Evidence) -> (usize, Vec<&'static str>) {
    let mut count = 0;
    let mut missed = Vec::new();
    for (name, promise, plant) in PLANTS {
        let mut copy = evidence.clone();
        if plant(&mut copy).is_none() {
            continue;
        }
        count += 1;
        if !check(&copy).iter().any(|violation| violation.promise == promise) {
            missed.push(name);
        }
    }
    (count, missed)
}

/// How many there are: a run of any length has something for each of them.
pub(crate) const COUNT: usize = PLANTS.len();

fn lost_acknowledgement(evidence: &mut Evidence) -> Option<()> {
    // As if a transfer had been acknowledged by a process that died before its commit.
    let mut call = done(evidence, |intent| matches!(intent, Intent::Transfer { .. }))?.clone();
    call.number = evidence.known.calls.len() as u64;
    call.marker += "-lost";
    evidence.known.calls.push(call);
    Some(())
}

fn other_effect(evidence: &mut Evidence) -> Option<()> {
    let number = done(evidence, |intent| matches!(intent, Intent::Transfer { .. }))?.number;
    let call = call(evidence, number);
    let Intent::Transfer { money, .. } = &mut call.intent else { return None };
    money.minor += 1;
    Some(())
}

fn payment_not_booked(evidence: &mut Evidence) -> Option<()> {
    let fold = Fold::of(&evidence.log);
    let failed = |id: &String| fold.transactions.get(id).is_some_and(|found| found.status == "FAILED");
    let payment = evidence.known.payments.values_mut().find(|payment| failed(&payment.transaction))?;
    (payment.pays, payment.taken) = (true, true);
    Some(())
}

fn applied_twice(evidence: &mut Evidence) -> Option<()> {
    let event = posted(evidence, Some("CREDIT"))?;
    append_like(evidence, &event, None, 1)
}

fn nobodys_transfer(evidence: &mut Evidence) -> Option<()> {
    let event = posted(evidence, Some("CREDIT"))?;
    append_like(evidence, &event, Some("nobody"), 1)
}

fn refused_and_done(evidence: &mut Evidence) -> Option<()> {
    let number = done(evidence, |intent| matches!(intent, Intent::Adjust { .. }))?.number;
    let call = call(evidence, number);
    for attempt in &mut call.attempts {
        let refusal = Answer {
            status: 422,
            slug: Some("insufficient-funds".to_owned()),
            position: None,
            replayed: false,
            body: "{}".to_owned(),
        };
        attempt.outcome = Some(Outcome::Answered(refusal));
    }
    call.attempts.truncate(1);
    Some(())
}

fn abandoned_and_done(evidence: &mut Evidence) -> Option<()> {
    let number = done(evidence, |intent| matches!(intent, Intent::Adjust { .. }))?.number;
    let call = call(evidence, number);
    call.attempts = vec![Attempt { sent_ms: 0, outcome: Some(Outcome::NotSent) }];
    call.abandoned = true;
    Some(())
}

fn nobodys_webhook(evidence: &mut Evidence) -> Option<()> {
    let came = evidence.received.values().next()?.clone();
    evidence.received.insert("evt_00000000-0000-8000-8000-000000000000".to_owned(), came);
    Some(())
}

fn no_answer(evidence: &mut Evidence) -> Option<()> {
    let number = done(evidence, |_| true)?.number;
    for attempt in &mut call(evidence, number).attempts {
        attempt.outcome = Some(Outcome::NoAnswer("planted".to_owned()));
    }
    Some(())
}

fn another_answer(evidence: &mut Evidence) -> Option<()> {
    let found = done(evidence, |intent| matches!(intent, Intent::Transfer { .. }))?;
    let (number, mut answer) = (found.number, found.settled()?.clone());
    answer.replayed = true;
    answer.body = answer.body.replacen("SUCCESS", "PENDING", 1);
    call(evidence, number).attempts.push(Attempt { sent_ms: 0, outcome: Some(Outcome::Answered(answer)) });
    Some(())
}

fn internal_error(evidence: &mut Evidence) -> Option<()> {
    let answer = Answer { status: 500, slug: None, position: None, replayed: false, body: String::new() };
    let call = evidence.known.calls.first_mut()?;
    call.attempts.insert(0, Attempt { sent_ms: 0, outcome: Some(Outcome::Answered(answer)) });
    Some(())
}

fn money_out_of_nothing(evidence: &mut Evidence) -> Option<()> {
    // A credit without its debit, with everything sealed as it should be.
    let place = evidence.log.events.iter().rposition(|event| event.event_type == "TransactionPosted")?;
    let event = &mut evidence.log.events[place];
    let mut payload: Value = serde_json::from_str(&event.payload).ok()?;
    payload["TransactionPosted"]["entries"].as_array_mut()?.remove(0);
    event.payload = payload.to_string();
    seal(evidence);
    Some(())
}

fn below_the_floor(evidence: &mut Evidence) -> Option<()> {
    let event = posted(evidence, Some("DEBIT"))?;
    append_like(evidence, &event, None, 1_000_000_000)
}

fn missing_event(evidence: &mut Evidence) -> Option<()> {
    let middle = evidence.log.events.len() / 2;
    evidence.log.events.remove(middle);
    Some(())
}

fn changed_event(evidence: &mut Evidence) -> Option<()> {
    let middle = evidence.log.events.len() / 2;
    evidence.log.events[middle].metadata += " ";
    Some(())
}

fn broken_chain(evidence: &mut Evidence) -> Option<()> {
    let middle = evidence.log.commits.len() / 2;
    evidence.log.commits[middle].chain[0] ^= 1;
    Some(())
}

fn skipped_in_balances(evidence: &mut Evidence) -> Option<()> {
    let fold = Fold::of(&evidence.log);
    let (id, wallet) = fold.wallets.iter().find(|(_, wallet)| wallet.partner.is_some() && 1 < wallet.entries.len())?;
    let shown = evidence.shown.wallets.iter_mut().find(|shown| shown["id"] == **id)?;
    let before = wallet.entries[wallet.entries.len() - 2].1;
    shown["balance"] = Money { minor: before, currency: wallet.currency.clone() }.text().into();
    shown["version"] = (wallet.version - 1).into();
    Some(())
}

fn skipped_in_statement(evidence: &mut Evidence) -> Option<()> {
    let statement = evidence.shown.entries.values_mut().find(|entries| 1 < entries.len())?;
    statement.remove(0);
    Some(())
}

fn older_read(evidence: &mut Evidence) -> Option<()> {
    let read = evidence.known.reads.first_mut()?;
    read.min_position = read.position + 1;
    Some(())
}

fn stale_read(evidence: &mut Evidence) -> Option<()> {
    // Right for the position before the wallet's last change, and shown as of that change.
    let fold = Fold::of(&evidence.log);
    let changed = |wallet: &crate::fold::Wallet| {
        wallet.entries.windows(2).find(|pair| pair[0].1 != pair[1].1).map(|pair| (pair[1].0, pair[0].1))
    };
    let found = fold.wallets.iter().find_map(|(id, wallet)| Some((id, &wallet.currency, changed(wallet)?)))?;
    let (wallet, currency, (position, minor)) = found;
    let balance = Money { minor, currency: currency.clone() }.text();
    evidence.known.reads.push(Read { wallet: wallet.clone(), min_position: position, position, balance });
    Some(())
}

fn lost_webhook(evidence: &mut Evidence) -> Option<()> {
    evidence.received.pop_last().map(drop)
}

fn altered_webhook(evidence: &mut Evidence) -> Option<()> {
    let came = evidence.received.values_mut().next()?;
    let again = came.bodies.first()?.replacen('{', "{ ", 1);
    came.bodies.push(again);
    Some(())
}

/// A call that was acknowledged.
fn done(evidence: &Evidence, is: impl Fn(&Intent) -> bool) -> Option<&Call> {
    let acknowledged = |call: &&Call| call.settled().is_some_and(|answer| answer.verdict() == Verdict::Done);
    evidence.known.calls.iter().filter(acknowledged).find(|call| is(&call.intent))
}

fn call(evidence: &mut Evidence, number: u64) -> &mut Call {
    let place = usize::try_from(number).expect("a call's number is its place");
    &mut evidence.known.calls[place]
}

/// The last adjustment in this direction.
fn posted(evidence: &Evidence, direction: Option<&str>) -> Option<Event> {
    let is = |event: &&Event| {
        let instruction = event.content().map(|content| content["instruction"].clone()).unwrap_or_default();
        event.event_type == "TransactionPosted" && instruction["direction"].as_str() == direction
    };
    evidence.log.events.iter().rev().find(is).cloned()
}

/// One commit more with an event like this one: another transaction and no key, with true versions and balances.
fn append_like(evidence: &mut Evidence, like: &Event, marker: Option<&str>, times: i128) -> Option<()> {
    let fold = Fold::of(&evidence.log);
    let mut content = like.content()?;
    if let Some(marker) = marker {
        content["instruction"]["description"] = marker.into();
    }
    for entry in content["entries"].as_array_mut()? {
        let wallet = fold.wallets.get(entry["walletId"].as_str()?)?;
        let amount = times * crate::money::minor(entry["amount"].as_str()?, &wallet.currency)?;
        let change = if entry["direction"] == "CREDIT" { amount } else { -amount };
        let text = |minor| Money { minor, currency: wallet.currency.clone() }.text();
        entry["amount"] = text(amount).into();
        entry["balanceAfter"] = text(wallet.balance + change).into();
        entry["walletVersion"] = (wallet.version + 1).into();
    }
    let last = evidence.log.commits.last()?;
    let position = evidence.log.head() + 1;
    let number = last.number + 1;
    let mut event = like.clone();
    event.aggregate_id = format!("txn_{}", Uuid::from_u128(position.unsigned_abs().into()));
    event.command = Uuid::from_u128(position.unsigned_abs().into());
    event.payload = serde_json::json!({ &*like.event_type: content }).to_string();
    event.recorded_at = evidence.log.events.last()?.recorded_at;
    (event.position, event.commit, event.key, event.request) = (position, number, None, None);
    evidence.log.events.push(event);
    evidence.log.commits.push(Commit { number, first: position, last: position, root: Vec::new(), chain: Vec::new() });
    seal(evidence);
    Some(())
}

/// Hashes everything anew, as a forger would who has the whole database.
fn seal(evidence: &mut Evidence) {
    let log = &mut evidence.log;
    for event in &mut log.events {
        event.leaf = event.leaf_of_content();
    }
    let mut chain = log::genesis(log.ledger);
    for commit in &mut log.commits[1..] {
        let leaves = log.events.iter().filter(|event| event.commit == commit.number);
        let leaves: Vec<_> = leaves.map(|event| event.leaf.clone()).collect();
        commit.root = log::root(&leaves);
        chain = log::chain(&chain, &commit.root, commit.first, commit.last);
        commit.chain.clone_from(&chain);
    }
}
