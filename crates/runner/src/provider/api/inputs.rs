//! What clients tell an agent while it works: announced with its lease, fetched, and handed to the executor in order.

use std::sync::Arc;

use api_types::runner::LeaseRef;
use tokio::sync::{mpsc, watch};

use super::{Inner, Pause};

/// Starts bringing the inputs of a run that we hold, of which there are so many already. It ends with either end of the way:
/// the executor is gone, or the run is no longer held.
pub(super) fn begin(inner: &Arc<Inner>, lease: LeaseRef, there: u64) -> mpsc::Receiver<String> {
    let (announced, there) = watch::channel(there);
    // The next is fetched when the agent has taken this one.
    let (give, inputs) = mpsc::channel(1);
    if let Some(held) = inner.lock().held.get_mut(&lease.run_id) {
        held.inputs = Some(announced);
    }
    inner.spawn(bring(Arc::clone(inner), lease, there, give));
    inputs
}

/// There are at least so many. What is said late is no news.
pub(super) fn announce(inputs: &watch::Sender<u64>, there: u64) {
    inputs.send_if_modified(|known| {
        let more = there > *known;
        *known = there.max(*known);
        more
    });
}

async fn bring(
    inner: Arc<Inner>,
    lease: LeaseRef,
    mut there: watch::Receiver<u64>,
    give: mpsc::Sender<String>,
) {
    let run = lease.run_id;
    let (mut taken, mut cursor, mut pause) = (0, 0, Pause::default());
    loop {
        let more = tokio::select! {
            more = there.wait_for(|there| *there > taken) => more.map(|there| *there),
            () = give.closed() => return,
        };
        let Ok(wanted) = more else {
            return;
        };
        match inner.api.inputs(inner.id, lease, taken, cursor).await {
            Ok(found) => {
                pause = Pause::default();
                cursor = found.cursor;
                let before = taken;
                for input in found.inputs {
                    // An answer that repeats some, or mixes them up, does not make the agent read them twice.
                    if input.sequence <= taken {
                        continue;
                    }
                    taken = input.sequence;
                    if give.send(input.text).await.is_err() {
                        return;
                    }
                }
                if taken == before {
                    tracing::warn!(%run, after = taken, "inputs that were announced are not there any more");
                    taken = wanted;
                }
            }
            Err(error) if error.may_pass() => {
                tracing::warn!(%run, %error, "the run's inputs cannot be had; trying again");
                tokio::select! {
                    () = pause.wait(Some(&error)) => {}
                    () = give.closed() => return,
                }
            }
            Err(error) => {
                tracing::warn!(%run, %error, "the run's inputs cannot be had");
                return;
            }
        }
    }
}
