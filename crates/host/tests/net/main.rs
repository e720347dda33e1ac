//! Networks of VMs, in real namespaces below a host that is the test's own. Needs root and nft; says so and passes where
//! there is none.
#![cfg(test)]

mod api;
mod common;
mod jailed;
mod life;
mod rules;
mod services;
