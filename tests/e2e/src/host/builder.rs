//! A host being put together.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use super::Host;
use super::places::{binary, hashes, images, target};
use super::trees::{copy_program, copy_tree, give, link_tree, mount_ext4, size_of};
use crate::api::Api;
use crate::range::RunRange;
use crate::skip::skip;
use crate::world::{Wiring, World};

/// How the names of a range's homes begin.
pub(crate) fn home_prefix(range: &RunRange) -> String {
    format!("vm0-e2e-home-{}-", range.number)
}

/// Removes the homes and logs that killed tests left: whoever holds a range is the only one with such names.
pub(crate) fn sweep(homes: &Path, prefix: &str) {
    for entry in fs::read_dir(homes).expect("our directory").flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            // A log is a file, a home a directory; one of the two calls fits.
            let _ = fs::remove_dir_all(entry.path());
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A host being put together.
pub struct HostBuilder {
    name: String,
    group: String,
    profile: String,
    warm: (u32, u32),
    sandbox: Vec<(&'static str, String)>,
    options: Vec<(&'static str, String)>,
    environment: Vec<(String, String)>,
    source: Vec<String>,
    owner: Option<u32>,
    own_file_system: Option<u64>,
    range: Option<Arc<RunRange>>,
    wiring: Option<Wiring>,
}

impl Default for HostBuilder {
    fn default() -> Self {
        Self {
            name: "e2e".to_owned(),
            group: "vm0/e2e".to_owned(),
            profile: "vm0/small".to_owned(),
            warm: (0, 0),
            sandbox: Vec::new(),
            options: Vec::new(),
            environment: vec![("USE_MOCK_CLAUDE".to_owned(), "true".to_owned())],
            source: vec!["--local".to_owned()],
            owner: None,
            own_file_system: None,
            range: None,
            wiring: None,
        }
    }
}

impl HostBuilder {
    /// The profile jobs run with unless they say otherwise; `vm0/small` if not called. Its image must be built.
    pub fn profile(mut self, profile: &str) -> Self {
        self.profile = profile.to_owned();
        self
    }

    /// The runner's name, for hosts with several.
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// The group of jobs it takes; `vm0/e2e` if not called.
    pub fn group(mut self, group: &str) -> Self {
        self.group = group.to_owned();
        self
    }

    /// Marks of the warm pool; none is kept warm if not called.
    pub fn warm(mut self, low: u32, high: u32) -> Self {
        self.warm = (low, high);
        self
    }

    /// A key of `sandbox:` in runner.yaml.
    pub fn sandbox(mut self, key: &'static str, value: impl ToString) -> Self {
        self.sandbox.push((key, value.to_string()));
        self
    }

    /// A top-level key of runner.yaml.
    pub fn option(mut self, key: &'static str, value: impl ToString) -> Self {
        self.options.push((key, value.to_string()));
        self
    }

    /// A variable of the daemon's environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs of this Web API instead of jobs of the local queue.
    pub fn api(mut self, api: &Api) -> Self {
        self.source = api.runner_arguments(Api::URL);
        self.group(Api::GROUP)
    }

    /// The same over TLS, with a certificate that the world's authority has signed.
    pub fn api_over_tls(mut self, api: &Api, world: &World) -> Self {
        self.source = api.runner_arguments(Api::SECURE_URL);
        let trusted = world.wiring().trusted;
        self.environment
            .push(("SSL_CERT_FILE".to_owned(), trusted.display().to_string()));
        self.group(Api::GROUP)
    }

    /// The real agent CLI instead of the mock.
    pub fn real_agent(mut self) -> Self {
        self.environment
            .retain(|(name, _)| name != "USE_MOCK_CLAUDE");
        self
    }

    /// Gives the home to a user who is not root.
    pub fn owned_by(mut self, uid: u32) -> Self {
        self.owner = Some(uid);
        self
    }

    /// The home on a file system of its own with this much room beside the images, MiB. Only in a mount namespace of
    /// the test's own: see [`crate::in_own_mounts`].
    pub fn own_file_system(mut self, room_mb: u64) -> Self {
        self.own_file_system = Some(room_mb);
        self
    }

    /// The same machine as `other`: its run directory, so its slots and its budget.
    pub fn beside(mut self, other: &Host) -> Self {
        self.range = Some(other.range.clone());
        self
    }

    /// The runner in the host's namespace of this world, so that its jobs reach the world's servers.
    pub fn world(mut self, world: &World) -> Self {
        self.wiring = Some(world.wiring());
        self
    }

    /// Makes the home and starts the runner. `None`, with the reason reported, where that is impossible.
    pub fn start(self) -> Option<Host> {
        let host = self.prepare()?;
        host.start_runner();
        Some(host)
    }

    /// Makes the home without starting a runner.
    pub fn prepare(self) -> Option<Host> {
        if !rustix::process::geteuid().is_root() {
            skip("it starts a runner, which needs root");
            return None;
        }
        if !binary().exists() {
            skip(&format!(
                "{} is not built (scripts/build.sh)",
                binary().display()
            ));
            return None;
        }
        if self.profile != "vm0/small" && std::env::var_os("VM0_TEST_SLOW").is_none() {
            skip(&format!(
                "it needs the image of {}, which only the slow tier builds",
                self.profile
            ));
            return None;
        }
        static SMALL: OnceLock<Option<(String, String)>> = OnceLock::new();
        let found = if self.profile == "vm0/small" {
            SMALL.get_or_init(|| hashes("vm0/small")).clone()
        } else {
            hashes(&self.profile)
        };
        let Some((rootfs, snapshot)) = found else {
            let images = images();
            skip(&format!(
                "the image of {} is not built in {}",
                self.profile,
                images.display()
            ));
            return None;
        };
        let homes = match self.owner {
            None => target().join("test-homes"),
            // Where a user who is not root can get at it, whoever owns the checkout.
            Some(_) => PathBuf::from("/var/tmp"),
        };
        fs::create_dir_all(&homes).expect("the target directory can be written");
        let range = self.range.clone().unwrap_or_else(|| {
            let range = RunRange::take();
            sweep(&homes, &home_prefix(&range));
            Arc::new(range)
        });
        let home = tempfile::Builder::new()
            .prefix(&home_prefix(&range))
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(&homes)
            .expect("a home can be made");
        let image = images().join("images").join(&rootfs);
        if let Some(room_mb) = self.own_file_system {
            // ext4's own tables take a few more.
            let proxy = size_of(&images().join("proxy"));
            let size = size_of(&image) + proxy + ((room_mb + 40) << 20);
            mount_ext4(home.path(), size);
        }
        let linked = home.path().join("images").join(&rootfs);
        // A hard link would give the shared files away, or cannot cross file systems.
        if self.owner.is_some() || self.own_file_system.is_some() {
            copy_tree(&image, &linked);
        } else {
            link_tree(&image, &linked);
        }
        // The proxy and the authority that the image trusts, as `runner setup` made them.
        for part in ["ca", "proxy"] {
            let (from, to) = (images().join(part), home.path().join(part));
            if self.owner.is_some() || self.own_file_system.is_some() {
                copy_tree(&from, &to);
            } else {
                link_tree(&from, &to);
            }
        }
        let mut runs = binary();
        if self.owner.is_some() {
            let directory = home.path().join("bin").join(&self.name);
            fs::create_dir_all(&directory).expect("a home can be filled");
            let copy = directory.join("runner");
            copy_program(&runs, &copy);
            runs = copy;
        }
        let queue = home.path().join("groups").join(&self.group);
        let runner = home.path().join("runners").join(&self.name);
        for directory in [&queue, &runner] {
            fs::create_dir_all(directory).expect("a home can be filled");
            fs::set_permissions(directory, fs::Permissions::from_mode(0o700))
                .expect("our directory");
        }
        let config = runner.join("runner.yaml");
        fs::write(&config, self.yaml(&rootfs, &snapshot)).expect("a home can be filled");
        if let Some(uid) = self.owner {
            give(home.path(), uid);
        }
        Some(Host {
            range,
            home,
            group: self.group,
            profile: self.profile,
            config,
            binary: runs,
            environment: self.environment,
            source: self.source,
            own_file_system: self.own_file_system.is_some(),
            wiring: self.wiring,
            daemon: Mutex::new(None),
            finished: false,
        })
    }

    fn yaml(&self, rootfs: &str, snapshot: &str) -> String {
        let small = self.profile == "vm0/small";
        let (vcpu, memory, disk) = if small {
            (1, 256, 1024)
        } else {
            (2, 2048, 8192)
        };
        let mut yaml = format!("name: {}\ngroup: {}\n", self.name, self.group);
        for (key, value) in &self.options {
            yaml += &format!("{key}: {value}\n");
        }
        if let Some(wiring) = &self.wiring {
            let trusted = wiring.trusted.display();
            yaml += &format!("network:\n  ssl_verify_upstream_trusted_ca: {trusted}\n");
        }
        if !self.sandbox.is_empty() {
            yaml += "sandbox:\n";
        }
        for (key, value) in &self.sandbox {
            yaml += &format!("  {key}: {value}\n");
        }
        yaml + &format!(
            "profiles:\n  {}:\n    rootfs_hash: {rootfs}\n    snapshot_hash: {snapshot}\n    vcpu: {vcpu}\n    \
             memory_mb: {memory}\n    disk_mb: {disk}\n    flavour: {}\n    warm: {{low: {}, high: {}}}\n",
            self.profile,
            if small { "small" } else { "full" },
            self.warm.0,
            self.warm.1,
        )
    }
}
