//! Reads: ids in paths, and everything that can stand behind a question mark.

use crate::system::System;
use crate::table::{Case, Expected, case, refused, taken};
use crate::wire::Request;

/// The lists of the product, each with a parameter of its own that narrows it.
const LISTS: [(&str, &str); 4] = [
    ("/v1/wallets", "currency=EUR"),
    ("/v1/wallets/{alice}/entries", "type=TRANSFER"),
    ("/v1/transactions", "status=SUCCESS"),
    ("/v1/webhooks", "limit=1"),
];

pub(crate) fn table(system: &System) -> Vec<Case> {
    let mut cases = ids(system);
    cases.extend(limits(system));
    cases.extend(cursors(system));
    cases.extend(filters(system));
    cases.extend(positions(system));
    cases
}

fn list(system: &System, template: &str) -> String {
    template.replace("{alice}", &system.alice)
}

fn ids(system: &System) -> Vec<Case> {
    let uuid = system.alice.strip_prefix("wal_").unwrap();
    let mut cases = Vec::new();
    for id in [
        "1".to_owned(),
        "wal_".to_owned(),
        "wal_00000000-0000-0000-0000-000000000000".to_owned(),
        uuid.to_owned(),
        format!("wal_%7B{uuid}%7D"),
        format!("wal_urn:uuid:{uuid}"),
        format!("wal_{}", uuid.to_uppercase()),
        format!("wal_{}", uuid.replace('-', "")),
        format!("txn_{uuid}"),
        "..".to_owned(),
        "%2e%2e".to_owned(),
        "'%20or%201=1--".to_owned(),
        "%F0%9F%92%A9".to_owned(),
        "a".repeat(5_000),
        "-1".to_owned(),
        "null".to_owned(),
        "*".to_owned(),
    ] {
        for route in ["", "/balance", "/entries"] {
            let short: String = id.chars().take(40).collect();
            cases.push(case(
                format!("29 GET /v1/wallets/{short}{route}"),
                system.get(format!("/v1/wallets/{id}{route}")),
                refused(400, "invalid-id"),
            ));
        }
    }
    for route in [
        "/v1/transactions/wal_1",
        "/v1/webhooks/1",
        "/v1/webhooks/1/deliveries",
        "/v1/deliveries/whk_0192f0c1-2d3e-7abc-8def-0123456789ab",
    ] {
        cases.push(case(format!("29 GET {route}"), system.get(route), refused(400, "invalid-id")));
    }
    for (route, token) in [
        ("/v1/wallets/1/freeze", &system.partner),
        ("/v1/deliveries/1/redeliver", &system.partner),
        ("/v1/transactions/1/settle", &system.admin),
    ] {
        let request = Request::post(route).bearer(token).key("k").body("{}");
        cases.push(case(format!("29 POST {route}"), request, refused(400, "invalid-id")));
    }
    let of_log = |id: &str| Request::get(format!("/v1/events?aggregate={id}")).bearer(&system.admin);
    cases.push(case("29 a stream by half an id", of_log("wal_1"), refused(400, "invalid-id")));
    cases
}

fn limits(system: &System) -> Vec<Case> {
    let mut cases = Vec::new();
    for (route, _) in LISTS {
        let route = list(system, route);
        for limit in [
            "0",
            "-1",
            "1000000000",
            "101",
            "256",
            "abc",
            "1.5",
            "1e2",
            "",
            "%2B5",
            "5%20",
            "0x10",
            "99999999999999999999",
            "%D9%A1",
            "1,2",
            "true",
            "005.0",
        ] {
            cases.push(case(
                format!("43 {route}?limit={limit}"),
                system.get(format!("{route}?limit={limit}")),
                refused(422, "limit-out-of-range").at("/limit"),
            ));
        }
        cases.push(case(format!("43 {route}?limit=100"), system.get(format!("{route}?limit=100")), taken(200)));
    }
    for limit in ["0", "1001", "-5", "abc"] {
        let request = Request::get(format!("/v1/events?limit={limit}")).bearer(&system.admin);
        cases.push(case(
            format!("43 /v1/events?limit={limit}"),
            request,
            refused(422, "limit-out-of-range").at("/limit"),
        ));
    }
    cases
}

/// Cursors of other partners are in `strangers.rs`.
fn cursors(system: &System) -> Vec<Case> {
    let mut cases = Vec::new();
    for (route, _) in LISTS {
        let route = list(system, route);
        for cursor in [
            "junk",
            "!",
            "",
            "====",
            "AQ",
            "AAAA",
            "bnVsbA",
            "../../etc/passwd",
            "%00",
            "%ff",
            "MQ%3D%3D",
            "1",
            "' or 1=1",
            "AXdhbF8wMTkyZjBjMS0yZDNlLTdhYmMtOGRlZi0wMTIzNDU2Nzg5YWIAAAAAAAAAAAAAAAAAAAAA",
            &"A".repeat(2_000),
        ] {
            let expected = match cursor {
                "%00" => refused(422, "invalid-character").at("/cursor"),
                "%ff" => refused(422, "invalid-field"),
                _ => refused(400, "cursor-invalid"),
            };
            let cursor = cursor.replace(' ', "%20");
            let short: String = cursor.chars().take(30).collect();
            cases.push(case(
                format!("42 {route}?cursor={short}"),
                system.get(format!("{route}?cursor={cursor}")),
                expected,
            ));
        }
    }
    cases
}

fn filters(system: &System) -> Vec<Case> {
    let get = |target: &str, expected: Expected| case(target.to_owned(), system.get(list(system, target)), expected);
    let invalid = |name: &str| refused(422, "invalid-field").at(name);
    let no_time = |name: &str| refused(422, "time-format").at(name);
    let mut cases = vec![
        get("/v1/wallets?status=active", invalid("/status")),
        get("/v1/wallets?status=DELETED", invalid("/status")),
        get("/v1/wallets?status=", invalid("/status")),
        get("/v1/wallets?currency=ZZZ", refused(422, "currency-unknown").at("/currency")),
        get("/v1/wallets?currency=eur", refused(422, "currency-unknown").at("/currency")),
        get("/v1/wallets?userId=%00", refused(422, "invalid-character").at("/userId")),
        get("/v1/wallets?userId=%0a", refused(422, "invalid-character").at("/userId")),
        get("/v1/wallets?userId=%E2%80%AE", refused(422, "invalid-character").at("/userId")),
        get("/v1/wallets?userId=%ff", refused(422, "invalid-field")),
        get("/v1/wallets?userId=%", refused(422, "invalid-field")),
        get("/v1/wallets?userId=%zz", refused(422, "invalid-field")),
        get("/v1/wallets?userId=%C0%80", refused(422, "invalid-field")),
        get("/v1/wallets?userId=%ED%A0%80", refused(422, "invalid-field")),
        get("/v1/wallets?userId='%20or%20'1'='1", taken(200).contains("\"data\":[]")),
        get("/v1/wallets?userId=%25", taken(200).contains("\"data\":[]")),
        get("/v1/wallets?user_id=alice", refused(422, "unknown-field").at("/user_id")),
        get("/v1/wallets?partnerId=par_1", refused(422, "unknown-field").at("/partnerId")),
        get("/v1/wallets?__proto__=1", refused(422, "unknown-field").at("/__proto__")),
        get("/v1/wallets?limit=1&limit=2", invalid("/limit")),
        get("/v1/wallets?limit=1&%6Cimit=1", invalid("/limit")),
        get("/v1/wallets?limit[]=1", refused(422, "unknown-field")),
        get("/v1/wallets?limit", refused(422, "limit-out-of-range").at("/limit")),
        get("/v1/wallets?=1", refused(422, "unknown-field").at("/")),
        get("/v1/wallets?&&&", taken(200)),
        get("/v1/wallets?", taken(200)),
        get("/v1/wallets?a=b=c", refused(422, "unknown-field").at("/a")),
        get("/v1/transactions?walletId=1", refused(400, "invalid-id").at("/walletId")),
        get("/v1/transactions?walletId=", refused(400, "invalid-id").at("/walletId")),
        get("/v1/transactions?type=transfer", invalid("/type")),
        get("/v1/transactions?status=DONE", invalid("/status")),
        get("/v1/transactions?from=yesterday", no_time("/from")),
        get("/v1/transactions?from=2026-01-01", no_time("/from")),
        get("/v1/transactions?from=2026-01-01T00:00:00+01:00", no_time("/from")), // a plus sign is a blank here
        get("/v1/transactions?from=2026-01-01T00:00:00%2B01:00", taken(200)),
        get(
            "/v1/transactions?from=2027-01-01T00:00:00Z&to=2026-01-01T00:00:00Z",
            refused(422, "time-range-invalid").at("/from"),
        ),
        get("/v1/transactions?from=0000-01-01T00:00:00Z", no_time("/from")),
        get("/v1/transactions?from=99999-01-01T00:00:00Z", no_time("/from")),
        get("/v1/transactions?from=2016-12-31T23:59:60.5.5Z", no_time("/from")),
        get("/v1/transactions?idempotencyKey=%00", refused(422, "invalid-character").at("/idempotencyKey")),
        get("/v1/wallets/{alice}/entries?type=FEE", invalid("/type")),
        get("/v1/wallets/{alice}/entries?to=never", no_time("/to")),
        get("/v1/wallets/{alice}/balance?asOf=1700000000", no_time("/asOf")),
        get("/v1/wallets/{alice}/balance?asOf=infinity", no_time("/asOf")),
        get("/v1/wallets/{alice}/balance?asOf=2026-01-01T00:00:00Z&atPosition=1", invalid("/atPosition")),
        get("/v1/wallets/{alice}/balance?asOf=0001-01-01T00:00:00Z", taken(200).contains("\"balance\":")),
        get("/v1/wallets/{alice}/balance?asOf=9999-12-31T23:59:59Z", taken(200)),
    ];
    // Fifty years and more: a page at a time, whatever there is.
    for route in ["/v1/transactions", "/v1/wallets/{alice}/entries"] {
        let route = list(system, route);
        let range = format!("{route}?from=0001-01-01T00:00:00Z&to=9999-12-31T23:59:59.999999Z&limit=100");
        cases.push(case(format!("45 all of time at {route}"), system.get(range), taken(200).contains("nextCursor")));
    }
    for name in ["aggregate=%00", "type=%0a", "after=-1", "after=1.5", "after=abc", "after=99999999999999999999"] {
        let slug = if name.starts_with("after") { "position-unknown" } else { "invalid-character" };
        let request = Request::get(format!("/v1/events?{name}")).bearer(&system.admin);
        cases.push(case(format!("/v1/events?{name}"), request, refused(422, slug)));
    }
    cases
}

fn positions(system: &System) -> Vec<Case> {
    let mut cases = Vec::new();
    for route in [
        "/v1/wallets",
        "/v1/transactions",
        "/v1/wallets/{alice}",
        "/v1/wallets/{alice}/balance",
        "/v1/wallets/{alice}/entries",
        "/v1/head",
        "/v1/webhooks",
    ] {
        let route = list(system, route);
        for position in [
            "-1",
            "9223372036854775807",
            "1000000000",
            "9223372036854775808",
            "99999999999999999999999",
            "abc",
            "1.0",
            "1e3",
            "%2B1",
            "",
            "0x1",
        ] {
            let expected = refused(422, "position-unknown").at("/minPosition");
            cases.push(case(
                format!("46 {route}?minPosition={position}"),
                system.get(format!("{route}?minPosition={position}")),
                expected,
            ));
        }
        for wait in ["-1", "30001", "99999999999999999999999", "abc", ""] {
            let expected = refused(422, "invalid-field").at("/waitMs");
            cases.push(case(
                format!("46 {route}?waitMs={wait}"),
                system.get(format!("{route}?waitMs={wait}")),
                expected,
            ));
        }
    }
    for position in ["-1", "1000000000", "abc"] {
        let target = format!("/v1/wallets/{}/balance?atPosition={position}", system.alice);
        cases.push(case(
            format!("46 a balance atPosition={position}"),
            system.get(target),
            refused(422, "position-unknown"),
        ));
    }
    cases
}
