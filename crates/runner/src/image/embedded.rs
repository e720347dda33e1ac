//! What `build.rs` embedded.

use super::flavour::FlavourFile;

include!(concat!(env!("OUT_DIR"), "/embedded.rs"));
