//! The promises of the runner, kept by real microVMs. One binary: it links once.

mod bad_jobs;
mod budget;
mod builds;
mod clock;
mod crashes;
mod document;
mod full_disk;
mod full_image;
mod guests;
mod jobs;
mod metal;
mod network;
mod network_crashes;
mod network_escapes;
mod operators;
mod terminal;
