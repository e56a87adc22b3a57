//! Bodies: what is not JSON, not what was asked for, or has in it what must not be in any text.

use serde_json::{Value, json};

use crate::system::System;
use crate::table::{Case, Expected, case, refused, taken};
use crate::wire::Request;

pub(crate) fn table(system: &System) -> Vec<Case> {
    let mut cases = syntax(system);
    cases.extend(fields(system));
    cases.extend(metadata(system));
    cases.extend(characters(system));
    cases.extend(times(system));
    cases
}

fn syntax(system: &System) -> Vec<Case> {
    let good = system.transfer_body().to_string();
    let open = good.strip_suffix('}').unwrap();
    let utf16: Vec<u8> = good.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let quoted = |bytes: &[u8]| [open.as_bytes(), b",\"reference\":\"", bytes, b"\"}"].concat();
    let deep = |depth: usize| format!("{open},\"metadata\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
    let number = |number: &str| good.replace("\"0.01\"", number);
    let malformed = || refused(400, "malformed-json");
    let rows: Vec<(&str, Vec<u8>, Expected)> = vec![
        ("1 an empty body", Vec::new(), malformed()),
        ("1 blanks", b" \r\n\t ".to_vec(), malformed()),
        ("1 a body cut short", good[..good.len() - 9].into(), malformed()),
        ("1 something after the end", format!("{good}x").into(), malformed()),
        ("1 two bodies", format!("{good}{good}").into(), malformed()),
        ("1 a comment", format!("/* a */{good}").into(), malformed()),
        ("1 a comma at the end", format!("{open},}}").into(), malformed()),
        ("1 single quotes", good.replace('"', "'").into(), malformed()),
        ("1 names without quotes", b"{amount:\"1.00\"}".to_vec(), malformed()),
        ("1 a form", b"amount=1.00&currency=EUR".to_vec(), malformed()),
        (
            "1 XML",
            b"<?xml version=\"1.0\"?><!DOCTYPE a [<!ENTITY b SYSTEM \"file:///etc/passwd\">]><a>&b;</a>".to_vec(),
            malformed(),
        ),
        ("2 a byte that is no UTF-8", quoted(b"\xff"), malformed()),
        ("2 an overlong NUL", quoted(b"\xc0\x80"), malformed()),
        ("2 a surrogate in UTF-8", quoted(b"\xed\xa0\x80"), malformed()),
        ("2 a character beyond the last", quoted(b"\xf4\x90\x80\x80"), malformed()),
        ("2 UTF-16", utf16, malformed()),
        ("2 a byte order mark", format!("\u{feff}{good}").into(), malformed()),
        ("2 a lone surrogate", quoted(br"\ud800"), malformed()),
        ("2 surrogates in the wrong order", quoted(br"\udc00\ud800"), malformed()),
        ("2 a surrogate before a letter", quoted(br"\ud800a"), malformed()),
        ("6 129 levels", deep(128).into(), malformed()),
        ("6 60,000 levels", "[".repeat(60_000).into(), malformed()),
        ("6 60,000 levels of objects", "{\"a\":".repeat(10_000).into(), malformed()),
        ("7 100 levels of metadata", deep(100).into(), refused(422, "invalid-field")),
        ("16 a bare NaN", number("NaN").into(), malformed()),
        ("16 a bare Infinity", number("Infinity").into(), malformed()),
        ("16 a bare -Infinity", number("-Infinity").into(), malformed()),
        ("17 a bare 0x10", number("0x10").into(), malformed()),
        ("22 a bare 010", number("010").into(), malformed()),
        ("22 a bare +1", number("+1").into(), malformed()),
        ("22 a bare .5", number(".5").into(), malformed()),
        ("22 a bare 5.", number("5.").into(), malformed()),
        (
            "18 a number beyond what a float holds, which is JSON",
            number("1E400").into(),
            refused(422, "invalid-field").at("/amount"),
        ),
        (
            "18 a number of 60,000 digits",
            number(&"9".repeat(60_000)).into(),
            refused(422, "invalid-field").at("/amount"),
        ),
        ("a key twice", format!("{open},\"amount\":\"0.01\"}}").into(), refused(400, "duplicate-field").at("/amount")),
        (
            "a key twice, once escaped",
            format!("{open},\"\\u0061mount\":\"9.00\"}}").into(),
            refused(400, "duplicate-field").at("/amount"),
        ),
        (
            "a key twice in metadata",
            format!("{open},\"metadata\":{{\"a\":1,\"a\":1}}}}").into(),
            refused(400, "duplicate-field").at("/metadata/a"),
        ),
    ];
    rows.into_iter().map(|(name, body, expected)| case(name, system.transfer_request().body(body), expected)).collect()
}

fn fields(system: &System) -> Vec<Case> {
    let invalid = |pointer: &str| refused(422, "invalid-field").at(pointer);
    let unknown = |pointer: &str| refused(422, "unknown-field").at(pointer);
    let with = |name: &str, field: &str, value: Value, expected: Expected| {
        case(
            format!("{name} {field}: {}", value.to_string().chars().take(40).collect::<String>()),
            system.transfer_with(field, value),
            expected,
        )
    };
    let without = |field: &str| {
        let mut body = system.transfer_body();
        body.as_object_mut().unwrap().remove(field);
        case(format!("5 without {field}"), system.transfer_of(&body), invalid(&format!("/{field}")))
    };
    let mut cases = vec![
        with("4", "amout", json!("1.00"), unknown("/amout")),
        with("4", "Amount", json!("1.00"), unknown("/Amount")),
        with("4", "from_wallet_id", json!("x"), unknown("/from_wallet_id")),
        with("4 a Cyrillic а in", "\u{430}mount", json!("1.00"), unknown("/\u{430}mount")),
        with("4", "__proto__", json!({"admin": true}), unknown("/__proto__")),
        with("4", "constructor", json!({"prototype": {}}), unknown("/constructor")),
        with("4", "", json!(1), unknown("/")),
        with("4", "$where", json!("1"), unknown("/$where")),
        with("4 what the server decides:", "status", json!("SUCCESS"), unknown("/status")),
        with("4 what the server decides:", "partnerId", json!("par_1"), unknown("/partnerId")),
        with("4 a name longer than may be repeated", &"x".repeat(500), json!(1), refused(422, "unknown-field").at("")),
        with("4 a name that is a pointer:", "a/b~c", json!(1), unknown("/a~1b~0c")),
        with("5", "fromWalletId", json!(1), invalid("/fromWalletId")),
        with("5", "fromWalletId", json!(null), invalid("/fromWalletId")),
        with("5", "fromWalletId", json!([system.alice]), invalid("/fromWalletId")),
        with("5", "amount", json!(null), invalid("/amount")),
        with("5", "amount", json!(["1.00"]), invalid("/amount")),
        with("5", "amount", json!({"value": "1.00"}), invalid("/amount")),
        with("5", "amount", json!(true), invalid("/amount")),
        with("5", "currency", json!(978), invalid("/currency")),
        with("5", "currency", json!(null), invalid("/currency")),
        with("5", "reference", json!(1), invalid("/reference")),
        with("5", "reference", json!(""), invalid("/reference")),
        with("5", "reference", json!("r".repeat(129)), invalid("/reference")),
        with("5", "description", json!("d".repeat(513)), invalid("/description")),
        with("5", "description", json!({"$gt": ""}), invalid("/description")),
        with("5", "metadata", json!([]), invalid("/metadata")),
        with("5", "metadata", json!("{}"), invalid("/metadata")),
        without("fromWalletId"),
        without("toWalletId"),
        without("amount"),
        without("currency"),
    ];
    // What serde takes for the same request, field after field.
    let in_order = json!([system.alice, system.bob, "0.01", "EUR", null, null, null, null]);
    cases.push(case("5 an array of all fields for an object", system.transfer_of(&in_order), invalid("")));
    for body in [json!([]), json!(null), json!("text"), json!(1), json!(true), json!([system.transfer_body()])] {
        cases.push(case(
            format!("5 {} for an object", body.to_string().chars().take(20).collect::<String>()),
            system.transfer_of(&body),
            invalid(""),
        ));
    }
    for wallet in ["", "1", "wal_", "wal_1", "wal_00000000-0000-0000-0000-000000000000", "'; DROP TABLE events;--"] {
        cases.push(with("29", "toWalletId", json!(wallet), refused(400, "invalid-id").at("/toWalletId")));
    }
    let uuid = system.bob.strip_prefix("wal_").unwrap();
    for wallet in [
        uuid.to_owned(),
        format!("wal_{{{uuid}}}"),
        format!("wal_urn:uuid:{uuid}"),
        format!("wal_{}", uuid.replace('-', "")),
        format!("txn_{uuid}"),
        format!("WAL_{uuid}"),
        format!("wal_{}", uuid.to_uppercase()),
        format!("wal_{uuid} "),
        "w".repeat(5_000),
    ] {
        cases.push(with("29", "toWalletId", json!(wallet), refused(400, "invalid-id").at("/toWalletId")));
    }
    cases
}

fn metadata(system: &System) -> Vec<Case> {
    let with = |name: &str, metadata: Value, expected: Expected| {
        case(name, system.transfer_with("metadata", metadata), expected)
    };
    let too_large = || refused(422, "metadata-too-large");
    let keys = |count: usize| {
        (0..count).map(|number| (format!("k{number}"), json!(number))).collect::<serde_json::Map<_, _>>()
    };
    let nested = |depth: usize| (1..depth).fold(json!({}), |inner, _| json!({"a": inner}));
    let text = |value: &str| {
        let body = system.transfer_body().to_string();
        let body = body.replace("\"amount\"", &format!("\"metadata\":{value},\"amount\""));
        system.transfer_request().body(body)
    };
    vec![
        with("7 metadata 5 deep", nested(5), taken(201).moving_money()),
        with("7 metadata 6 deep", nested(6), too_large()),
        with("7 metadata 100 deep", nested(100), too_large()),
        with("7 lists 6 deep", json!({"a": [[[[[]]]]]}), too_large()),
        with("7 50 keys", Value::Object(keys(50)), taken(201).moving_money()),
        with("7 51 keys", Value::Object(keys(51)), too_large()),
        with("7 5,000 keys", Value::Object(keys(5_000)), too_large()),
        with(
            "7 100,000 keys, which are too many bytes too",
            Value::Object(keys(100_000)),
            refused(413, "payload-too-large"),
        ),
        with("7 51 keys on two levels", json!({"a": keys(25), "b": keys(24)}), too_large()),
        with("7 5,000 items", json!({"a": vec![0; 5_000]}), too_large()),
        with("7 a key of 64 bytes", json!({"k".repeat(64): 1}), taken(201).moving_money()),
        with("7 a key of 65 bytes", json!({"k".repeat(65): 1}), too_large()),
        with("7 a key of 33 letters and 66 bytes", json!({"ä".repeat(33): 1}), too_large()),
        with("7 a text of 513 bytes", json!({"a": "v".repeat(513)}), too_large()),
        with("7 a text of 257 letters and 514 bytes", json!({"a": "ä".repeat(257)}), too_large()),
        with(
            "metadata that would change a careless reader",
            json!({"__proto__": {"admin": true}, "constructor": {"prototype": {}}, "$where": "1"}),
            taken(201).moving_money().contains("__proto__"),
        ),
        case(
            "a number in metadata that no float can hold",
            text("{\"n\":1e400}"),
            refused(422, "invalid-field").at("/metadata/n"),
        ),
        case(
            "a number in metadata that a float would change",
            text("{\"n\":123456789012345678901234567890}"),
            refused(422, "invalid-field"),
        ),
        case("a negative zero in metadata", text("{\"n\":-0}"), taken(201).moving_money()),
        case("a number that is as good as zero in metadata", text("{\"n\":1e-400}"), taken(201).moving_money()),
    ]
}

fn characters(system: &System) -> Vec<Case> {
    let refused = || refused(422, "invalid-character");
    let mut cases = Vec::new();
    // By their escapes, as JSON carries them; each must be refused wherever it stands.
    for escape in [
        "0000", "0001", "0008", "001b", "001f", "007f", "0085", "009f", "202a", "202e", "2066", "2069", "fdd0", "fffe",
        "ffff",
    ] {
        for field in ["reference", "description", "currency", "toWalletId", "amount"] {
            cases.push(case(
                format!("10, 11 U+{escape} in {field}"),
                raw(system, field, &format!("a\\u{escape}b")),
                refused().at(format!("/{field}")),
            ));
        }
        cases.push(case(
            format!("10, 11 U+{escape} in metadata"),
            raw_metadata(system, "a", &format!("\\u{escape}")),
            refused().at("/metadata/a"),
        ));
        cases.push(case(
            format!("10, 11 U+{escape} in a key"),
            raw_metadata(system, &format!("a\\u{escape}"), "b"),
            refused().at("/metadata"),
        ));
    }
    cases.push(case("11 a noncharacter beyond the first plane", raw(system, "reference", "\\ud83f\\udffe"), refused()));
    // In a name what cannot be seen makes two of what looks like one. In a text it may be how a language is written.
    for (name, character) in [
        ("a tab", "\t"),
        ("a line feed", "\n"),
        ("a carriage return", "\r"),
        ("a line separator", "\u{2028}"),
        ("a paragraph separator", "\u{2029}"),
        ("a right-to-left mark", "\u{200f}"),
        ("a left-to-right mark", "\u{200e}"),
        ("an Arabic letter mark", "\u{61c}"),
        ("a zero-width blank", "\u{200b}"),
        ("a word joiner", "\u{2060}"),
        ("a soft hyphen", "\u{ad}"),
        ("a byte order mark", "\u{feff}"),
        ("a tag", "\u{e0041}"),
        ("an annotation", "\u{fff9}"),
        ("a deprecated format character", "\u{206a}"),
    ] {
        let text = format!("a{character}b");
        cases.push(case(
            format!("11 {name} in a reference"),
            system.transfer_with("reference", &*text),
            refused().at("/reference"),
        ));
        cases.push(case(
            format!("11 {name} in a key"),
            system.transfer_with("metadata", json!({(&*text): 1})),
            refused().at("/metadata"),
        ));
        let open =
            Request::post("/v1/wallets").bearer(&system.partner).json(&json!({"userId": text, "currency": "EUR"}));
        cases.push(case(format!("11 {name} in a user's name"), open, refused().at("/userId")));
        cases.push(case(
            format!("11 {name} in a description"),
            system.transfer_with("description", &*text),
            taken(201).moving_money(),
        ));
    }
    for text in [
        "'; DROP TABLE events;--",
        "<script>alert(1)</script>",
        "{{7*7}}",
        "=cmd()",
        "${jndi:ldap://evil/a}",
        "../../etc/passwd",
        "%s%n%x",
        "\u{202f}a",
        "👩‍👩‍👧",
        "السلام عليكم",
        "a\u{300}\u{301}\u{302}",
        "two\nlines\tand a tab",
    ] {
        cases.push(case(
            format!("13 a description {text:?}"),
            system.transfer_with("description", text),
            taken(201).moving_money().contains(json!(text).to_string()),
        ));
    }
    cases
}

fn times(system: &System) -> Vec<Case> {
    let at = |time: &str, expected: Expected| {
        case(format!("effectiveAt {time:?}"), system.transfer_with("effectiveAt", time), expected)
    };
    let no_time = || refused(422, "time-format").at("/effectiveAt");
    let not_yet = || refused(422, "time-range-invalid").at("/effectiveAt");
    let fine = |time: &str| taken(201).moving_money().contains(format!("\"effectiveAt\":\"{time}\""));
    let mut cases: Vec<Case> = [
        "",
        "now",
        "yesterday",
        "2026-01-01",
        "2026-01-01T00:00:00",
        "2026-01-01T00:00:00.Z",
        "2026-01-01T00:00:00.",
        "2026-01-01T00:00Z",
        "2026-02-30T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-01-01T24:00:00Z",
        "2026-01-01T00:60:00Z",
        "2026-06-15T12:30:60Z",
        "2026-01-01T00:00:00+25:00",
        "2026-01-01T00:00:00+0100",
        "2026-01-01T00:00:00 UTC",
        "26-01-01T00:00:00Z",
        "+2026-01-01T00:00:00Z",
        "-0001-01-01T00:00:00Z",
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "2026-W01-1T00:00:00Z",
        "2026-001T00:00:00Z",
        "1767225600",
        "２０２６-01-01T00:00:00Z",
        "2026-01-01T00:00:00Z ",
        " 2026-01-01T00:00:00Z",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
    ]
    .map(|time| at(time, no_time()))
    .into();
    cases.extend([
        at("9999-12-31T23:59:59Z", not_yet()),
        at("2100-01-01T00:00:00Z", not_yet()),
        at("0001-01-01T00:00:00Z", fine("0001-01-01T00:00:00.000000Z")),
        at("2016-12-31T23:59:60Z", fine("2016-12-31T23:59:59.999999Z")), // a second that there was and that no clock of ours shows
        at("2026-01-01T12:00:00+14:00", fine("2025-12-31T22:00:00.000000Z")),
        at("2026-01-01T12:00:00-00:00", fine("2026-01-01T12:00:00.000000Z")),
        at("2026-01-01t12:00:00z", fine("2026-01-01T12:00:00.000000Z")),
        at("2026-01-01T12:00:00.123456789Z", fine("2026-01-01T12:00:00.123456Z")),
        case(
            "a time as a number",
            system.transfer_with("effectiveAt", 1_767_225_600),
            refused(422, "invalid-field").at("/effectiveAt"),
        ),
    ]);
    cases
}

/// A transfer with a field whose text is written as given, escapes and all.
fn raw(system: &System, field: &str, text: &str) -> Request {
    let mut body = system.transfer_body();
    body.as_object_mut().unwrap().remove(field);
    let open = body.to_string();
    system.transfer_request().body(format!("{},\"{field}\":\"{text}\"}}", open.strip_suffix('}').unwrap()))
}

fn raw_metadata(system: &System, key: &str, text: &str) -> Request {
    let open = system.transfer_body().to_string();
    system
        .transfer_request()
        .body(format!("{},\"metadata\":{{\"{key}\":\"{text}\"}}}}", open.strip_suffix('}').unwrap()))
}
