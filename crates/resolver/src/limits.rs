//! What one client may take of the resolver.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bounds; those of a VM hold for each address, and the proxy, which asks for all VMs, gets sixteen times as much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Queries a second, over time.
    pub per_second: u32,
    /// Queries at once after a pause.
    pub burst: u32,
    /// Queries under way.
    pub in_flight: u32,
    /// TCP connections.
    pub connections: u32,
    /// How long a TCP connection may take for one message, in either direction.
    pub idle: Duration,
    /// TCP connections of all clients together.
    pub all_connections: usize,
    /// Queries to upstream servers at once: each holds a socket.
    pub upstream: usize,
    /// Names in the cache.
    pub cached: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            per_second: 100,
            burst: 300,
            in_flight: 64,
            connections: 8,
            idle: Duration::from_secs(10),
            all_connections: 512,
            upstream: 512,
            cached: 10_000,
        }
    }
}

/// How much more the proxy may have.
pub(crate) const PROXY_SHARE: u32 = 16;
/// When so many addresses are remembered, those that are idle are forgotten.
const REMEMBERED: usize = 1024;
/// How often a client's log says that queries of its were refused.
const REPORT: Duration = Duration::from_secs(1);

/// What clients have taken.
#[derive(Debug)]
pub(crate) struct Accounts {
    limits: Limits,
    clients: Mutex<HashMap<Ipv4Addr, Account>>,
}

#[derive(Debug)]
struct Account {
    /// Queries that may come at once, in thousandths.
    tokens: u64,
    filled: Instant,
    in_flight: u32,
    connections: u32,
    refused: u64,
    reported: Option<Instant>,
}

/// Why a query is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooMany {
    /// How many were refused since that was last said, if it should be said now.
    pub(crate) report: Option<u64>,
}

/// What of a client's share is held.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Query,
    Connection,
}

/// A place of a client's; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    accounts: Arc<Accounts>,
    address: Ipv4Addr,
    kind: Kind,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut clients = self
            .accounts
            .clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = clients.get_mut(&self.address) {
            let held = match self.kind {
                Kind::Query => &mut account.in_flight,
                Kind::Connection => &mut account.connections,
            };
            *held = held.saturating_sub(1);
        }
    }
}

impl Accounts {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            clients: Mutex::default(),
        })
    }

    /// Takes a place for a query.
    pub(crate) fn query(
        self: &Arc<Self>,
        address: Ipv4Addr,
        share: u32,
        now: Instant,
    ) -> Result<Place, TooMany> {
        let Limits {
            per_second,
            burst,
            in_flight,
            ..
        } = self.limits;
        let most = u64::from(burst) * u64::from(share) * 1000;
        self.with(address, most, now, |account| {
            let passed = u64::try_from(now.saturating_duration_since(account.filled).as_millis())
                .unwrap_or(u64::MAX);
            let gained = passed.saturating_mul(u64::from(per_second) * u64::from(share));
            account.tokens = account.tokens.saturating_add(gained).min(most);
            account.filled = now;
            if account.tokens >= 1000 && account.in_flight < in_flight.saturating_mul(share) {
                account.tokens -= 1000;
                account.in_flight += 1;
                return Ok(self.place(address, Kind::Query));
            }
            account.refused += 1;
            let due = account
                .reported
                .is_none_or(|last| now.saturating_duration_since(last) >= REPORT);
            let report = due.then(|| {
                account.reported = Some(now);
                std::mem::take(&mut account.refused)
            });
            Err(TooMany { report })
        })
    }

    /// Takes a place for a connection.
    pub(crate) fn connection(
        self: &Arc<Self>,
        address: Ipv4Addr,
        share: u32,
        now: Instant,
    ) -> Option<Place> {
        let Limits {
            burst, connections, ..
        } = self.limits;
        let most = u64::from(burst) * u64::from(share) * 1000;
        self.with(address, most, now, |account| {
            (account.connections < connections.saturating_mul(share)).then(|| {
                account.connections += 1;
                self.place(address, Kind::Connection)
            })
        })
    }

    fn place(self: &Arc<Self>, address: Ipv4Addr, kind: Kind) -> Place {
        Place {
            accounts: Arc::clone(self),
            address,
            kind,
        }
    }

    fn with<R>(
        &self,
        address: Ipv4Addr,
        full: u64,
        now: Instant,
        act: impl FnOnce(&mut Account) -> R,
    ) -> R {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if clients.len() >= REMEMBERED && !clients.contains_key(&address) {
            // Who has asked nothing for a minute has all its tokens back.
            let idle = Duration::from_secs(60);
            clients.retain(|_, account| {
                account.in_flight > 0
                    || account.connections > 0
                    || now.saturating_duration_since(account.filled) < idle
            });
        }
        act(clients.entry(address).or_insert(Account {
            tokens: full,
            filled: now,
            in_flight: 0,
            connections: 0,
            refused: 0,
            reported: None,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: Ipv4Addr = Ipv4Addr::new(100, 96, 0, 1);
    const OTHER: Ipv4Addr = Ipv4Addr::new(100, 96, 0, 3);

    #[test]
    fn a_client_has_its_burst_then_its_rate_and_says_once_a_second_what_was_refused() {
        let limits = Limits {
            per_second: 10,
            burst: 3,
            in_flight: 100,
            ..Limits::default()
        };
        let accounts = Accounts::new(limits);
        let start = Instant::now();
        let take = |address, after| {
            accounts
                .query(address, 1, start + Duration::from_millis(after))
                .map(drop)
        };
        for _ in 0..3 {
            assert_eq!(take(VM, 0), Ok(()));
        }
        assert_eq!(take(VM, 0), Err(TooMany { report: Some(1) }));
        assert_eq!(take(VM, 10), Err(TooMany { report: None }));
        assert_eq!(take(VM, 99), Err(TooMany { report: None }));
        assert_eq!(take(OTHER, 99), Ok(()), "another's share is its own");
        assert_eq!(take(VM, 100), Ok(()));
        assert_eq!(take(VM, 100), Err(TooMany { report: None }));
        for _ in 0..3 {
            assert_eq!(take(VM, 60_000), Ok(()), "never more than the burst");
        }
        assert_eq!(take(VM, 60_000), Err(TooMany { report: Some(4) }));
    }

    #[test]
    fn places_come_back_when_their_holders_are_gone() {
        let limits = Limits {
            in_flight: 2,
            connections: 1,
            ..Limits::default()
        };
        let accounts = Accounts::new(limits);
        let now = Instant::now();
        let one = accounts.query(VM, 1, now).unwrap();
        let _two = accounts.query(VM, 1, now).unwrap();
        assert!(accounts.query(VM, 1, now).is_err());
        drop(one);
        assert!(accounts.query(VM, 1, now).is_ok());
        let connection = accounts.connection(VM, 1, now).unwrap();
        assert!(accounts.connection(VM, 1, now).is_none());
        drop(connection);
        assert!(accounts.connection(VM, 1, now).is_some());
    }

    #[test]
    fn addresses_that_asked_long_ago_are_forgotten() {
        let accounts = Accounts::new(Limits::default());
        let start = Instant::now();
        for number in 0..5000_u32 {
            let now = start + Duration::from_millis(u64::from(number) * 100);
            drop(accounts.query(Ipv4Addr::from_bits(number), 1, now));
        }
        assert!(accounts.clients.lock().unwrap().len() <= REMEMBERED);
    }
}
