//! Networks made ahead of time, so that a VM need not wait for one.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::address::NetworkId;
use crate::launcher::{Launcher, LauncherError};

/// Keeps some networks ready. Clones share them.
#[derive(Clone, Debug)]
pub struct NetworkPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    launcher: Launcher,
    /// How many are kept ready.
    target: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<NetworkId>,
    /// How many are being made or cleaned to become ready.
    coming: usize,
}

/// A network that one VM may have. Dropping it, which must not happen before the VM's process is dead, cleans it for the
/// next; what cannot be cleaned is destroyed.
#[derive(Debug)]
pub struct Network {
    id: NetworkId,
    shared: Arc<Shared>,
}

impl Network {
    /// Its number.
    pub fn id(&self) -> NetworkId {
        self.id
    }

    /// How hub, proxy and logs know its VM.
    pub fn address(&self) -> Ipv4Addr {
        self.id.slot_address()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        give_back(&self.shared, self.id);
    }
}

impl NetworkPool {
    /// Begins to keep `target` networks of the launcher's hub, which must have been made, ready.
    pub fn new(launcher: Launcher, target: usize) -> NetworkPool {
        let shared = Arc::new(Shared {
            launcher,
            target,
            state: Mutex::default(),
        });
        refill(&shared);
        NetworkPool { shared }
    }

    /// A network, at once if one is ready.
    pub async fn take(&self) -> Result<Network, LauncherError> {
        let ready = self.shared.lock().ready.pop_front();
        refill(&self.shared);
        let id = match ready {
            Some(id) => id,
            None => self.shared.launcher.make_network().await?,
        };
        Ok(Network {
            id,
            shared: Arc::clone(&self.shared),
        })
    }

    /// How many are ready now.
    pub fn ready(&self) -> usize {
        self.shared.lock().ready.len()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two of its operations.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one more should become ready, which is counted at once.
    fn wants_one(&self) -> bool {
        let mut state = self.lock();
        let wants = state.ready.len().saturating_add(state.coming) < self.target;
        state.coming = state.coming.saturating_add(usize::from(wants));
        wants
    }

    /// One that was coming is there, or will not be.
    fn came(&self, id: Option<NetworkId>) {
        let mut state = self.lock();
        state.coming = state.coming.saturating_sub(1);
        state.ready.extend(id);
    }
}

/// Makes what is missing, in the background. One that fails is tried again when the next is taken, which then says why.
fn refill(shared: &Arc<Shared>) {
    while shared.wants_one() {
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            let made = shared.launcher.make_network().await;
            shared.came(made.ok());
        });
    }
}

/// Cleans a used network, in the background. Where there is no runtime any more, the launcher ends and takes it along.
fn give_back(shared: &Arc<Shared>, id: NetworkId) {
    let Ok(runtime) = tokio::runtime::Handle::try_current() else {
        return;
    };
    let shared = Arc::clone(shared);
    let wanted = shared.wants_one();
    runtime.spawn(async move {
        let clean = wanted && shared.launcher.flush_network(id).await.is_ok();
        if wanted {
            shared.came(clean.then_some(id));
        }
        if !clean {
            // An error leaves its number out of use until the launcher ends.
            let _ = shared.launcher.destroy_network(id).await;
        }
    });
}
