//! What the kernel tells of VMs' packets: those it refused, and connections past the proxy.

use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use host::net::{
    EventError, Events, FlowEnd, FlowEvent, FlowEvents, FlowKey, Protocol, Refusal, RefusalEvents,
    RefusalReason,
};
use policy::log::{Event, Line, Timestamp};
use policy::{Action, Host, ranges};
use tokio::sync::{mpsc, oneshot};

use super::registrations::Registrations;

/// Most names of addresses that are remembered.
const MAX_NAMES: usize = 16 * 1024;

/// By which name a VM came to an address.
#[derive(Clone, Debug, Default)]
pub(super) struct Names(Arc<Mutex<HashMap<(Ipv4Addr, Ipv4Addr), Host>>>);

impl Names {
    /// What a VM was told.
    pub(super) fn remember(&self, vm: Ipv4Addr, address: Ipv4Addr, name: &Host) {
        let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if names.len() >= MAX_NAMES {
            // Lines then show addresses until names are resolved again.
            names.clear();
        }
        names.insert((vm, address), name.clone());
    }

    fn of(&self, vm: Ipv4Addr, address: Ipv4Addr) -> Host {
        let names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = names.get(&(vm, address)).cloned();
        known.unwrap_or(Host::Address(address))
    }
}

/// The tasks that listen.
#[derive(Debug)]
pub(super) struct KernelEvents {
    names: Names,
    settle: [mpsc::Sender<Asked>; 2],
}

impl KernelEvents {
    /// Listens on the hub's sockets.
    pub(super) fn start(
        refusals: OwnedFd,
        flows: OwnedFd,
        registrations: Arc<Registrations>,
    ) -> io::Result<Self> {
        let names = Names::default();
        let (heard, known) = (Arc::clone(&registrations), names.clone());
        let settle = [
            listen(
                RefusalEvents::new(refusals)?,
                "refused packets",
                move |refusal| {
                    tell_refusal(&heard, &refusal);
                },
            ),
            listen(
                FlowEvents::new(flows)?,
                "connections past the proxy",
                move |event| match event {
                    FlowEvent::New(_) => {}
                    FlowEvent::End(key, end) => tell_flow(&registrations, &known, &key, &end),
                },
            ),
        ];
        Ok(Self { names, settle })
    }

    /// Where the resolver notes what it told.
    pub(super) fn names(&self) -> Names {
        self.names.clone()
    }

    /// Returns when what the kernel has told until now stands in the logs. The kernel tells of refused packets within
    /// a hundredth of a second.
    pub(super) async fn settle(&self) {
        for task in &self.settle {
            let (answer, answered) = oneshot::channel();
            if task.send(answer).await.is_ok() {
                let _ = answered.await;
            }
        }
    }
}

/// Somebody who asks whether what was told until now was heard.
type Asked = oneshot::Sender<()>;

/// Starts a task that hears all events of a socket; gives the way to ask it.
fn listen<T: Send + 'static>(
    mut events: Events<T>,
    what: &'static str,
    tell: impl Fn(T) + Send + 'static,
) -> mpsc::Sender<Asked> {
    let (settle, mut asked) = mpsc::channel::<Asked>(64);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                // What has been told already comes before whoever asks whether it was heard.
                biased;
                event = events.next() => match event {
                    Ok(event) => tell(event),
                    Err(EventError::Lost) => tracing::warn!("some {what} are in no network log"),
                    Err(error) => return tracing::error!(%error, "{what} are not logged any more"),
                },
                asked = asked.recv() => match asked {
                    Some(answer) => { let _ = answer.send(()); }
                    None => return,
                },
            }
        }
    });
    settle
}

fn tell_refusal(registrations: &Registrations, refusal: &Refusal) {
    let Some(network) = refusal.network() else {
        tracing::warn!(?refusal, "a packet was dropped that nobody may send");
        registrations.stray();
        return;
    };
    let (protocol, port) = match refusal.protocol {
        Protocol::Tcp(port) => ("tcp".to_owned(), port),
        Protocol::Udp(port) => ("udp".to_owned(), port),
        Protocol::Icmp => ("icmp".to_owned(), None),
        Protocol::Other(number) => (number.to_string(), None),
    };
    let own = refusal.destination == network.hub_end();
    let (rule, why) = match (refusal.reason, ranges::refused(refusal.destination.into())) {
        (RefusalReason::Limit, _) => ("limit", "too many connections at once or in a second"),
        (_, _) if own => ("gateway", "the VM's gateway serves names only"),
        (_, Some(range)) => (range.name(), "this address range is closed to VMs"),
        (_, None) => ("port", "no rule of the job's policy opens this port there"),
    };
    let line = Line {
        timestamp: Timestamp::now(),
        action: Action::Deny,
        rule: Some(format!("kernel:{rule}")),
        host: refusal.destination.to_string(),
        port: port.unwrap_or(0),
        error: Some(format!("refused: {why}")),
        event: Event::Packet { protocol, count: 1 },
    };
    registrations.write(network.slot_address(), None, &line);
}

fn tell_flow(registrations: &Registrations, names: &Names, key: &FlowKey, end: &FlowEnd) {
    let address = key.network.slot_address();
    let Some(registration) = registrations.find(address) else {
        return;
    };
    let host = names.of(address, *key.destination.ip());
    let port = key.destination.port();
    let decision = registration.policy.decide_connection(&host, port);
    let line = Line {
        timestamp: Timestamp::now(),
        action: Action::Allow,
        rule: Some(decision.by.to_string()),
        host: host.to_string(),
        port,
        error: None,
        event: Event::Tcp {
            latency_ms: milliseconds(end.lasted),
            request_size: end.sent,
            response_size: end.received,
        },
    };
    registrations.write(address, Some(registration.generation), &line);
}

fn milliseconds(time: Option<Duration>) -> u64 {
    time.map_or(0, |time| {
        u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
