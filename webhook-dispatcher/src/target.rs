//! Where a webhook may go: which URLs are taken, and which addresses are dialled.
//!
//! Whoever registers a URL makes this server send requests. So a URL is checked when it is registered, and
//! the address when it is dialled: names are resolved by [`CheckedResolver`], which hands on checked addresses
//! only, so there is no second look-up between check and connect; an address written in the URL never
//! reaches a resolver and is checked by [`Target::check_literal`].
//!
//! Left out: asking DNS at registration. What a name says then binds nobody later.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

const BYTES_MAX: usize = 2048;

/// Whether this machine and its private networks may be targets: on a developer's machine, never in production.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    Public,
    Local,
}

/// A URL that a webhook may be registered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target(Url);

/// Why a URL is refused, in words for the partner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Forbidden(&'static str);

/// An address that must not be dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the target's address is not a public one")]
pub(crate) struct BlockedAddress;

/// Resolves names and hands on what may be dialled. One forbidden address among several forbids them all: an
/// honest name has none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CheckedResolver(pub(crate) Reach);

impl Target {
    pub(crate) fn parse(text: &str, reach: Reach) -> Result<Self, Forbidden> {
        if BYTES_MAX < text.len() {
            return Err(Forbidden("a URL has at most 2048 bytes"));
        }
        // The parser of URLs forgives these, and would dial something else than what is read here.
        if text.chars().any(|c| c.is_whitespace() || c.is_control() || c == '\\') {
            return Err(Forbidden("blanks, controls and backslashes are refused in a URL"));
        }
        let url = Url::parse(text).map_err(|_| Forbidden("not an absolute URL"))?;
        if !text.split_once(':').is_some_and(|(_, rest)| rest.starts_with("//") && !rest.starts_with("///")) {
            return Err(Forbidden("not an absolute URL")); // `https:host` and `https:///host` are forgiven too
        }
        match url.scheme() {
            "https" => {}
            "http" if reach == Reach::Local => {}
            _ => return Err(Forbidden("only https is allowed")),
        }
        if !url.username().is_empty() || url.password().is_some() || has_userinfo(text) {
            return Err(Forbidden("a URL with a user or a password is refused"));
        }
        let port = url.port_or_known_default().ok_or(Forbidden("a URL needs a port"))?;
        if reach == Reach::Public && !is_port_allowed(port) {
            return Err(Forbidden("this port is refused; 443, 8443 and most from 1024 on are allowed"));
        }
        let target = Self(url);
        target.check_literal(reach).map_err(|BlockedAddress| Forbidden("the host is not a public address"))?;
        if let Some(Host::Domain(name)) = target.0.host()
            && !is_name_allowed(name, reach)
        {
            return Err(Forbidden("the host is not a public name"));
        }
        Ok(target)
    }

    /// Whether an address that is written in the URL itself may be dialled. Names pass: their addresses are looked at
    /// when they are known.
    pub(crate) fn check_literal(&self, reach: Reach) -> Result<(), BlockedAddress> {
        let address = match self.0.host() {
            Some(Host::Ipv4(address)) => IpAddr::V4(address),
            Some(Host::Ipv6(address)) => IpAddr::V6(address),
            Some(Host::Domain(_)) => return Ok(()),
            None => return Err(BlockedAddress),
        };
        if is_dialled(address, reach) { Ok(()) } else { Err(BlockedAddress) }
    }

    pub(crate) fn url(&self) -> &Url {
        &self.0
    }
}

impl Resolve for CheckedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let reach = self.0;
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            if found.iter().all(|address| is_dialled(address.ip(), reach)) {
                Ok(Box::new(found.into_iter()) as Addrs)
            } else {
                Err(BlockedAddress.into())
            }
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `https://@host/` has a user, an empty one, which the parser drops without a word.
fn has_userinfo(text: &str) -> bool {
    let after_scheme = text.split_once("://").map_or(text, |(_, rest)| rest);
    after_scheme.split(['/', '?', '#']).next().is_some_and(|authority| authority.contains('@'))
}

fn is_port_allowed(port: u16) -> bool {
    // Where something listens that is not a web server and could be harmed by being spoken to.
    const REFUSED: [u16; 30] = [
        1433, 1521, 2049, 2181, 2375, 2376, 2379, 2380, 3306, 3389, 4222, 5432, 5433, 5672, 5900, 5984, 6000, 6222,
        6379, 6443, 6667, 8222, 9042, 9092, 9200, 9300, 10250, 11211, 27017, 50000,
    ];
    port == 443 || 1024 <= port && !REFUSED.contains(&port)
}

fn is_name_allowed(name: &str, reach: Reach) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    if reach == Reach::Local {
        return !name.is_empty();
    }
    let last = name.rsplit('.').next();
    let is_private = last.is_none_or(|last| {
        ["localhost", "local", "internal", "intranet", "lan", "home", "corp", "private", "arpa"].contains(&last)
    });
    name.contains('.') && !name.starts_with('.') && !is_private
}

fn is_dialled(address: IpAddr, reach: Reach) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address) || reach == Reach::Local && is_local_v4(address),
        IpAddr::V6(address) => is_public_v6(address) || reach == Reach::Local && is_local_v6(address),
    }
}

fn is_local_v4(address: Ipv4Addr) -> bool {
    address.is_loopback() || address.is_private()
}

fn is_local_v6(address: Ipv6Addr) -> bool {
    address.is_loopback() || address.is_unique_local()
}

/// After IANA's registry of special-purpose addresses: what is globally reachable.
fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    match (a, b, c) {
        (0 | 10 | 127, ..) => false, // this network, private, loopback
        (100, 64..=127, _) => false, // shared between carriers
        (169, 254, _) => false,      // link-local: where clouds keep their metadata
        (172, 16..=31, _) | (192, 168, _) => false,
        (192, 0, 0 | 2) => false,                // protocol assignments, documentation
        (192, 88, 99) => false,                  // 6to4 relays
        (198, 18 | 19, _) => false,              // benchmarks
        (198, 51, 100) | (203, 0, 113) => false, // documentation
        (224..=255, ..) => false,                // multicast, reserved, broadcast
        _ => true,
    }
}

/// Global unicast without the parts of it that lead elsewhere. All that embeds an IPv4 address lies outside
/// (v4-mapped, v4-compatible, NAT64) or is named here (6to4, Teredo).
fn is_public_v6(address: Ipv6Addr) -> bool {
    match address.segments() {
        [0x2001, 0x0000..=0x01ff, ..] => false, // protocol assignments, Teredo among them
        [0x2001, 0x0db8, ..] => false,          // documentation
        [0x2002, ..] => false,                  // 6to4
        [0x3fff, 0x0000..=0x0fff, ..] => false, // documentation
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refuses(text: &str, reach: Reach) {
        assert!(Target::parse(text, reach).is_err(), "{text} is taken in reach {reach:?}");
    }

    #[test]
    fn public_https_urls_are_taken() {
        for text in [
            "https://example.com",
            "https://hooks.example.com/daybook?tenant=1",
            "https://example.com:8443/",
            "https://example.com:3000/hook",
            "https://example.com./hook",
            "https://8.8.8.8/",
            "https://[2606:4700::1111]/",
            "https://bücher.example.org/",
            "https://example.com/@handle",
        ] {
            assert!(Target::parse(text, Reach::Public).is_ok(), "{text} is refused");
        }
    }

    #[test]
    fn whatever_leads_inside_is_refused_however_it_is_written() {
        for host in [
            "127.0.0.1",
            "0.0.0.0",
            "0",
            "169.254.169.254",
            "10.0.0.5",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "192.0.0.1",
            "192.0.2.1",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "2130706433",
            "0x7f.1",
            "0177.1",
            "0x7f000001",
            "017700000001",
            "127.1",
            "１２７.0.0.1",
            "[::]",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::7f00:1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[64:ff9b:1::1]",
            "[2002:7f00:1::1]",
            "[2001::1]",
            "[2001:db8::1]",
            "[3fff::1]",
            "[fe80::1]",
            "[fec0::1]",
            "[fc00::1]",
            "[fd12::1]",
            "[ff02::1]",
            "[::ffff:8.8.8.8]",
            "localhost",
            "localhost.",
            "LOCALHOST",
            "a.localhost",
            "a.localhost.",
            "printer.local",
            "db.internal",
            "metadata.google.internal.",
            "intranet",
            "router.lan",
            "1.0.0.127.in-addr.arpa",
        ] {
            refuses(&format!("https://{host}/"), Reach::Public);
            refuses(&format!("http://{host}/"), Reach::Public);
        }
    }

    #[test]
    fn what_is_not_https_to_a_web_port_is_refused() {
        let long = format!("https://example.com/{}", "a".repeat(BYTES_MAX));
        for text in [
            "http://example.com/",
            "file:///etc/passwd",
            "gopher://example.com/",
            "ftp://example.com/",
            "javascript:alert(1)",
            "https://",
            "https:///",
            "https:///example.com/",
            "https:example.com/",
            "https:/example.com/",
            "example.com",
            "//example.com/",
            "",
            "https://example.com:22/",
            "https://example.com:25/",
            "https://example.com:80/",
            "https://example.com:5432/",
            "https://example.com:6379/",
            "https://example.com:0/",
            "https://user@example.com/",
            "https://user:secret@example.com/",
            "https://@example.com/",
            "https://:@example.com/",
            " https://example.com/",
            "https://exa\tmple.com/",
            "https://example.com\\@evil.example/",
            "https://example.com/\n",
            "https://example.com/a b",
            &long,
        ] {
            refuses(text, Reach::Public);
        }
    }

    #[test]
    fn a_local_reach_adds_this_machine_and_private_networks_and_nothing_more() {
        for text in [
            "http://127.0.0.1:9000/hook",
            "http://localhost:9000/",
            "http://10.0.0.5/",
            "http://[::1]:8080/",
            "http://[fd12::1]/",
            "https://192.168.1.1:5432/",
            "http://receiver:8080/",
            "https://example.com/",
        ] {
            assert!(Target::parse(text, Reach::Local).is_ok(), "{text} is refused");
        }
        for text in [
            "http://169.254.169.254/",
            "http://0.0.0.0/",
            "http://224.0.0.1/",
            "http://[fe80::1]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[64:ff9b::7f00:1]/",
            "ftp://127.0.0.1/",
            "http://user@127.0.0.1/",
        ] {
            refuses(text, Reach::Local);
        }
    }

    #[tokio::test]
    async fn a_name_that_resolves_to_this_machine_is_blocked_where_it_is_resolved() {
        let localhost = || "localhost".parse::<Name>().unwrap();
        let blocked = CheckedResolver(Reach::Public).resolve(localhost()).await.err().unwrap();
        assert!(blocked.is::<BlockedAddress>(), "{blocked}");
        let mut found = CheckedResolver(Reach::Local).resolve(localhost()).await.unwrap();
        assert!(found.all(|address| address.ip().is_loopback()));
    }
}
