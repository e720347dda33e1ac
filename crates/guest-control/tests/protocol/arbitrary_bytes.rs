//! Arbitrary bytes, at either end: the decoder is what stands between a hostile guest and the host.

use crate::common::LocalOs;
use crate::treachery::{garbage_from_guest, garbage_from_host};
use proptest::prelude::*;

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// Bytes that look like frames more often than random ones would.
fn framed() -> impl Strategy<Value = Vec<u8>> {
    let frame = prop_oneof![
        // Kind, operation, and whatever.
        (0u8..9, 0u8..4, prop::collection::vec(any::<u8>(), 0..200)).prop_map(
            |(kind, op, rest)| {
                let mut frame = vec![kind, op];
                frame.extend(rest);
                frame
            }
        ),
        prop::collection::vec(any::<u8>(), 0..300),
    ];
    prop::collection::vec(frame, 0..30).prop_map(|frames| {
        let mut bytes = Vec::new();
        for frame in frames {
            bytes.extend(u32::try_from(frame.len()).unwrap().to_be_bytes());
            bytes.extend(frame);
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_host_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        block_on(garbage_from_guest(&bytes));
    }

    #[test]
    fn the_host_survives_any_frames(bytes in framed()) {
        block_on(garbage_from_guest(&bytes));
    }

    #[test]
    fn the_guest_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        block_on(garbage_from_host(&LocalOs::new(), &bytes));
    }
}
