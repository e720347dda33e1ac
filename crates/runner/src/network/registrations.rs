//! Who is behind which address: the registrations that proxy, resolver and kernel events are looked up in.
//!
//! A registration belongs to one run in one VM. Its generation is never used again, so that what comes late (a log line of
//! the run before, an answer of a proxy that was restarted) is told from what is current.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use policy::log::{Event, Line, Timestamp};
use policy::{Action, ApiAccess, Policy, PolicyError, Secret};
use tokio::sync::watch;

use super::log::NetworkLog;
use crate::metrics::Counters;
use crate::names::RunId;

/// One registration as others see it.
#[derive(Clone, Debug)]
pub(crate) struct Registration {
    /// The VM's address in the hub.
    pub(crate) address: Ipv4Addr,
    /// Which of the address's registrations.
    pub(crate) generation: u64,
    /// The run.
    pub(crate) run: RunId,
    /// What it may reach, as people see it.
    pub(crate) policy: Arc<Policy>,
    /// What decides: the same, behind the runner's own API where there is one.
    pub(crate) decides: Arc<Policy>,
    /// Its secrets, with their values.
    pub(crate) secrets: Arc<[Secret]>,
    /// Since when.
    pub(crate) since: Timestamp,
}

#[derive(Debug)]
struct Kept {
    registration: Registration,
    log: NetworkLog,
    /// A destination past the proxy was opened for it.
    opened: bool,
    /// Its run is over: lines that are on their way still are its own, but nobody begins anything for it.
    ending: bool,
}

/// All of a runner.
#[derive(Debug)]
pub(crate) struct Registrations {
    state: Mutex<State>,
    /// The API whose webhooks every job may reach.
    api: Option<ApiAccess>,
    /// Lines by what they are about and what became of it.
    traffic: Counters,
    /// Rings whenever there are others than before.
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    kept: HashMap<Ipv4Addr, Kept>,
    last_generation: u64,
}

impl Registrations {
    /// None yet.
    pub(crate) fn new(api: Option<ApiAccess>) -> Self {
        Self {
            api,
            state: Mutex::default(),
            traffic: Counters::default(),
            changed: watch::Sender::new(()),
        }
    }

    /// To wait for changes.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What decides for a job with this policy.
    fn decides(&self, policy: &Arc<Policy>) -> Result<Arc<Policy>, PolicyError> {
        match &self.api {
            None => Ok(Arc::clone(policy)),
            Some(api) => Ok(Arc::new(api.over(policy)?)),
        }
    }

    /// Begins a registration; an older one of the address ends with it.
    pub(crate) fn add(
        &self,
        address: Ipv4Addr,
        run: RunId,
        policy: Arc<Policy>,
        secrets: Arc<[Secret]>,
        log: NetworkLog,
    ) -> Result<Registration, PolicyError> {
        let decides = self.decides(&policy)?;
        let mut state = self.lock();
        state.last_generation = state.last_generation.saturating_add(1);
        let registration = Registration {
            address,
            generation: state.last_generation,
            run,
            policy,
            decides,
            secrets,
            since: Timestamp::now(),
        };
        let kept = Kept {
            registration: registration.clone(),
            log,
            opened: false,
            ending: false,
        };
        state.kept.insert(address, kept);
        self.changed.send_replace(());
        Ok(registration)
    }

    /// Begins the end of a registration: from here on no worker is told of it, nothing is opened for it and its policy
    /// stays as it is, so that who ends it everywhere has seen everything there is. Its log is open still.
    pub(crate) fn begin_end(&self, address: Ipv4Addr, generation: u64) {
        let mut state = self.lock();
        let kept = state.kept.get_mut(&address);
        if let Some(kept) = kept.filter(|kept| kept.registration.generation == generation) {
            kept.ending = true;
            self.changed.send_replace(());
        }
    }

    /// Ends a registration and closes its log; says how many lines the log lacks. Nothing if it has ended.
    pub(crate) fn remove(&self, address: Ipv4Addr, generation: u64) -> Option<u64> {
        let mut state = self.lock();
        if state.kept.get(&address)?.registration.generation != generation {
            return None;
        }
        let kept = state.kept.remove(&address)?;
        self.changed.send_replace(());
        Some(kept.log.lost())
    }

    /// Changes a run's policy; gives the registration as it is now.
    pub(crate) fn set_policy(
        &self,
        run: RunId,
        policy: Arc<Policy>,
    ) -> Result<Option<Registration>, PolicyError> {
        let decides = self.decides(&policy)?;
        Ok(self.replace_policy(run, policy, decides))
    }

    fn replace_policy(
        &self,
        run: RunId,
        policy: Arc<Policy>,
        decides: Arc<Policy>,
    ) -> Option<Registration> {
        let mut state = self.lock();
        let mut kept = state.kept.values_mut();
        let kept = kept.find(|kept| kept.registration.run == run && !kept.ending)?;
        kept.registration.policy = policy;
        kept.registration.decides = decides;
        let changed = kept.registration.clone();
        self.changed.send_replace(());
        Some(changed)
    }

    /// Notes that a destination past the proxy is about to be opened for a registration; false if it ends or has ended,
    /// and nothing may be opened for it any more.
    pub(crate) fn opens(&self, address: Ipv4Addr, generation: u64) -> bool {
        let mut state = self.lock();
        let kept = state.kept.get_mut(&address);
        let current = kept.filter(|kept| kept.registration.generation == generation);
        current.filter(|kept| !kept.ending).is_some_and(|kept| {
            kept.opened = true;
            true
        })
    }

    /// Whether one was opened since this was asked last.
    pub(crate) fn take_opened(&self, address: Ipv4Addr, generation: u64) -> bool {
        let mut state = self.lock();
        let kept = state.kept.get_mut(&address);
        kept.filter(|kept| kept.registration.generation == generation)
            .is_some_and(|kept| std::mem::take(&mut kept.opened))
    }

    /// Who is behind an address now.
    pub(crate) fn find(&self, address: Ipv4Addr) -> Option<Registration> {
        let state = self.lock();
        Some(state.kept.get(&address)?.registration.clone())
    }

    /// The registration of a run.
    pub(crate) fn of_run(&self, run: RunId) -> Option<Registration> {
        let state = self.lock();
        let mut kept = state.kept.values();
        kept.find(|kept| kept.registration.run == run)
            .map(|kept| kept.registration.clone())
    }

    /// All there are now, but for those that end.
    pub(crate) fn all(&self) -> Vec<Registration> {
        let state = self.lock();
        let kept = state.kept.values().filter(|kept| !kept.ending);
        kept.map(|kept| kept.registration.clone()).collect()
    }

    /// Writes a line into the log of whoever is behind the address; with a generation only if it is still that one.
    pub(crate) fn write(&self, address: Ipv4Addr, generation: Option<u64>, line: &Line) {
        let mut state = self.lock();
        if let Some(kept) = state.kept.get_mut(&address)
            && generation.is_none_or(|generation| generation == kept.registration.generation)
        {
            kept.log.write(line);
            drop(state);
            self.count(line);
        }
    }

    /// Counts what a line tells.
    fn count(&self, line: &Line) {
        let (kind, count) = match &line.event {
            Event::Http { .. } => ("http", 1),
            Event::Tcp { .. } => ("tcp", 1),
            Event::Dns { .. } => ("dns", 1),
            Event::Packet { count, .. } => ("packet", *count),
        };
        let action = match line.action {
            Action::Allow => "allow",
            Action::Deny => "deny",
            Action::Audit => "audit",
        };
        let labels = vec![("type", kind.to_owned()), ("action", action.to_owned())];
        self.traffic.get_or_create(&labels).inc_by(count);
    }

    /// Counts a refused packet that is no run's.
    pub(super) fn stray(&self) {
        let labels = vec![
            ("type", "packet".to_owned()),
            ("action", "stray".to_owned()),
        ];
        self.traffic.get_or_create(&labels).inc();
    }

    /// The counters.
    pub(super) fn traffic(&self) -> Counters {
        self.traffic.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole between any two operations; a line that was half written is the log's own matter.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::rel;
    use host::fs::Dir;

    const LINE: &str = r#"{"timestamp":"2026-01-31T12:00:00.000Z","type":"dns","action":"ALLOW","rule":null,"host":"a.example.com","port":53,"query":"A","answers":[],"latency_ms":1,"error":null}"#;

    #[test]
    fn a_line_of_an_older_generation_is_nobodys_and_one_that_ends_begins_nothing() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("logs")).unwrap();
        let home = Dir::open(root.path()).unwrap();
        let registrations = Registrations::new(None);
        let address = Ipv4Addr::new(100, 96, 0, 1);
        let add = |run| {
            let log = NetworkLog::create(&home, run, 1 << 20).unwrap();
            registrations
                .add(address, run, Arc::default(), Arc::from([]), log)
                .unwrap()
        };
        let (one, two) = (RunId::random(), RunId::random());
        let first = add(one);
        let line = Line::parse(LINE).unwrap();
        registrations.write(address, Some(first.generation), &line);
        let second = add(two);
        assert!(second.generation > first.generation);
        registrations.write(address, Some(first.generation), &line);
        registrations.write(address, None, &line);
        assert!(!registrations.opens(address, first.generation));
        assert!(!registrations.take_opened(address, second.generation));
        assert!(registrations.opens(address, second.generation));
        assert!(!registrations.take_opened(address, first.generation));
        assert!(registrations.take_opened(address, second.generation));
        assert!(!registrations.take_opened(address, second.generation));
        assert!(registrations.opens(address, second.generation));
        registrations.begin_end(address, first.generation);
        assert_eq!(registrations.all().len(), 1);
        // What is on its way is written still, and what was opened is to be cut. Nothing new begins.
        registrations.begin_end(address, second.generation);
        registrations.write(address, Some(second.generation), &line);
        assert!(registrations.all().is_empty());
        assert!(!registrations.opens(address, second.generation));
        assert!(registrations.take_opened(address, second.generation));
        let changed = registrations.set_policy(two, Arc::default());
        assert!(changed.unwrap().is_none());
        assert_eq!(registrations.remove(address, first.generation), None);
        assert_eq!(registrations.remove(address, second.generation), Some(0));
        registrations.write(address, None, &line);
        let lines = |run| {
            let path = root.path().join(rel::network_log(&run));
            std::fs::read_to_string(path).unwrap().lines().count()
        };
        assert_eq!((lines(one), lines(two)), (1, 2));
        assert!(registrations.find(address).is_none());
    }
}
