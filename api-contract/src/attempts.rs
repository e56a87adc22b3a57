//! Wrong secrets, counted: who sends too many is told to wait, and the operator that somebody tries.
//!
//! A secret is 256 random bits, so nobody guesses one; what matters is that nobody is locked out by another's tries. Counted
//! is by client and peer together: too many, and nothing is looked up for this client from there, while it gets in from
//! elsewhere and its tokens can be refreshed. And by peer alone, which may be the proxy before all of us: too many, and
//! what is wrong is told to wait, while who knows its secret gets in.
//!
//! In memory, each process for itself, and bounded: an attacker with thousands of networks makes it forget, not grow.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

#[derive(Default)]
pub(crate) struct Attempts(Mutex<HashMap<Place, Window>>);

/// What wrong secrets are counted by.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    ClientFrom(Uuid, Network),
    Anyone(Network),
}

/// A peer's address; of IPv6 the half that one customer is given whole. None where no socket is known.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Network(Option<IpAddr>);

/// What counting a wrong secret has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counted {
    /// This was the one too many: whoever is told of each would be told too often.
    pub(crate) too_many: Option<TooMany>,
    /// For how long the peer is to wait, when too many were wrong before this one.
    pub(crate) wait: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TooMany {
    /// For one client.
    OfClient,
    /// For any.
    OfPeer,
}

struct Window {
    begun: Instant,
    failures: u32,
}

/// From the first wrong secret on; then all is forgotten.
const WINDOW: Duration = Duration::from_secs(60);

/// For one client from one peer: a person at a prompt, or a deployment whose ten replicas hold an old secret.
const OF_CLIENT_MAX: u32 = 10;

/// From one peer, which may be the proxy of many: far above what honest clients get wrong together.
const OF_PEER_MAX: u32 = 300;

const WINDOWS_MAX: usize = 10_000;

impl Attempts {
    /// How long this client's login from there has to wait, when too many were wrong already.
    pub(crate) fn check(&self, client: Uuid, peer: Option<IpAddr>) -> Result<(), Duration> {
        let windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let window = windows.get(&Place::ClientFrom(client, Network::of(peer)));
        window.and_then(|window| window.left(OF_CLIENT_MAX)).map_or(Ok(()), Err)
    }

    /// Counts a wrong secret.
    pub(crate) fn failed(&self, client: Option<Uuid>, peer: Option<IpAddr>) -> Counted {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if WINDOWS_MAX <= windows.len() {
            windows.retain(|_, window| window.begun.elapsed() < WINDOW);
        }
        if WINDOWS_MAX <= windows.len() {
            windows.clear();
        }
        let network = Network::of(peer);
        let of_client = client.map(|client| (Place::ClientFrom(client, network), OF_CLIENT_MAX, TooMany::OfClient));
        let mut counted = Counted { too_many: None, wait: None };
        for (place, max, too_many) in
            of_client.into_iter().chain([(Place::Anyone(network), OF_PEER_MAX, TooMany::OfPeer)])
        {
            let window = windows.entry(place).or_insert_with(|| Window { begun: Instant::now(), failures: 0 });
            if WINDOW <= window.begun.elapsed() {
                *window = Window { begun: Instant::now(), failures: 0 };
            }
            counted.wait = counted.wait.or(window.left(max));
            window.failures = window.failures.saturating_add(1);
            if window.failures == max {
                counted.too_many = Some(too_many);
            }
        }
        counted
    }

    /// The client has proven itself: what it got wrong before was its own mistake.
    pub(crate) fn succeeded(&self, client: Uuid, peer: Option<IpAddr>) {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        windows.remove(&Place::ClientFrom(client, Network::of(peer)));
    }
}

impl Window {
    /// How long it lasts, when it has seen so many.
    fn left(&self, max: u32) -> Option<Duration> {
        WINDOW.checked_sub(self.begun.elapsed()).filter(|_| max <= self.failures)
    }
}

impl Network {
    fn of(peer: Option<IpAddr>) -> Self {
        const HALF: u128 = !(u64::MAX as u128);
        Self(peer.map(|peer| match peer.to_canonical() {
            IpAddr::V6(address) => IpAddr::V6((address.to_bits() & HALF).into()),
            v4 => v4,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(peer: &str) -> Option<IpAddr> {
        Some(peer.parse().unwrap())
    }

    #[test]
    fn wrong_secrets_lock_out_one_client_from_one_network() {
        let attempts = Attempts::default();
        let (client, peer) = (Uuid::from_u128(1), from("2001:db8::1"));
        for failure in 1..=OF_CLIENT_MAX {
            assert_eq!(attempts.check(client, peer), Ok(()));
            let too_many = (failure == OF_CLIENT_MAX).then_some(TooMany::OfClient);
            assert_eq!(attempts.failed(Some(client), peer), Counted { too_many, wait: None });
        }
        assert!(attempts.check(client, peer).is_err_and(|wait| wait <= WINDOW));
        assert!(attempts.check(client, from("2001:db8::2")).is_err(), "the same network");
        assert_eq!(attempts.check(client, from("2001:db8:0:1::1")), Ok(()), "the client from elsewhere");
        assert_eq!(attempts.check(client, from("192.0.2.1")), Ok(()));
        assert_eq!(attempts.check(Uuid::from_u128(2), peer), Ok(()), "another client");
        attempts.succeeded(client, peer); // by a login that was under way
        assert_eq!(attempts.check(client, peer), Ok(()));
    }

    #[test]
    fn one_peer_with_many_names_is_told_to_wait_and_locks_nobody_out() {
        let attempts = Attempts::default();
        let client = |number: u32| Uuid::from_u128(number.into());
        for number in 1..=OF_PEER_MAX {
            let too_many = (number == OF_PEER_MAX).then_some(TooMany::OfPeer);
            assert_eq!(attempts.failed(Some(client(number)), from("192.0.2.1")), Counted { too_many, wait: None });
        }
        assert!(attempts.failed(None, from("::ffff:192.0.2.1")).wait.is_some_and(|wait| wait <= WINDOW));
        assert_eq!(attempts.failed(None, from("192.0.2.2")).wait, None);
        assert_eq!(attempts.check(client(0), from("192.0.2.1")), Ok(()), "behind the same proxy");
    }

    #[test]
    fn however_many_networks_fail_the_memory_is_bounded() {
        let attempts = Attempts::default();
        for address in 0..u32::try_from(WINDOWS_MAX).unwrap() * 2 {
            attempts.failed(Some(Uuid::from_u128(1)), Some(IpAddr::V4(address.into())));
        }
        assert!(attempts.0.lock().unwrap().len() <= WINDOWS_MAX + 1);
    }
}
