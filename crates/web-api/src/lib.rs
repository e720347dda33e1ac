//! The Web API of API mode (`docs/api-mode.md`): a stateless HTTP server, of which any number may run, over NATS
//! JetStream, which holds everything.
#![forbid(unsafe_code)]

pub mod cli;
pub mod clock;
pub mod engine;
pub mod follow;
mod housekeeping;
pub mod http;
pub mod index;
pub mod read_model;
pub mod run;
pub mod service;
pub mod tokens;
