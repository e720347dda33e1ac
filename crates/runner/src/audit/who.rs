//! Who is at the other end of a socket, and for whom.

use serde::{Deserialize, Serialize};
use tokio::net::unix::UCred;

use crate::home::Account;

/// Most generations of parents that are looked at.
const GENERATIONS: usize = 32;

/// Somebody who did something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Who {
    /// The user whose process it was, as the kernel says.
    pub(crate) uid: u32,
    /// That user's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) user: Option<String>,
    /// The process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pid: Option<i32>,
    /// For root: who became root, such as by sudo. It is the user of the nearest parent that is not root's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) for_uid: Option<u32>,
    /// That user's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) for_user: Option<String>,
    /// The uid that logged in, where the kernel keeps it (`/proc/<pid>/loginuid`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) login_uid: Option<u32>,
    /// For what comes over the Web API: the id of the key, by which `vm0-api token revoke` takes it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) api_key: Option<String>,
}

impl Who {
    /// The owner of a file.
    pub(crate) fn of_uid(uid: u32) -> Self {
        Self {
            uid,
            user: Account::name_of(uid),
            pid: None,
            for_uid: None,
            for_user: None,
            login_uid: None,
            api_key: None,
        }
    }

    /// A key of the Web API; what it asks for is done for the runner's owner.
    pub(crate) fn of_api_key(owner: u32, key: Option<String>) -> Self {
        Self {
            api_key: key,
            ..Self::of_uid(owner)
        }
    }

    /// The peer of a connection, looked at while it lives.
    pub(crate) fn of_peer(peer: &UCred) -> Self {
        let for_uid = match (peer.uid(), peer.pid()) {
            (0, Some(pid)) => ancestor(pid),
            _ => None,
        };
        Self {
            pid: peer.pid(),
            for_uid,
            for_user: for_uid.and_then(Account::name_of),
            login_uid: peer.pid().and_then(login),
            ..Self::of_uid(peer.uid())
        }
    }

    /// In few words: the user's name, and for whom.
    pub(crate) fn short(&self) -> String {
        let name = |user: &Option<String>, uid: u32| match user {
            Some(user) => crate::terminal::escape(user),
            None => format!("uid {uid}"),
        };
        let own = name(&self.user, self.uid);
        if let Some(key) = &self.api_key {
            return format!("API key {} as {own}", crate::terminal::escape(key));
        }
        match self.for_uid {
            Some(uid) => format!("{} as {own}", name(&self.for_user, uid)),
            None => own,
        }
    }
}

/// The user of the nearest parent that is not root's.
fn ancestor(pid: i32) -> Option<u32> {
    let mut pid = u32::try_from(pid).ok()?;
    for _ in 0..GENERATIONS {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u32>().ok()
        };
        let uid = field("Uid:")?;
        if uid != 0 {
            return Some(uid);
        }
        pid = field("PPid:").filter(|parent| *parent > 1)?;
    }
    None
}

fn login(pid: i32) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/loginuid")).ok()?;
    text.trim().parse().ok().filter(|uid| *uid != u32::MAX)
}
