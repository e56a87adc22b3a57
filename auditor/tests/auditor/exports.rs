//! Exports, whole and damaged. No database: the lines come from the store's own types.

use crate::story::{Story, euros, instruction};
use auditor::{Report, verify};
use event_store::Draft;
use ledger_core::*;
use uuid::Uuid;

fn ledger() -> LedgerId {
    LedgerId::from_uuid(Uuid::now_v7())
}

fn read(export: impl AsRef<[u8]>) -> Report {
    verify(export.as_ref(), |_| {}).unwrap()
}

/// The first bad position must be this one, and the named check must be among those that say so.
#[track_caller]
fn caught(report: &Report, position: i64, check: &str) {
    assert_eq!(report.first_bad_position(), Some(position), "{report}");
    assert!(report.findings.iter().any(|found| found.check == check), "{check} is silent:\n{report}");
    assert!(!report.is_sound());
}

#[test]
fn an_untouched_export_is_sound_and_its_totals_are_the_book_s() {
    let story = Story::told(ledger());
    let report = read(story.export());
    assert!(report.is_sound(), "{report}");
    let last = story.commits.last().unwrap();
    assert_eq!((report.position, report.commit, report.chain), (last.last, last.number, last.chain));
    assert_eq!(report.ledger.map(LedgerId::from_uuid), Some(story.ledger));
    let euros = report.currencies["EUR"];
    assert_eq!(
        [euros.customers, euros.partners, euros.system].map(|sum| sum.to_string()),
        ["120.01", "0.00", "-120.01"]
    );
    assert!(report.to_string().starts_with("sound\n"), "{report}");
}

#[test]
fn a_log_that_has_only_begun_is_sound() {
    let ledger = ledger();
    let chain = event_store::hash::hex(&event_store::hash::genesis(ledger));
    let export = format!(
        "{{\"ledger\": {{\"id\": \"{ledger}\", \"format\": 1}}}}\n{{\"checkpoint\": {{\"position\": 0, \"commit\": 0, \"chain\": \"{chain}\"}}}}"
    );
    let report = read(export);
    assert!(report.is_sound(), "{report}");
}

#[test]
fn any_changed_byte_is_caught() {
    let mut story = Story::begin(ledger());
    story.fund(story.alice, "10.00");
    let export = story.export().into_bytes();
    for at in 0..export.len() {
        let mut changed = export.clone();
        changed[at] ^= 1;
        assert!(
            !read(&changed).is_sound(),
            "byte {at}: {:?}",
            String::from_utf8_lossy(&changed[at.saturating_sub(40)..][..80.min(export.len() - at)])
        );
    }
}

#[test]
fn a_missing_line_is_caught_whichever_it_is() {
    let story = Story::told(ledger());
    let export = story.export();
    let lines: Vec<&str> = export.lines().collect();
    for missing in 0..lines.len() {
        let left: Vec<&str> =
            lines.iter().enumerate().filter(|(at, _)| *at != missing).map(|(_, line)| *line).collect();
        let report = read(left.join("\n"));
        assert!(!report.is_sound(), "{}", lines[missing]);
        if lines[missing].contains("\"eventId\"") {
            let position = lines[..missing].iter().filter(|line| line.contains("\"eventId\"")).count() as i64 + 1;
            caught(&report, position, "position");
        }
    }
}

#[test]
fn reordered_lines_are_caught_wherever_they_are() {
    let export = Story::told(ledger()).export();
    let lines: Vec<&str> = export.lines().collect();
    for at in 1..lines.len() {
        let mut reordered = lines.clone();
        reordered.swap(at - 1, at);
        assert!(!read(reordered.join("\n")).is_sound(), "lines {at} and {}", at + 1);
    }
}

#[test]
fn a_truncated_end_is_caught_even_between_commits() {
    let story = Story::told(ledger());
    let export = story.export();
    let lines: Vec<&str> = export.lines().collect();
    for kept in 0..lines.len() {
        assert!(!read(lines[..kept].join("\n")).is_sound(), "{kept} lines");
    }
    let cut = &export[..export.len() - 10];
    assert!(!read(cut).is_sound());
    let with_end_of_whole = [&lines[..3], &lines[lines.len() - 1..]].concat().join("\n");
    assert!(!read(with_end_of_whole).is_sound(), "the checkpoint of the whole does not fit a part");
}

#[test]
fn a_malformed_line_is_named_by_its_number() {
    let export = Story::told(ledger()).export();
    for garbage in ["", "{}", "nonsense", "[1]", "{\"commit\":{}}", "{\"checkpoint\":null}", "\u{0}", "{\"ledger\":{}}"]
    {
        let mut lines: Vec<&str> = export.lines().collect();
        lines.insert(4, garbage);
        let report = read(lines.join("\n"));
        caught(&report, 4, "line");
        assert!(report.findings[0].detail.starts_with("line 5: "), "{garbage}: {report}");
    }
    let mut bytes = export.clone().into_bytes();
    bytes[200] = 0xff;
    caught(&read(bytes), 1, "line");
    caught(&read(""), 0, "line");
}

#[test]
fn one_ledger_s_events_are_not_another_s() {
    let story = Story::told(ledger());
    let other = story.export().replace(&story.ledger.to_string(), &ledger().to_string());
    caught(&read(other), 1, "chain");
}

/// Someone who writes the log itself, and hashes correctly, still cannot make these sound.
mod lies_that_are_hashed_correctly {
    use super::*;

    fn entry(wallet_id: WalletId, direction: Direction, amount: &str, after: &str, version: i64) -> Entry {
        let balance_after = after.parse().unwrap();
        Entry { wallet_id, direction, amount: euros(amount).amount(), balance_after, wallet_version: version }
    }

    /// Appends one more event to the story and expects it, and nothing before it, to be found out.
    #[track_caller]
    fn lie(check: &str, tell: impl FnOnce(&Story) -> NewEvent) {
        let mut story = Story::begin(ledger());
        story.fund(story.alice, "10.00"); // alice: version 2; bob: version 1
        let event = tell(&story);
        let position = story.commits.last().unwrap().last + 1;
        let draft = Draft::new(CommandId::from_uuid(Uuid::now_v7()), None, "{}", event);
        story.seal(story.now(), &[draft]);
        caught(&read(story.export()), position, check);
    }

    fn posted(story: &Story, amount: &str, entries: Vec<Entry>) -> NewEvent {
        let asked = instruction(TransactionKind::Transfer, story.alice, Some(story.bob), amount);
        let entries = Entries::balanced(entries).unwrap();
        let event = TransactionEvent::Posted { instruction: asked.into(), entries };
        NewEvent { sequence: 1, event: Event::Transaction(TransactionId::from_uuid(Uuid::now_v7()), event) }
    }

    #[test]
    fn a_wallet_below_its_floor() {
        lie("floor", |story| {
            let taken = entry(story.alice, Direction::Debit, "10.01", "-0.01", 3);
            posted(story, "10.01", vec![taken, entry(story.bob, Direction::Credit, "10.01", "10.01", 2)])
        });
    }

    #[test]
    fn a_balance_that_the_entries_do_not_come_to() {
        lie("balance-after", |story| {
            let taken = entry(story.alice, Direction::Debit, "1.00", "9.00", 3);
            posted(story, "1.00", vec![taken, entry(story.bob, Direction::Credit, "1.00", "2.00", 2)])
        });
    }

    #[test]
    fn a_change_of_a_wallet_that_was_left_out() {
        lie("wallet-version", |story| {
            let taken = entry(story.alice, Direction::Debit, "1.00", "9.00", 4);
            posted(story, "1.00", vec![taken, entry(story.bob, Direction::Credit, "1.00", "1.00", 2)])
        });
    }

    #[test]
    fn money_that_goes_elsewhere_than_asked() {
        lie("instruction", |story| {
            let taken = entry(story.bob, Direction::Debit, "1.00", "-1.00", 2);
            posted(story, "1.00", vec![taken, entry(story.alice, Direction::Credit, "1.00", "11.00", 3)])
        });
    }

    #[test]
    fn an_amount_with_a_digit_too_few() {
        lie("amount", |story| {
            let cheap = |wallet, direction, after: &str, version| {
                let mut entry = entry(wallet, direction, "1.00", after, version);
                entry.amount = "1.0".parse().unwrap();
                entry
            };
            let taken = cheap(story.alice, Direction::Debit, "9.00", 3);
            posted(story, "1.00", vec![taken, cheap(story.bob, Direction::Credit, "1.00", 2)])
        });
    }

    #[test]
    fn another_currency_in_a_wallet() {
        lie("currency", |story| {
            let mut asked = instruction(TransactionKind::Transfer, story.alice, Some(story.bob), "1.00");
            asked.currency = "USD".parse().unwrap();
            let taken = entry(story.alice, Direction::Debit, "1.00", "9.00", 3);
            let entries =
                Entries::balanced(vec![taken, entry(story.bob, Direction::Credit, "1.00", "1.00", 2)]).unwrap();
            let event = TransactionEvent::Posted { instruction: asked.into(), entries };
            NewEvent { sequence: 1, event: Event::Transaction(TransactionId::from_uuid(Uuid::now_v7()), event) }
        });
    }

    #[test]
    fn a_wallet_closed_with_money_in_it() {
        lie("closed-wallet", |story| {
            let event = WalletEvent::Closed {
                reason: "x".to_owned(),
                wallet_version: 3,
                balance_after: "10.00".parse().unwrap(),
            };
            NewEvent { sequence: 2, event: Event::Wallet(story.alice, event) }
        });
    }

    #[test]
    fn money_in_a_wallet_that_is_frozen() {
        let mut story = Story::begin(ledger());
        let alice = story.alice;
        story.fund(alice, "10.00");
        story.commit([Action::FreezeWallet { wallet: alice, reason: "x".to_owned() }]);
        let taken = entry(alice, Direction::Debit, "1.00", "9.00", 4);
        let event = posted(&story, "1.00", vec![taken, entry(story.bob, Direction::Credit, "1.00", "1.00", 2)]);
        let position = story.commits.last().unwrap().last + 1;
        story.seal(story.now(), &[Draft::new(CommandId::from_uuid(Uuid::now_v7()), None, "{}", event)]);
        caught(&read(story.export()), position, "wallet-status");
    }

    #[test]
    fn an_end_without_a_beginning() {
        lie("transaction-life", |story| {
            let event = TransactionEvent::Expired { wallet_id: story.alice };
            NewEvent { sequence: 2, event: Event::Transaction(TransactionId::from_uuid(Uuid::now_v7()), event) }
        });
    }

    #[test]
    fn a_transaction_that_happens_twice() {
        let mut story = Story::told(ledger());
        let twice =
            story.commits.iter().flat_map(|commit| &commit.events).find(|it| it.event_type == "TransactionDeclined");
        let Ok(event) = twice.unwrap().read() else { panic!("the store wrote it") };
        let position = story.commits.last().unwrap().last + 1;
        let draft = Draft::new(CommandId::from_uuid(Uuid::now_v7()), None, "{}", NewEvent { sequence: 1, event });
        story.seal(story.now(), &[draft]);
        caught(&read(story.export()), position, "transaction-life");
    }

    #[test]
    fn a_second_system_wallet_without_a_floor() {
        lie("wallet-life", |_| {
            let currency: Currency = "EUR".parse().unwrap();
            let event = WalletEvent::Opened {
                kind: WalletKind::Bank,
                partner_id: None,
                user_id: None,
                currency,
                metadata: Metadata::new(),
                wallet_version: 1,
                balance_after: Balance::zero(currency),
            };
            NewEvent { sequence: 1, event: Event::Wallet(WalletId::from_uuid(Uuid::now_v7()), event) }
        });
    }

    #[test]
    fn a_sequence_that_skips() {
        lie("sequence", |story| {
            let event = WalletEvent::Frozen {
                reason: "x".to_owned(),
                wallet_version: 3,
                balance_after: "10.00".parse().unwrap(),
            };
            NewEvent { sequence: 3, event: Event::Wallet(story.alice, event) }
        });
    }

    #[test]
    fn a_key_or_a_command_used_again() {
        for (used_again, check) in [(true, "key"), (false, "command")] {
            let mut story = Story::begin(ledger());
            let key = Key { hash: [1; 16], request: [9; 32] }; // the first command of the story has this key
            let (key, command) = match used_again {
                true => (Some(key), CommandId::from_uuid(Uuid::now_v7())),
                false => (None, story.commits[0].events[0].command_id),
            };
            let event = WalletEvent::Frozen {
                reason: "x".to_owned(),
                wallet_version: 2,
                balance_after: "0.00".parse().unwrap(),
            };
            let event = NewEvent { sequence: 2, event: Event::Wallet(story.alice, event) };
            let position = story.commits.last().unwrap().last + 1;
            story.seal(story.now(), &[Draft::new(command, key, "{}", event)]);
            caught(&read(story.export()), position, check);
        }
    }
}
