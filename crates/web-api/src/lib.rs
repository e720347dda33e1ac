//! The Web API of API mode (`docs/api-mode.md`): a stateless HTTP server, of which any number may run, over NATS
//! JetStream, which holds everything.
#![forbid(unsafe_code)]

pub mod run;
