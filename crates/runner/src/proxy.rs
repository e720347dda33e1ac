//! The intercepting proxy: its certificate authority, its environment, its life and what it is told.

mod ca;

pub(crate) use ca::Authority;
