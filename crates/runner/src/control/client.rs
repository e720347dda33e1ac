//! The client end.
