//! The fake engine keeps the promises that need no real guest, so that tests of the daemon may rely on it.
#![cfg(test)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use async_trait::async_trait;
use host::slot::SlotId;
use sandbox::conformance::{PATIENCE, Slots, Subject, cases};
use sandbox::fake::FakeEngine;
use sandbox::{SandboxError, Shape};

#[derive(Default)]
struct Numbers(AtomicU16);

#[async_trait]
impl Slots for Numbers {
    async fn take(&self) -> Result<SlotId, SandboxError> {
        Ok(SlotId(self.0.fetch_add(1, Ordering::Relaxed)))
    }

    async fn give_back(&self, _: SlotId) -> Result<(), SandboxError> {
        Ok(())
    }
}

#[tokio::test]
async fn the_fake_engine_conforms() {
    let (engine, _guests) = FakeEngine::new();
    let shape = Shape {
        vcpu: 1,
        memory_mb: 256,
        disk_mb: 64,
    };
    let subject = Subject {
        template: engine.template(shape),
        slots: Arc::new(Numbers::default()),
        real_guest: false,
        patience: PATIENCE,
        balloon: false,
        device_stats: true,
    };
    let cases = cases(&subject);
    assert!(cases.len() >= 4);
    for case in cases {
        case.run(&subject)
            .await
            .unwrap_or_else(|error| panic!("{}: {error}", case.name));
    }
    assert_eq!(*engine.live().borrow(), 0);
}
