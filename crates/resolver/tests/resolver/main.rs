//! The resolver on real sockets, before a name server that answers as each test says.
#![cfg(test)]

mod answers;
mod fixture;
mod hostile;
mod policies;
mod upstream;
