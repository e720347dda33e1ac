//! What `build.rs` put into this program for the proxy.

use super::install::ProxyFile;

include!(concat!(env!("OUT_DIR"), "/proxy.rs"));
