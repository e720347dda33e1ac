//! What sends messages to the owner from outside: signals, the provider, the host's slots, the launcher's end.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use host::fs::Dir;
use host::launcher::{Launcher, LauncherError};
use host::slot::{CHANGES_FILE, HostUsage};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::event::Event;
use super::message::Message;
use crate::provider::ProviderEvent;
use crate::queue::{Change, Watch};

/// How often the host's slots are looked at whatever inotify says.
const LOOK_AT_HOST: Duration = Duration::from_secs(5);
/// Shortest time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Where messages to the owner are put. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Mailbox(mpsc::UnboundedSender<Message>);

/// The owner's end.
#[derive(Debug)]
pub(crate) struct Inbox(pub(super) mpsc::UnboundedReceiver<Message>);

impl Mailbox {
    /// An empty one.
    pub(crate) fn new() -> (Self, Inbox) {
        // Not bounded: what can be on its way is, by the number of jobs, slots and VMs.
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), Inbox(receiver))
    }

    pub(super) fn send(&self, message: Message) {
        // An owner that is gone has answered everything.
        let _ = self.0.send(message);
    }

    pub(super) fn event(&self, event: Event) {
        self.send(Message::Event(event));
    }
}

/// Passes on what the provider tells.
pub(crate) fn forward(mailbox: &Mailbox, event: ProviderEvent) {
    mailbox.event(match event {
        ProviderEvent::Found(head) => Event::Found(head),
        ProviderEvent::Gone(run) => Event::Gone(run),
        ProviderEvent::Claimed(job) => Event::Claimed(job),
        ProviderEvent::Lost(run) => Event::Lost(run),
        ProviderEvent::Cancelled(run) => Event::Cancel(run),
        // The log's, not ours.
        ProviderEvent::Marked { .. } => return,
        ProviderEvent::Completed(run) => Event::Completed(run),
        ProviderEvent::Changed => Event::Time,
        ProviderEvent::Broken(reason) => Event::ProviderBroken(reason),
    });
}

/// SIGTERM and SIGINT stop, SIGUSR1 drains, SIGUSR2 resumes.
pub(crate) fn watch_signals(mailbox: &Mailbox) -> io::Result<()> {
    for (kind, event) in [
        (SignalKind::terminate(), (|| Event::Stop) as fn() -> Event),
        (SignalKind::interrupt(), || Event::Stop),
        (SignalKind::user_defined1(), || Event::Drain),
        (SignalKind::user_defined2(), || Event::Resume),
    ] {
        let mut signals = signal(kind)?;
        let mailbox = mailbox.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                tracing::info!(signal = kind.as_raw_value(), "signal");
                mailbox.event(event());
            }
        });
    }
    Ok(())
}

/// Tells the owner when the host's slots change, whoever changes them, and when the launcher is gone.
pub(crate) fn watch_host(mailbox: &Mailbox, launcher: Launcher, run_dir: PathBuf) {
    let ended = launcher.clone();
    let told = mailbox.clone();
    tokio::spawn(async move {
        ended.gone().await;
        told.event(Event::LauncherGone);
    });
    let mailbox = mailbox.clone();
    tokio::spawn(async move {
        let changes = slot_changes(&run_dir);
        if let Err(error) = &changes {
            tracing::warn!(%error, "cannot watch the host's slots; looking every few seconds instead");
        }
        let mut changes = changes.ok();
        let mut known = HostUsage::default();
        loop {
            match launcher.usage().await {
                Ok(usage) if usage != known => {
                    known = usage;
                    mailbox.event(Event::Usage(usage));
                }
                Ok(_) => {}
                // The daemon ends as well.
                Err(LauncherError::Gone) => return,
                // As where the launcher has no descriptor left for a moment: later looks tell what this one does not.
                Err(error) => {
                    tracing::warn!(%error, "cannot look at the host's slots; looking again later");
                }
            }
            sleep(LOOK_INTERVAL).await;
            tokio::select! {
                () = changed(&mut changes) => {}
                () = sleep(LOOK_AT_HOST) => {}
            }
        }
    });
}

fn slot_changes(run_dir: &Path) -> io::Result<AsyncFd<Watch>> {
    let mut watch = Watch::new()?;
    watch.add(&Dir::open(run_dir)?)?;
    // SAFETY: the inotify descriptor is open, and the `AsyncFd` owns it, until both are dropped together.
    Ok(unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) }?)
}

/// Resolves when somebody has published new figures. The launcher's own lock beside them is opened by every look at
/// the host, ours included: listening to that would make us hear ourselves for ever.
async fn changed(changes: &mut Option<AsyncFd<Watch>>) {
    let Some(watch) = changes else {
        return std::future::pending().await;
    };
    let published = |change: &Change| match change {
        Change::Appeared { name, .. } => name == CHANGES_FILE,
        Change::Overflow => true,
    };
    while let Ok(mut ready) = watch.readable_mut().await {
        let heard = ready.get_inner_mut().changes();
        ready.clear_ready();
        match heard {
            Ok(heard) if heard.iter().any(published) => return,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    *changes = None;
}

#[cfg(test)]
mod tests {
    use host::launcher::ForkedLauncher;
    use host::slot::{HostLimits, LeaseKind, Resources, SlotRecord};
    use host::test_support::TestHost;

    use super::*;

    #[tokio::test]
    async fn a_look_at_the_host_that_fails_is_not_the_last() {
        let Some(host) = TestHost::new() else { return };
        let config = host.config("test");
        let run_dir = config.run_dir.clone();
        let forked = ForkedLauncher::fork_in_tests(config).unwrap();
        let launcher = forked.attach().unwrap();
        // It has begun, and takes the host's lock for nothing else. No look is possible without that.
        launcher.usage().await.unwrap();
        let lock = run_dir.join("lock");
        std::fs::remove_file(&lock).unwrap();
        std::fs::create_dir(&lock).unwrap();
        launcher.usage().await.unwrap_err();
        let (mailbox, mut inbox) = Mailbox::new();
        watch_host(&mailbox, launcher.clone(), run_dir);
        sleep(LOOK_INTERVAL * 2).await;
        std::fs::remove_dir(&lock).unwrap();
        let resources = Resources {
            vcpu: 1,
            memory_mb: 1,
            disk_mb: 1,
        };
        let record = SlotRecord {
            instance: "test".to_owned(),
            kind: LeaseKind::Firm,
            resources,
            run_id: None,
            shared_mb: 0,
        };
        let limits = HostLimits { total: resources };
        launcher.reserve(record, limits).await.unwrap();
        let told = tokio::time::timeout(LOOK_AT_HOST * 2, inbox.0.recv());
        let told = told.await.expect("another look");
        let Some(Message::Event(Event::Usage(usage))) = told else {
            panic!("{told:?}")
        };
        assert_eq!(usage.firm, resources);
        launcher.shutdown().await;
    }
}
