//! What the resolver must be told by whoever runs it.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use policy::ranges::Reach;
use policy::{Host, Policy};

/// A VM's registration.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Its address in the hub: its slot's.
    pub address: Ipv4Addr,
    /// Which of the address's registrations: an answer belongs to the one that asked.
    pub generation: u64,
    /// The run whose log gets the lines.
    pub run_id: String,
    /// What it may reach.
    pub policy: Arc<Policy>,
}

/// Who asks.
#[derive(Clone, Debug)]
pub enum Client {
    /// A VM.
    Vm(Arc<Vm>),
    /// The proxy: it asks for what it has already decided about.
    Proxy,
}

impl Client {
    /// Whether both are one registration. A changed policy does not make another one of it.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Vm(one), Self::Vm(two)) => {
                one.address == two.address && one.generation == two.generation
            }
            (Self::Proxy, Self::Proxy) => true,
            _ => false,
        }
    }
}

/// An answer's addresses could not be made reachable.
#[derive(Debug, thiserror::Error)]
#[error("the answer could not be used: {0}")]
pub struct Unusable(pub String);

/// Knows the clients and acts on answers.
#[async_trait]
pub trait Directory: Send + Sync + 'static {
    /// Whose address this is; nobody's is refused.
    fn client(&self, address: Ipv4Addr) -> Option<Client>;

    /// Called before an answer is sent: what should be reachable by it is opened here. `addresses` are public, or
    /// internal ones that the operator excepted; the client may use them for `ttl`, and a little longer. With an
    /// error, the client is told that the server failed.
    async fn on_answer(
        &self,
        client: &Client,
        name: &Host,
        addresses: &[Reach],
        ttl: Duration,
    ) -> Result<(), Unusable>;

    /// Takes a line for the VM's network log. Must not block.
    fn log(&self, vm: &Vm, line: policy::log::Line);
}
