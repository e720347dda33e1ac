//! Builders that the black-box tests share.
