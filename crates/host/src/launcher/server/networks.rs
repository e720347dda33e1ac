//! The hub and the networks of VMs: who has which, and what is being done to them.
//!
//! ```text
//!            errand                    launch                       process reaped
//!   making ─────────▶ ready ──────────────────────────▶ in use ─────────────────────▶ ready
//!                      │ ▲ flush (errand)
//!                      └─┴──── destroy ──▶ leaving (errand) ──▶ its number is free again
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

use super::Server;
use super::errand::{Brought, Errand};
use crate::launcher::wire::{Refusal, Reply};
use crate::net::vm::Device;
use crate::net::{HubConfig, HubNumber, NetworkId, hub, tap, vm};

/// Errands at once: the kernel makes one link at a time anyway, and each is a process.
const AT_ONCE: usize = 4;
/// Most destinations that are open for one VM; each is an element of a set in the kernel.
const MAX_OPENED: usize = 4096;
/// Longest answer of an errand.
const MAX_ANSWER: usize = 4096;

/// All there is of networks.
#[derive(Debug, Default)]
pub(super) struct Networks {
    hub: Option<Hub>,
    made: BTreeMap<NetworkId, Network>,
    /// Work with the request to answer when it is done.
    waiting: VecDeque<(u64, Work)>,
    running: Vec<(u64, Work, Errand)>,
}

#[derive(Debug)]
struct Hub {
    config: HubConfig,
    /// Nothing while it is made.
    made: Option<(HubNumber, OwnedFd)>,
}

#[derive(Debug)]
struct Network {
    /// Namespace and device; nothing while it is made.
    made: Option<Made>,
    /// What was opened for its VM, until it is flushed.
    opened: BTreeSet<SocketAddrV4>,
}

#[derive(Debug)]
struct Made {
    namespace: OwnedFd,
    /// Nothing while it is left to a process that opens it by name.
    tap: Option<OwnedFd>,
}

/// What an errand is about.
#[derive(Clone, Debug)]
enum Work {
    MakeHub(HubConfig),
    EndHub,
    Make(NetworkId),
    MakeUnplugged,
    Flush(NetworkId),
    /// As `Flush`, but for the device, which its VM still uses.
    Cut(NetworkId),
    End(NetworkId),
    /// For so many seconds; and whether some of them may be open already.
    Open(NetworkId, Vec<SocketAddrV4>, u32, bool),
    Allow(Vec<Ipv4Addr>, u32),
    AdmitApi(Vec<SocketAddrV4>, u32),
}

impl Work {
    fn network(&self) -> Option<NetworkId> {
        match self {
            Work::Make(network)
            | Work::Cut(network)
            | Work::Flush(network)
            | Work::End(network)
            | Work::Open(network, ..) => Some(*network),
            Work::MakeHub(_)
            | Work::EndHub
            | Work::MakeUnplugged
            | Work::Allow(..)
            | Work::AdmitApi(..) => None,
        }
    }

    /// For the error that says it failed.
    fn step(&self) -> String {
        match self {
            Work::MakeHub(_) => "make the network's hub".to_owned(),
            Work::EndHub => "end the network's hub".to_owned(),
            Work::Make(network) => format!("make network {network}"),
            Work::MakeUnplugged => "make a device that leads nowhere".to_owned(),
            Work::Flush(network) | Work::Cut(network) => format!("clean network {network}"),
            Work::End(network) => format!("end network {network}"),
            Work::Open(network, ..) => format!("open destinations for network {network}"),
            Work::Allow(..) => "open internal addresses".to_owned(),
            Work::AdmitApi(..) => "admit the API".to_owned(),
        }
    }
}

impl Networks {
    pub(super) fn errand_sockets(&self) -> impl Iterator<Item = &OwnedFd> {
        self.running.iter().map(|(_, _, errand)| errand.socket())
    }

    /// The hub's namespace.
    pub(super) fn hub_namespace(&self) -> Option<&OwnedFd> {
        let (_, namespace) = self.hub.as_ref()?.made.as_ref()?;
        Some(namespace)
    }

    /// What is being done to a network, and what will be.
    fn work_on(&self, id: NetworkId) -> impl Iterator<Item = &Work> {
        let running = self.running.iter().map(|(_, work, _)| work);
        let waiting = self.waiting.iter().map(|(_, work)| work);
        running
            .chain(waiting)
            .filter(move |work| work.network() == Some(id))
    }

    /// Whether something is being done to it, or will be, that a VM must not see.
    fn is_changing(&self, id: NetworkId) -> bool {
        self.work_on(id).any(|work| !matches!(work, Work::Open(..)))
    }

    /// Whether it is being ended, or will be.
    fn is_ending(&self, id: NetworkId) -> bool {
        self.work_on(id).any(|work| matches!(work, Work::End(_)))
    }

    /// Namespace and device of a network that a process may be put into.
    pub(super) fn for_launch(&self, id: NetworkId) -> Option<(&OwnedFd, &OwnedFd)> {
        let made = self.made.get(&id)?.made.as_ref()?;
        if self.is_changing(id) {
            return None;
        }
        Some((&made.namespace, made.tap.as_ref()?))
    }

    /// The namespace of a network.
    pub(super) fn namespace(&self, id: NetworkId) -> Option<&OwnedFd> {
        Some(&self.made.get(&id)?.made.as_ref()?.namespace)
    }

    /// Leaves the device of a network to a process of `uid` that opens it by name, until the network is flushed.
    pub(super) fn leave_device(&mut self, id: NetworkId, uid: u32) -> Result<(), String> {
        let not_free = || format!("network {id} is not free for it");
        if self.is_changing(id) {
            return Err(not_free());
        }
        let network = self.made.get_mut(&id);
        let made = network
            .and_then(|network| network.made.as_mut())
            .ok_or_else(not_free)?;
        let tap = made.tap.take().ok_or_else(not_free)?;
        tap::leave_to(tap, uid).map_err(|e| format!("leave it the device of network {id}: {e}"))
    }

    /// The next work to begin with: what is about one network is done in the order it came.
    fn next_work(&mut self) -> Option<(u64, Work)> {
        let mut taken: Vec<NetworkId> = self
            .running
            .iter()
            .filter_map(|(_, work, _)| work.network())
            .collect();
        let next = self
            .waiting
            .iter()
            .position(|(_, work)| match work.network() {
                Some(network) if taken.contains(&network) => false,
                Some(network) => {
                    taken.push(network);
                    true
                }
                None => true,
            })?;
        self.waiting.remove(next)
    }

    /// In the child: does the work with what the launcher had at the fork.
    fn run(&self, work: &Work) -> Brought {
        let no_hub = || "there is no hub".to_owned();
        let none = |()| (0, Vec::new());
        if let Work::MakeHub(config) = work {
            let made = hub::make(config)?;
            let fds = std::iter::once(made.namespace).chain(made.sockets);
            return Ok((made.number.0, fds.collect()));
        }
        if let Work::MakeUnplugged = work {
            return Ok((0, vec![vm::unplugged()?]));
        }
        let (number, namespace) = self
            .hub
            .as_ref()
            .and_then(|hub| hub.made.as_ref())
            .ok_or_else(no_hub)?;
        match work {
            Work::MakeHub(_) | Work::MakeUnplugged => Err("it was made already".to_owned()),
            Work::EndHub => hub::end(*number).map(none),
            Work::Make(id) => {
                let made = vm::make(*id, namespace)?;
                Ok((id.0, vec![made.namespace, made.tap]))
            }
            Work::Flush(id) | Work::Cut(id) => {
                let network = self.made.get(id);
                let Some((network, made)) =
                    network.and_then(|network| Some((network, network.made.as_ref()?)))
                else {
                    return Err("it is not made yet".to_owned());
                };
                let opened: Vec<_> = network.opened.iter().copied().collect();
                let device = match (work, &made.tap) {
                    (Work::Flush(_), Some(tap)) => Device::Ours(tap),
                    (Work::Flush(_), None) => Device::LeftTo,
                    _ => Device::InUse,
                };
                let tap = vm::flush(*id, namespace, &made.namespace, device, &opened)?;
                Ok((0, tap.into_iter().collect()))
            }
            Work::End(id) => vm::end(*id, namespace).map(none),
            Work::Open(id, to, seconds, anew) => {
                vm::open(*id, namespace, to, *seconds, *anew).map(none)
            }
            Work::Allow(addresses, seconds) => {
                hub::allow(*number, namespace, addresses, *seconds).map(none)
            }
            Work::AdmitApi(at, seconds) => {
                hub::admit_api(*number, namespace, at, *seconds).map(none)
            }
        }
    }
}

impl Server {
    pub(super) fn has_errands(&self) -> bool {
        !self.networks.running.is_empty()
    }

    pub(super) fn make_hub(&mut self, id: u64, config: HubConfig) {
        if self.networks.hub.is_some() {
            let refusal = Refusal::step("make the network's hub", "this runner has one already");
            return self.answer(id, Err(refusal));
        }
        self.networks.hub = Some(Hub {
            config: config.clone(),
            made: None,
        });
        self.do_later(id, Work::MakeHub(config));
    }

    pub(super) fn make_network(&mut self, id: u64) {
        let hub = self.networks.hub.as_ref().filter(|hub| hub.made.is_some());
        let most = hub.map_or(0, |hub| hub.config.networks);
        let free = (0..most)
            .map(NetworkId)
            .find(|number| !self.networks.made.contains_key(number));
        let Some(number) = free else {
            let why = match most {
                0 => "there is no hub yet".to_owned(),
                most => format!("all {most} networks of the hub are taken"),
            };
            return self.answer(id, Err(Refusal::step("make a network", why)));
        };
        let network = Network {
            made: None,
            opened: BTreeSet::new(),
        };
        self.networks.made.insert(number, network);
        self.do_later(id, Work::Make(number));
    }

    pub(super) fn make_unplugged(&mut self, id: u64) {
        self.do_later(id, Work::MakeUnplugged);
    }

    pub(super) fn flush_network(&mut self, id: u64, number: NetworkId) {
        self.change_unused(id, number, Work::Flush(number));
    }

    pub(super) fn cut_network(&mut self, id: u64, number: NetworkId) {
        self.change(id, number, Work::Cut(number), false);
    }

    pub(super) fn destroy_network(&mut self, id: u64, number: NetworkId) {
        self.change_unused(id, number, Work::End(number));
    }

    /// What may only be done while no VM is in the network.
    fn change_unused(&mut self, id: u64, number: NetworkId, work: Work) {
        let used = self
            .units
            .values()
            .any(|held| held.main.is_some() && held.network == Some(number));
        self.change(id, number, work, used);
    }

    /// Changes wait for one another: a VM that ends while its network is cut gives it back for good all the same.
    fn change(&mut self, id: u64, number: NetworkId, work: Work, used: bool) {
        let why = match self.networks.made.get(&number) {
            None => "this runner does not have it",
            Some(network) if network.made.is_none() => "it is not made yet",
            Some(_) if self.networks.is_ending(number) => "it is being ended",
            Some(_) if used => "a VM still runs in it",
            Some(_) => return self.do_later(id, work),
        };
        self.answer(id, Err(Refusal::step(work.step(), why)));
    }

    pub(super) fn open(&mut self, id: u64, number: NetworkId, to: Vec<SocketAddrV4>, seconds: u32) {
        if to.is_empty() {
            return self.answer(id, Ok(Reply::Done));
        }
        let changing = self.networks.is_changing(number);
        let network = self.networks.made.get_mut(&number);
        let why = match network.filter(|_| !changing) {
            None => "it is not this runner's, or something else is being done to it".to_owned(),
            Some(network) if network.opened.len().saturating_add(to.len()) > MAX_OPENED => {
                format!("a VM may have {MAX_OPENED} destinations past the proxy")
            }
            Some(network) => {
                let anew = to.iter().any(|to| network.opened.contains(to));
                network.opened.extend(&to);
                return self.do_later(id, Work::Open(number, to, seconds, anew));
            }
        };
        let step = format!("open destinations for network {number}");
        self.answer(id, Err(Refusal::step(step, why)));
    }

    pub(super) fn allow_internal(&mut self, id: u64, addresses: Vec<Ipv4Addr>, seconds: u32) {
        if addresses.is_empty() {
            return self.answer(id, Ok(Reply::Done));
        }
        self.do_later(id, Work::Allow(addresses, seconds));
    }

    pub(super) fn admit_api(&mut self, id: u64, at: Vec<SocketAddrV4>, seconds: u32) {
        if at.is_empty() {
            return self.answer(id, Ok(Reply::Done));
        }
        self.do_later(id, Work::AdmitApi(at, seconds));
    }

    fn do_later(&mut self, request: u64, work: Work) {
        self.networks.waiting.push_back((request, work));
        self.start_errands();
    }

    fn start_errands(&mut self) {
        while self.networks.running.len() < AT_ONCE
            && let Some((request, work)) = self.networks.next_work()
        {
            let networks = &self.networks;
            match Errand::start(|| networks.run(&work)) {
                Ok(errand) => self.networks.running.push((request, work, errand)),
                Err(e) => self.finish(request, work, Err(e.to_string())),
            }
        }
    }

    /// Takes in what errands brought and starts those that waited for them.
    pub(super) fn see_errands(&mut self) {
        let mut buffer = [0; MAX_ANSWER];
        let mut done = Vec::new();
        self.networks.running.retain(|(request, work, errand)| {
            let Some(brought) = errand.poll(&mut buffer) else {
                return true;
            };
            done.push((*request, work.clone(), brought));
            false
        });
        for (request, work, brought) in done {
            self.finish(request, work, brought);
        }
        self.start_errands();
    }

    fn finish(&mut self, request: u64, work: Work, brought: Brought) {
        let step = work.step();
        let result = match brought {
            Ok((number, fds)) => self.take_in(&work, number, fds),
            Err(message) => {
                self.take_back(&work);
                Err(message)
            }
        };
        match result {
            Ok((reply, fds)) => self.answer_with(request, Ok(reply), &fds),
            Err(message) => self.answer(request, Err(Refusal::step(step, message))),
        }
    }

    /// Keeps what the work made; gives what the daemon is to have.
    fn take_in(
        &mut self,
        work: &Work,
        number: u16,
        fds: Vec<OwnedFd>,
    ) -> Result<(Reply, Vec<OwnedFd>), String> {
        let mut fds = fds.into_iter();
        let networks = &mut self.networks;
        match work {
            Work::MakeHub(_) => {
                let (Some(namespace), Some(hub)) = (fds.next(), networks.hub.as_mut()) else {
                    networks.hub = None;
                    return Err("no namespace came back".to_owned());
                };
                hub.made = Some((HubNumber(number), namespace));
                return Ok((Reply::Hub(HubNumber(number)), fds.collect()));
            }
            Work::Make(id) => {
                let made = fds.next().zip(fds.next());
                let (Some((namespace, tap)), Some(network)) = (made, networks.made.get_mut(id))
                else {
                    networks.made.remove(id);
                    return Err("no namespace came back".to_owned());
                };
                network.made = Some(Made {
                    namespace,
                    tap: Some(tap),
                });
                return Ok((Reply::Network(*id), Vec::new()));
            }
            Work::MakeUnplugged => return Ok((Reply::Device, fds.collect())),
            Work::Flush(id) | Work::Cut(id) => {
                if let Some(network) = networks.made.get_mut(id) {
                    network.opened.clear();
                    if let (Some(tap), Some(made)) = (fds.next(), network.made.as_mut()) {
                        made.tap = Some(tap);
                    }
                }
            }
            Work::End(id) => {
                networks.made.remove(id);
            }
            Work::EndHub => networks.hub = None,
            Work::Open(..) | Work::Allow(..) | Work::AdmitApi(..) => {}
        }
        Ok((Reply::Done, Vec::new()))
    }

    /// The work failed.
    fn take_back(&mut self, work: &Work) {
        let networks = &mut self.networks;
        match work {
            Work::MakeHub(_) => networks.hub = None,
            Work::Make(id) => {
                networks.made.remove(id);
            }
            // Its number stays taken, so that nobody gets what may be left in it; destroying it may be tried again.
            Work::Flush(_) | Work::Cut(_) | Work::End(_) => {}
            // What was opened is still remembered, as nobody knows whether it was.
            Work::Open(..)
            | Work::Allow(..)
            | Work::AdmitApi(..)
            | Work::MakeUnplugged
            | Work::EndHub => {}
        }
    }

    /// Stops whatever errands do, for the end.
    pub(super) fn drop_errands(&mut self) {
        self.networks.waiting.clear();
        for (_, _, errand) in self.networks.running.drain(..) {
            errand.kill();
        }
    }

    /// Removes what the hub has on the host.
    pub(super) fn begin_ending_hub(&mut self) {
        // Nobody waits for an answer any more.
        if self.networks.hub_namespace().is_some() {
            self.do_later(0, Work::EndHub);
        }
    }
}
