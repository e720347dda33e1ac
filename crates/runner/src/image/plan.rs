//! What a build would make, decided before anything is made: every input of the image's address.

use super::ImageError;
use super::apt::{Apt, Package};
use super::build::space_mb;
use super::guest::{GuestBinaries, GuestPaths};
use super::manifest::{self, FORMAT};
use super::progress::Steps;
use super::sets::Wanted;
use super::sources::{Release, Sources};
use super::store::Store;
use super::{kernel, modules, rootfs};
use crate::names::ImageHash;
use crate::profile::Profile;
use crate::proxy::Authority;

/// Name of the image's input that says which certificate authority it trusts.
pub(super) const AUTHORITY_INPUT: &str = "proxy authority";

/// What the person asked for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// Size and flavour.
    pub(crate) profile: Profile,
    /// Archives to use instead of the host's: URLs or one-line entries.
    pub(crate) mirrors: Vec<String>,
    /// Release to use instead of the host's.
    pub(crate) suite: Option<String>,
    /// Guest binaries to use instead of the embedded ones.
    pub(crate) guest: GuestPaths,
    /// The engines it is for.
    pub(crate) engines: Wanted,
}

/// Everything that decides what the image will be.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(super) request: Request,
    pub(super) suite: String,
    pub(super) arch: &'static str,
    pub(super) guest: GuestBinaries,
    pub(super) apt: Apt,
    pub(super) kernel: Package,
    pub(super) authority: Authority,
    pub(super) inputs: Vec<(String, String)>,
    hash: ImageHash,
}

impl Plan {
    /// Reads what is needed; the network is used only if no package list was ever fetched, or `refresh` says so.
    pub(crate) async fn make(
        store: &Store,
        request: Request,
        refresh: bool,
        steps: &Steps,
    ) -> Result<Self, ImageError> {
        let flavour = request.profile.flavour;
        if flavour.packages().is_empty() {
            return Err(ImageError::NoFlavour(flavour.name()));
        }
        let guest = GuestBinaries::load(&request.guest)?;
        let authority = Authority::ensure(store.home(), steps).await?;
        let release = Release::of_host()?;
        let arch = debian_architecture();
        let sources = Sources::choose(&release, &request.mirrors, request.suite.as_deref())?;
        let text = sources.to_deb822();
        let key = manifest::sha256(text.as_bytes());
        let apt = Apt::new(store.apt_directory(&key), &sources, arch)?;
        let kernel = match apt.kernel() {
            Some(kernel) if !refresh => kernel,
            _ => {
                // apt allows one at a time in a directory.
                let _lock = store
                    .lock(
                        "package lists",
                        &content_address(&[("sources".to_owned(), text)])?,
                        steps,
                    )
                    .await?;
                steps.begin("fetching the package lists");
                let fetched = apt.refresh(steps).await;
                fetched.map_err(|error| store.explain(error, space_mb(&request)))?;
                let kernel = kernel::resolve(&apt, release.distribution, arch, steps).await?;
                apt.keep_kernel(&kernel)?;
                steps.end();
                kernel
            }
        };

        let mut inputs = vec![
            ("format".to_owned(), FORMAT.to_string()),
            (
                "distribution".to_owned(),
                release.distribution.name().to_owned(),
            ),
            ("suite".to_owned(), sources.suite.clone()),
            ("architecture".to_owned(), arch.to_owned()),
            ("sources".to_owned(), key),
            ("flavour".to_owned(), flavour.name().to_owned()),
            (
                "kernel".to_owned(),
                format!("{}={}", kernel.name, kernel.version),
            ),
            (AUTHORITY_INPUT.to_owned(), authority.fingerprint()),
        ];
        // The distribution's kernel stands above in any case: it is what moves the address with the distribution's updates.
        if request.engines.qemu {
            inputs.push(("modules".to_owned(), modules::WANTED.join(" ")));
            inputs.push(("erofs".to_owned(), rootfs::EROFS_OPTIONS.join(" ")));
        }
        if let Some(firecracker) = &request.engines.firecracker {
            let pins = firecracker.pins();
            inputs.push((
                "firecracker kernel".to_owned(),
                format!("{} {}", pins.kernel, pins.kernel_sha256),
            ));
            inputs.push(("squashfs".to_owned(), rootfs::SQUASHFS_OPTIONS.join(" ")));
        }
        let data = flavour
            .files()
            .map(|file| (format!("file {}", file.path), manifest::sha256(file.bytes)));
        inputs.extend(data);
        let binaries = guest
            .all()
            .into_iter()
            .map(|(name, bytes)| (format!("binary {name}"), manifest::sha256(bytes)));
        inputs.extend(binaries);
        let hash = content_address(&inputs)?;
        Ok(Self {
            request,
            suite: sources.suite,
            arch,
            guest,
            apt,
            kernel,
            authority,
            inputs,
            hash,
        })
    }

    /// The image's address.
    pub(crate) fn rootfs_hash(&self) -> &ImageHash {
        &self.hash
    }

    /// Whether its package lists are fresh enough to build from.
    pub(crate) fn is_fresh(&self) -> bool {
        self.apt.is_fresh()
    }
}

/// The address of inputs, as a name.
pub(super) fn content_address(inputs: &[(String, String)]) -> Result<ImageHash, ImageError> {
    let text = manifest::address(inputs);
    // It is 64 hex digits by construction; a wrong one would be a fault of ours.
    text.parse().map_err(|_| ImageError::Missing {
        what: "image",
        hash: text,
    })
}

/// dpkg's name of this machine's architecture.
fn debian_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
