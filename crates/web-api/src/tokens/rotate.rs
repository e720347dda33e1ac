//! Replacing the master key: every key is wrapped anew, while replicas that were given both master keys go on.

use async_nats::jetstream::kv::Entry;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::keyring::{KeyringError, Record};
use super::master::MasterKey;
use crate::engine::{Bucket, Swap};

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rotated {
    /// Keys that are now wrapped by the new master key.
    pub rewrapped: usize,
    /// Keys that were before: made by a replica that has it, or by an earlier try.
    pub already: usize,
}

enum Step {
    Already,
    Anew(Record),
}

fn step(old: &MasterKey, new: &MasterKey, name: &str, value: &[u8]) -> Result<Step, KeyringError> {
    let record = Record::read(value)?;
    let foreign = || KeyringError::Foreign(name.to_owned());
    let wrapped = STANDARD.decode(&record.wrapped).map_err(|_| foreign())?;
    if new.unwrap(name, &wrapped).is_some() {
        return Ok(Step::Already);
    }
    let key = old.unwrap(name, &wrapped).ok_or_else(foreign)?;
    let wrapped = new.wrap(name, &key).ok_or(KeyringError::Crypto)?;
    Ok(Step::Anew(Record {
        wrapped: STANDARD.encode(wrapped),
        ..record
    }))
}

/// Wraps every key that `old` wrapped by `new`. Each is replaced by one compare-and-set, so a rotation that is killed
/// leaves some keys wrapped by either, which replicas with both master keys understand, and is finished by the next one.
/// Changes nothing when one key is wrapped by neither.
pub async fn rotate(
    bucket: &Bucket,
    old: &MasterKey,
    new: &MasterKey,
) -> Result<Rotated, KeyringError> {
    let mut found = Vec::new();
    let list = |entry: &Entry| {
        found.push((entry.key.clone(), entry.value.clone()));
        Ok(())
    };
    bucket.scan(list).await?;
    for (name, value) in &found {
        step(old, new, name, value)?;
    }
    let mut rotated = Rotated::default();
    for (name, _) in found {
        // Whoever wrote in between did this very thing, or removed the key.
        while let Some(found) = bucket.get(&name).await? {
            let Step::Anew(record) = step(old, new, &name, &found.value)? else {
                rotated.already = rotated.already.saturating_add(1);
                break;
            };
            let swap = bucket.update(&name, record.bytes()?, found.revision);
            if let Swap::Done(_) = swap.await? {
                rotated.rewrapped = rotated.rewrapped.saturating_add(1);
                break;
            }
        }
    }
    Ok(rotated)
}
