//! The promises of the runner, kept by real microVMs. One binary: it links once.

mod anomalies;
mod api_mode;
mod audit;
mod bad_jobs;
mod budget;
mod builds;
mod cleaning;
mod clock;
mod crashes;
mod document;
mod firecracker;
mod full_agent;
mod full_disk;
mod full_image;
mod guests;
mod jobs;
mod metal;
mod metrics;
mod network;
mod network_clients;
mod network_crashes;
mod network_escapes;
mod network_streams;
mod operators;
mod terminal;
mod top;
