//! Amounts, currencies and wallets that money must not come from or go to.

use serde_json::json;

use crate::system::{System, fresh_key};
use crate::table::{Case, case, refused, taken};
use crate::wire::Request;

pub(crate) fn table(system: &System) -> Vec<Case> {
    let mut cases = amounts(system);
    cases.extend(currencies(system));
    cases.extend(wallets(system));
    cases
}

fn amounts(system: &System) -> Vec<Case> {
    let of = |wallet: &str, amount: &str, currency: &str| {
        system.transfer_of(
            &json!({"fromWalletId": wallet, "toWalletId": system.bob, "amount": amount, "currency": currency}),
        )
    };
    let mut cases = Vec::new();
    for (slug, amounts) in [
        ("amount-not-positive", &["-1.00", "-0.01", "0", "0.00", "-0", "-0.00", "0.0"][..]),
        (
            "amount-format",
            &[
                "NaN",
                "Infinity",
                "-Infinity",
                "inf",
                "1e3",
                "1E3",
                "1e-3",
                "0x10",
                "0b1",
                "0o7",
                " 10",
                "10 ",
                "+10",
                "1,000.00",
                "10,00",
                "1.000,00",
                "1_000",
                "010",
                "00",
                "-01",
                ".5",
                "5.",
                ".",
                "",
                "-",
                "--1",
                "1.2.3",
                "١٠",
                "１０",
                "৪",
                "½",
                "Ⅷ",
                "10€",
                "EUR 10",
                "$10",
                "10\u{a0}",
                "ten",
                "null",
                "1'000",
                "1 000",
                "1/2",
                "10%",
                "1\u{2212}",
                "\u{2212}1",
                "1.0f",
                "0.1.",
                "𝟏𝟎",
            ],
        ),
        ("amount-precision", &["10.001", "0.001", "0.000", "10.000", "1.0000000000000001"]),
        (
            "amount-out-of-range",
            &[
                "1234567890123456789",
                "99999999999999999.99",
                "9223372036854775808",
                "18446744073709551616",
                "0.0000000000000000001",
            ],
        ),
    ] {
        for amount in amounts {
            cases.push(case(
                format!("14 to 22 the amount {amount:?}"),
                system.transfer_with("amount", *amount),
                refused(422, slug).at("/amount"),
            ));
        }
    }
    for (name, number) in [
        ("10.10", json!(10.10)),
        ("10", json!(10)),
        ("-1", json!(-1)),
        ("1e3", json!(1e3)),
        ("u64::MAX", json!(u64::MAX)),
        ("0.1 + 0.2", json!(0.30000000000000004)),
    ] {
        cases.push(case(
            format!("18 the number {name}"),
            system.transfer_with("amount", number),
            refused(422, "amount-format").at("/amount"),
        ));
    }
    for digits in [19, 40, 60_000] {
        cases.push(case(
            format!("19 an amount of {digits} digits"),
            system.transfer_with("amount", "1".repeat(digits)),
            refused(422, "amount-out-of-range").at("/amount"),
        ));
    }
    cases.extend([
        case(
            "19 an amount of a million digits",
            system.transfer_with("amount", "1".repeat(1_000_000)),
            refused(413, "payload-too-large"),
        ),
        case(
            "19 18 digits, more than there is",
            system.transfer_with("amount", "9".repeat(16)),
            refused(422, "insufficient-funds"),
        ),
        case("21 half a yen", of(&system.yen, "1.5", "JPY"), refused(422, "amount-precision")),
        case("21 a yen and no half", of(&system.yen, "1.0", "JPY"), refused(422, "amount-precision")),
        case("21 a tenth of a fils", of(&system.dinar, "1.2345", "KWD"), refused(422, "amount-precision")),
        case(
            "an amount with fewer digits than its currency has",
            system.transfer_with("amount", "0.1"),
            taken(201).moving_money().contains("\"0.10\""),
        ),
    ]);
    cases
}

fn currencies(system: &System) -> Vec<Case> {
    let mut cases = Vec::new();
    for currency in [
        "ZZZ",
        "eur",
        "Eur",
        "€",
        "XXX",
        "XTS",
        "XAU",
        "EURO",
        "EU",
        "E",
        "",
        " EUR",
        "EUR ",
        "978",
        "ЕUR",
        "ＥＵＲ",
        "EÜR",
        "DEM",
        "BTC",
        "EU\u{301}R",
        "null",
        "EUR;USD",
        "EUR/USD",
    ] {
        cases.push(case(
            format!("23 the currency {currency:?}"),
            system.transfer_with("currency", currency),
            refused(422, "currency-unknown").at("/currency"),
        ));
        let open =
            Request::post("/v1/wallets").bearer(&system.partner).json(&json!({"userId": "u", "currency": currency}));
        cases.push(case(
            format!("23 a wallet in {currency:?}"),
            open,
            refused(422, "currency-unknown").at("/currency"),
        ));
    }
    cases.push(case(
        "23 a currency of 5,000 letters",
        system.transfer_with("currency", "E".repeat(5_000)),
        refused(422, "currency-unknown"),
    ));
    let open = Request::post("/v1/wallets").bearer(&system.partner).json(&json!({"userId": "u", "currency": "SEK"}));
    cases.push(case("23 a currency that the partner does not have", open, refused(422, "currency-not-enabled")));
    cases
}

fn wallets(system: &System) -> Vec<Case> {
    let (alice, bob, yen, frozen, closed) = (&system.alice, &system.bob, &system.yen, &system.frozen, &system.closed);
    let of = |from: &str, to: &str, amount: &str, currency: &str| {
        system.transfer_of(&json!({"fromWalletId": from, "toWalletId": to, "amount": amount, "currency": currency}))
    };
    let adjust = |wallet: &str, direction: &str, amount: &str| {
        let body =
            json!({"walletId": wallet, "direction": direction, "amount": amount, "currency": "EUR", "reason": "r"});
        Request::post("/v1/transactions/adjustment").bearer(&system.admin).key(fresh_key()).json(&body)
    };
    let top_up = |wallet: &str, currency: &str| {
        let body = json!({"walletId": wallet, "amount": "1", "currency": currency});
        Request::post("/v1/transactions/top-up").bearer(&system.partner).key(fresh_key()).json(&body)
    };
    let life = |wallet: &str, what: &str| {
        Request::post(format!("/v1/wallets/{wallet}/{what}")).bearer(&system.partner).json(&json!({"reason": "r"}))
    };
    let absent = "wal_0192f0c1-2d3e-7abc-8def-0123456789ab";
    let mut cases = vec![
        case("24 dollars to wallets of euros", of(alice, bob, "1.00", "USD"), refused(422, "currency-mismatch")),
        case("24 euros to a wallet of yen", of(alice, yen, "1.00", "EUR"), refused(422, "currency-mismatch")),
        case("24 euros for a wallet of yen from the bank", top_up(yen, "EUR"), refused(422, "currency-mismatch")),
        case("25 more than there is", of(bob, alice, "1000000.00", "EUR"), refused(422, "insufficient-funds")),
        case(
            "25 taking away more than there is",
            adjust(bob, "DEBIT", "1000000.00"),
            refused(422, "insufficient-funds"),
        ),
        case("26 to itself", of(alice, alice, "1.00", "EUR"), refused(422, "same-wallet").at("/toWalletId")),
        case("28 from a frozen wallet", of(frozen, bob, "1.00", "EUR"), refused(409, "wallet-frozen")),
        case("28 to a frozen wallet", of(alice, frozen, "1.00", "EUR"), refused(409, "wallet-frozen")),
        case("28 from a closed wallet", of(closed, bob, "1.00", "EUR"), refused(409, "wallet-closed")),
        case("28 to a closed wallet", of(alice, closed, "1.00", "EUR"), refused(409, "wallet-closed")),
        case("28 an adjustment of a frozen wallet", adjust(frozen, "CREDIT", "1.00"), refused(409, "wallet-frozen")),
        case("28 a top-up of a closed wallet", top_up(closed, "EUR"), refused(409, "wallet-closed")),
        case("freezing a frozen wallet", life(frozen, "freeze"), refused(409, "wallet-frozen")),
        case("unfreezing an active wallet", life(alice, "unfreeze"), refused(409, "invalid-transition")),
        case("closing a wallet with money in it", life(alice, "close"), refused(409, "wallet-not-empty")),
        case("opening a closed wallet again", life(closed, "unfreeze"), refused(409, "wallet-closed")),
        case("a wallet that is not there", of(absent, bob, "1.00", "EUR"), refused(404, "wallet-not-found")),
        case("to a wallet that is not there", of(alice, absent, "1.00", "EUR"), refused(404, "wallet-not-found")),
        case(
            "an adjustment in no direction",
            adjust(alice, "SIDEWAYS", "1.00"),
            refused(422, "invalid-field").at("/direction"),
        ),
        case(
            "an adjustment in small letters",
            adjust(alice, "credit", "1.00"),
            refused(422, "invalid-field").at("/direction"),
        ),
    ];
    for url in [
        "javascript:alert(1)",
        "data:text/html,a",
        "http://shop.example/",
        "//shop.example",
        "shop",
        "file:///etc/passwd",
        "https://user:secret@shop.example/",
        "https://shop.example/\nX: y",
    ] {
        let body = json!({"walletId": alice, "amount": "1", "currency": "EUR", "returnUrl": url});
        let request = Request::post("/v1/transactions/top-up").bearer(&system.partner).key(fresh_key()).json(&body);
        let slug = if url.contains('\n') { "invalid-character" } else { "invalid-field" };
        cases.push(case(format!("going back to {url:?}"), request, refused(422, slug).at("/returnUrl")));
    }
    cases
}
