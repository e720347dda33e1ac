//! Proofs of engines, kept with the image they booted: `proof-<engine>.json` beside its manifest, no part of the image.

use std::time::Duration;

use host::launcher::Launcher;
use sandbox::{EngineKind, Proof};
use serde::{Deserialize, Serialize};

use super::ImageError;
use super::progress::Steps;
use super::store::Store;
use crate::engine::{self, Candidates};
use crate::names::ImageHash;

/// How a boot went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Engine and host it was made with.
    holds_for: String,
    /// The image boots.
    pub(crate) boots: bool,
    /// The kernel's id of the host's boot: what failed may have been put right with the next one.
    booted: String,
    /// The limit that was given, seconds.
    limit_secs: u64,
    /// How long the boot took, milliseconds, or why it failed.
    pub(crate) outcome: String,
}

impl Record {
    /// Whether nothing would be learned by booting again: the same engine and host, and not only too little time.
    fn holds(&self, key: &str, limit: Duration) -> bool {
        let failed_now = || self.booted == boot_id() && limit.as_secs() <= self.limit_secs;
        self.holds_for == key && (self.boots || failed_now())
    }
}

/// What is known of an image's engines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The best one that works.
    Proved(EngineKind),
    /// This one has to be proved first.
    Open(EngineKind),
    /// None of those that were chosen works; why the last one does not.
    Failed(EngineKind, String),
}

/// What was recorded of an engine, for whatever engine and host.
pub(crate) fn recorded(store: &Store, rootfs: &ImageHash, kind: EngineKind) -> Option<Record> {
    serde_json::from_slice(&store.read_beside(rootfs, &file_name(kind))?).ok()
}

/// Looks at what was recorded; boots nothing.
pub(crate) fn standing(
    store: &Store,
    rootfs: &ImageHash,
    candidates: &Candidates,
) -> Result<Standing, ImageError> {
    let known = |kind| recorded(store, rootfs, kind);
    look(candidates, known, &[])
}

fn look(
    candidates: &Candidates,
    known: impl Fn(EngineKind) -> Option<Record>,
    left_out: &[EngineKind],
) -> Result<Standing, ImageError> {
    let mut failed = None;
    for kind in candidates.order()? {
        if left_out.contains(&kind) {
            continue;
        }
        // Software runs everywhere.
        if kind == EngineKind::QemuTcg {
            return Ok(Standing::Proved(kind));
        }
        let key = candidates.proof_key(kind)?;
        let holds = |record: &Record| {
            // Who insists on an engine has it tried again.
            record.holds(&key, candidates.boot_limit()) && (record.boots || !candidates.is_forced())
        };
        match known(kind).filter(holds) {
            None => return Ok(Standing::Open(kind)),
            Some(record) if record.boots => return Ok(Standing::Proved(kind)),
            Some(record) => failed = Some((kind, record.outcome)),
        }
    }
    let nothing = || (EngineKind::QemuTcg, "there is no engine".to_owned());
    let (kind, why) = failed.unwrap_or_else(nothing);
    Ok(Standing::Failed(kind, why))
}

/// Decides how the image's VMs run here, booting it with each engine that has not been proved yet, the best one first.
pub(crate) async fn choose(
    store: &Store,
    rootfs: &ImageHash,
    candidates: &Candidates,
    launcher: &Launcher,
    steps: &Steps,
) -> Result<EngineKind, ImageError> {
    let mut left_out = Vec::new();
    loop {
        let known = |kind| recorded(store, rootfs, kind);
        let kind = match look(candidates, known, &left_out)? {
            Standing::Proved(kind) => return Ok(kind),
            Standing::Open(kind) => kind,
            Standing::Failed(kind, reason) => {
                return Err(ImageError::NotProved {
                    engine: engine::describe(kind),
                    reason,
                });
            }
        };
        let name = engine::describe(kind);
        steps.begin(&format!("proving {name} with a boot of the image"));
        let image = store.image(rootfs)?.files(kind)?;
        let limit = candidates.boot_limit();
        let proof = tokio::select! {
            proof = engine::prove(candidates, kind, image, launcher) => proof,
            () = steps.interrupted() => return Err(ImageError::Interrupted),
        };
        let proof = match proof {
            Ok(proof) => proof,
            Err(error) if candidates.is_forced() => return Err(error.into()),
            // An engine that is not there at all is no statement about the image.
            Err(error) => {
                steps.note(&format!("note: {error}"));
                left_out.push(kind);
                continue;
            }
        };
        steps.end();
        let (boots, outcome) = match proof {
            Proof::Boots(took) => (true, took.as_millis().to_string()),
            Proof::Fails(why) => {
                if !candidates.is_forced() {
                    steps.note(&format!("note: {name} is not used: {why}"));
                }
                (false, why)
            }
        };
        let record = Record {
            holds_for: candidates.proof_key(kind)?,
            boots,
            booted: boot_id(),
            limit_secs: limit.as_secs(),
            outcome: outcome.clone(),
        };
        store.write_beside(rootfs, &file_name(kind), &record)?;
        if !boots && candidates.is_forced() {
            return Err(ImageError::NotProved {
                engine: name,
                reason: outcome,
            });
        }
    }
}

fn boot_id() -> String {
    super::verify::boot().unwrap_or_default()
}

/// Beside an image's manifest.
pub(super) fn file_name(kind: EngineKind) -> String {
    let name = match kind {
        EngineKind::Firecracker => "firecracker",
        EngineKind::QemuKvm => "qemu-kvm",
        EngineKind::QemuTcg => "qemu-tcg",
        EngineKind::Fake => "fake",
    };
    format!("proof-{name}.json")
}

#[cfg(test)]
mod tests {
    use sandbox_qemu::Kvm;

    use super::*;
    use crate::config::EngineChoice;

    fn record(candidates: &Candidates, kind: EngineKind, boots: bool, limit_secs: u64) -> Record {
        Record {
            holds_for: candidates.proof_key(kind).unwrap(),
            boots,
            booted: boot_id(),
            limit_secs,
            outcome: "the image does not boot".to_owned(),
        }
    }

    #[test]
    fn each_engine_is_proved_once_the_best_one_first() {
        use EngineKind::{Firecracker, QemuKvm, QemuTcg};
        let found = Candidates::for_tests(EngineChoice::Auto, Kvm::Hardware, true, true);
        let mut records: Vec<(EngineKind, Record)> = Vec::new();
        let see = |records: &[(EngineKind, Record)]| {
            let known = |kind| {
                let found = records.iter().rev().find(|(of, _)| *of == kind);
                found.map(|(_, record)| record.clone())
            };
            look(&found, known, &[]).unwrap()
        };
        assert_eq!(see(&records), Standing::Open(Firecracker));
        records.push((Firecracker, record(&found, Firecracker, false, 20)));
        assert_eq!(see(&records), Standing::Open(QemuKvm));
        records.push((QemuKvm, record(&found, QemuKvm, false, 20)));
        assert_eq!(see(&records), Standing::Proved(QemuTcg));
        records.push((QemuKvm, record(&found, QemuKvm, true, 20)));
        assert_eq!(see(&records), Standing::Proved(QemuKvm));
        records.push((Firecracker, record(&found, Firecracker, true, 20)));
        assert_eq!(see(&records), Standing::Proved(Firecracker));
        // Another engine or host.
        records.push((
            Firecracker,
            Record {
                holds_for: "another".to_owned(),
                ..record(&found, Firecracker, true, 20)
            },
        ));
        assert_eq!(see(&records), Standing::Open(Firecracker));
    }

    #[test]
    fn a_failure_is_tried_again_with_more_time_after_a_boot_and_for_who_insists() {
        use EngineKind::Firecracker;
        let auto = Candidates::for_tests(EngineChoice::Auto, Kvm::Hardware, false, true);
        let failed = record(&auto, Firecracker, false, 20);
        let see = |found: &Candidates, record: &Record| {
            look(found, |_| Some(record.clone()), &[]).unwrap()
        };
        assert!(matches!(
            see(&auto, &failed),
            Standing::Failed(Firecracker, _)
        ));
        let shorter = record(&auto, Firecracker, false, 19);
        let before = Record {
            booted: "an earlier boot".to_owned(),
            ..failed.clone()
        };
        for record in [shorter, before] {
            assert_eq!(see(&auto, &record), Standing::Open(Firecracker));
        }
        let forced = Candidates::for_tests(EngineChoice::Firecracker, Kvm::NotHardware, true, true);
        assert_eq!(see(&forced, &failed), Standing::Open(Firecracker));
        let works = record(&forced, Firecracker, true, 20);
        assert_eq!(see(&forced, &works), Standing::Proved(Firecracker));
    }

    #[test]
    fn an_engine_that_is_not_there_is_passed_over() {
        let found = Candidates::for_tests(EngineChoice::Auto, Kvm::Hardware, true, true);
        let standing = look(&found, |_| None, &[EngineKind::Firecracker]).unwrap();
        assert_eq!(standing, Standing::Open(EngineKind::QemuKvm));
    }
}
