//! The images of the configuration's profiles: held, verified and opened.

use std::collections::BTreeMap;
use std::sync::Arc;

use host::launcher::Launcher;
use sandbox::{Engine, EngineKind, IoLimits, Template};

use crate::config::Config;
use crate::context::CliError;
use crate::engine;
use crate::home::Home;
use crate::image::{InUse, Store};
use crate::names::ProfileName;

/// Keeps `gc` and builds from what the configuration names.
pub(super) fn hold_images(home: &Arc<Home>, config: &Config) -> Result<Vec<InUse>, CliError> {
    let store = Store::open(Arc::clone(home))?;
    let held = config.profiles.iter().map(|(name, profile)| {
        let held = store.hold(&profile.rootfs_hash, &profile.snapshot_hash);
        held.map_err(|error| CliError::failed(format!("profile {name}: {error}")))
    });
    held.collect()
}

/// Verifies and opens the snapshot of every profile.
pub(super) async fn open_profiles(
    config: &Config,
    home: &Arc<Home>,
    launcher: &Launcher,
) -> Result<(BTreeMap<ProfileName, Arc<dyn Template>>, EngineKind), CliError> {
    let store = Store::open(Arc::clone(home))?;
    let mut engines: Vec<(EngineKind, Arc<dyn Engine>)> = Vec::new();
    let mut templates = BTreeMap::new();
    for (name, profile) in &config.profiles {
        let spec = profile.shape().named(name);
        let stored = store
            .snapshot(&profile.rootfs_hash, &profile.snapshot_hash)
            .map_err(|error| {
                CliError::failed(format!("profile {name}: {error}"))
                    .with_hint(format!("sudo runner build --profile {spec}"))
            })?;
        let kind = stored.manifest.engine;
        if !engine::is_chosen(config.engine, kind) {
            let wanted = config.engine.name();
            return Err(CliError::failed(format!(
                "profile {name} was built for {}, and the engine is to be {wanted}",
                engine::describe(kind)
            ))
            .with_hint(format!(
                "sudo runner build --engine {wanted} --profile {spec}, and write the configuration anew; or use `engine: auto`"
            )));
        }
        let shape = sandbox::Shape {
            vcpu: profile.vcpu,
            memory_mb: profile.memory_mb,
            disk_mb: profile.disk_mb,
        };
        if shape != stored.shape {
            return Err(CliError::failed(format!(
                "profile {name}: its snapshot is of a VM of another size"
            ))
            .with_hint(format!(
                "build it with this size, or write the configuration anew: sudo runner build --profile {spec}"
            )));
        }
        let known = engines.iter().find(|(k, _)| *k == kind);
        let engine = match known {
            Some((_, engine)) => Arc::clone(engine),
            None => {
                let engine = engine::of_snapshot(kind, launcher.clone(), home)?;
                engines.push((kind, Arc::clone(&engine)));
                engine
            }
        };
        let template = engine
            .open(stored.image, shape, &stored.directory, &stored.outcome)
            .await
            .map_err(|error| CliError::failed(format!("profile {name}: {error}")))?;
        let limits = profile.limits;
        let template = if limits == IoLimits::default() {
            template
        } else {
            let limited = template.limited(limits);
            limited.map_err(|error| CliError::failed(format!("profile {name}: {error}")))?
        };
        tracing::info!(profile = %name, engine = ?kind, "opened");
        templates.insert(name.clone(), template);
    }
    let kind = engines.first().map(|(kind, _)| *kind);
    let kind = kind.ok_or_else(|| CliError::failed("the configuration names no profile"))?;
    if engines.iter().any(|(kind, _)| *kind == EngineKind::QemuTcg) {
        tracing::warn!("VMs are emulated in software on this host, 10 to 30 times slower");
    }
    Ok((templates, kind))
}
