//! The runner: a daemon that runs coding-agent jobs, each in its own microVM, and the commands around it.

mod names;

fn main() {}
