//! Wrong secrets, counted: who sends too many is told to wait, before anything is looked up.
//!
//! A secret is 256 random bits, so nobody guesses one; what is bounded here is the work, and what is told is that somebody
//! tries. Counted is by client and peer together, so whoever knows no more than a client's id cannot lock it out from
//! elsewhere, and by peer alone. Who is refused keeps the tokens it has, and may refresh them.
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
    /// How long to wait, when too many were wrong already.
    pub(crate) fn check(&self, client: Option<Uuid>, peer: Option<IpAddr>) -> Result<(), Duration> {
        let windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (place, max) in places(client, peer) {
            if let Some(window) = windows.get(&place)
                && max <= window.failures
                && let Some(left) = WINDOW.checked_sub(window.begun.elapsed())
            {
                return Err(left);
            }
        }
        Ok(())
    }

    /// Counts a wrong secret. True for the one that was too many: whoever is told of each would be told too often.
    pub(crate) fn failed(&self, client: Option<Uuid>, peer: Option<IpAddr>) -> bool {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if WINDOWS_MAX <= windows.len() {
            windows.retain(|_, window| window.begun.elapsed() < WINDOW);
        }
        if WINDOWS_MAX <= windows.len() {
            windows.clear();
        }
        let mut too_many = false;
        for (place, max) in places(client, peer) {
            let window = windows.entry(place).or_insert_with(|| Window { begun: Instant::now(), failures: 0 });
            if WINDOW <= window.begun.elapsed() {
                *window = Window { begun: Instant::now(), failures: 0 };
            }
            window.failures = window.failures.saturating_add(1);
            too_many |= window.failures == max;
        }
        too_many
    }

    /// The client has proven itself: what it got wrong before was its own mistake.
    pub(crate) fn succeeded(&self, client: Uuid, peer: Option<IpAddr>) {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        windows.remove(&Place::ClientFrom(client, Network::of(peer)));
    }
}

fn places(client: Option<Uuid>, peer: Option<IpAddr>) -> impl Iterator<Item = (Place, u32)> {
    let network = Network::of(peer);
    let of_client = client.map(|client| (Place::ClientFrom(client, network), OF_CLIENT_MAX));
    of_client.into_iter().chain([(Place::Anyone(network), OF_PEER_MAX)])
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
        let (client, peer) = (Some(Uuid::from_u128(1)), from("2001:db8::1"));
        for failure in 1..=OF_CLIENT_MAX {
            assert_eq!(attempts.check(client, peer), Ok(()));
            assert_eq!(attempts.failed(client, peer), failure == OF_CLIENT_MAX);
        }
        assert!(attempts.check(client, peer).is_err_and(|wait| wait <= WINDOW));
        assert!(attempts.check(client, from("2001:db8::2")).is_err(), "the same network");
        assert_eq!(attempts.check(client, from("2001:db8:0:1::1")), Ok(()), "the client from elsewhere");
        assert_eq!(attempts.check(client, from("192.0.2.1")), Ok(()));
        assert_eq!(attempts.check(Some(Uuid::from_u128(2)), peer), Ok(()), "another client");
        attempts.succeeded(Uuid::from_u128(1), peer); // by a login that was under way
        assert_eq!(attempts.check(client, peer), Ok(()));
    }

    #[test]
    fn one_peer_with_many_names_is_refused_too() {
        let attempts = Attempts::default();
        for client in 0..OF_PEER_MAX {
            assert_eq!(attempts.check(Some(Uuid::from_u128(client.into())), from("192.0.2.1")), Ok(()));
            attempts.failed(Some(Uuid::from_u128(client.into())), from("192.0.2.1"));
        }
        assert!(attempts.check(None, from("::ffff:192.0.2.1")).is_err());
        assert_eq!(attempts.check(None, from("192.0.2.2")), Ok(()));
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
