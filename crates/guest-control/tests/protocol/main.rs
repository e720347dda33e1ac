//! Client and server over in-memory streams and this machine's own processes; no VM.

#[cfg(test)]
mod arbitrary_bytes;
#[cfg(test)]
mod channel;
#[cfg(test)]
mod common;
#[cfg(test)]
mod exec;
#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod treachery;
