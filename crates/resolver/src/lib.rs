//! The name server of VMs and proxy.
//!
//! ```text
//! query ─▶ who asks? ─▶ within bounds? ─▶ may the name be resolved? ─▶ hosts file ─▶ cache ─▶ upstream servers
//!                                                                            │
//! answer ◀─ log line ◀─ same registration still? ◀─ `on_answer` ◀─ refused ranges taken out
//! ```
//!
//! Who asks is known by the source address, which the namespaces' rules vouch for; [`Directory`] says whose it is. What
//! may be asked is the policy's matter (`policy::Policy::decide_name`). An answer leaves only after
//! [`Directory::on_answer`] returned, so whoever acts on it finds the kernel's sets filled.
//!
//! - **Denied** names, and names all of whose addresses are refused, are answered NXDOMAIN without SOA. REFUSED would be
//!   the more honest word, but the C libraries take it for a broken server: they ask again, and report "temporary
//!   failure", which makes agents retry for minutes. Without SOA nobody caches the answer (RFC 2308), so a changed policy
//!   works at once. Clients that speak EDNS get the reason as an extended error.
//! - **AAAA, HTTPS, SVCB** are answered "no such record": the guest has no IPv6, and no use for hints to HTTP/3 and
//!   encrypted client hello, which the proxy cannot see through.
//! - **TXT, MX, SRV** are forwarded for names that may be resolved: programs find their servers by them, and whoever may
//!   ask for a name's address can carry as much in that query. All other types are answered "no such record" too.
//! - **Aliases** are followed here and left out of answers: a policy names what a program asks for, not the delivery
//!   network behind it.
//! - **The hosts file comes first**, as on the host itself: what its administrator wrote there beats what servers say.
//!   Its addresses are judged like all others.
//!
//! The messages are hickory-proto's. Its resolver is not used: who is asked, over which socket, within which bounds and
//! what is done between question and answer is what this crate is about, and little would be left of it.
#![forbid(unsafe_code)]

mod cache;
mod directory;
mod files;
mod limits;
mod lookup;
mod message;
mod server;
mod upstream;

pub use directory::{Client, Directory, Unusable, Vm};
pub use files::{HostFiles, Hosts, ResolvConf};
pub use limits::Limits;
pub use server::{Config, Resolver};
