//! The intercepting proxy: its certificate authority, its environment, its life and what it is told.

mod ca;
mod channel;

pub(crate) use ca::Authority;
pub(crate) use channel::{Channel, ChannelError};
