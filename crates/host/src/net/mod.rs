//! The network of VMs: one hub namespace per runner, one namespace per VM, and the rules in both.
//!
//! docs/network.md has the picture. What is decided about packets is text made by pure functions (`rules`); how links,
//! addresses and devices come about is `route` and `tap`; `hub` and `vm` put both together and run in short-lived
//! children of the launcher, because a namespace takes milliseconds and the launcher has to answer meanwhile. The
//! daemon uses [`NetworkPool`] and the event streams.

mod address;
mod conntrack;
mod events;
pub(crate) mod hub;
pub(crate) mod namespace;
mod netlink;
mod nflog;
mod nfnetlink;
mod nft;
mod pool;
pub(crate) mod route;
mod rules;
mod settings;
pub(crate) mod tap;
pub(crate) mod vm;

pub use address::{
    Cidr, CidrError, GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, GUEST_PREFIX,
    HubNumber, MAX_NETWORKS, NetworkId, RESOLVER_FOR_PROXY,
};
pub use conntrack::{FlowEnd, FlowEvent, FlowKey};
pub use events::{EventError, Events, FlowEvents, RefusalEvents};
pub(crate) use namespace::enter;
pub use nflog::{Protocol, Refusal, RefusalReason};
pub use pool::{Network, NetworkPool};
pub use rules::{HubConfig, NetworkLimits, standard_refused};
