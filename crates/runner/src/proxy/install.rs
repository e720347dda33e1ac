//! mitmproxy and our addon on this host: a virtual environment of pinned packages, made by `runner setup`.
//!
//! `proxy/<hash>/` holds `venv/` and `addon/`; the hash covers what is pinned, the addon and the Python it was made for. It
//! is built beside and renamed when it is complete, like an image.

use std::path::{Path, PathBuf};

use host::fs::{Dir, LockKind};

use super::embedded::PROXY_FILES;
use crate::home::{Home, rel};
use crate::image::{ImageError, Steps, Tool, sha256};

/// Oldest Python that runs it.
pub(crate) const OLDEST: (u32, u32) = (3, 11);
/// Where everything lies in the home.
const VENV: &str = "venv";
const ADDON: &str = "addon";
/// Which one is current, written last.
const CURRENT: &str = "current";

/// One embedded file of the addon's package.
#[derive(Debug)]
pub(crate) struct ProxyFile {
    /// Its path in the package.
    pub(crate) path: &'static str,
    /// Its content.
    pub(crate) bytes: &'static [u8],
}

/// Whether this host's Python can make virtual environments.
pub(crate) fn python_is_ready() -> bool {
    let check = std::process::Command::new("/usr/bin/python3")
        .args(["-I", "-c", "import ensurepip, venv"])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status();
    check.is_ok_and(|status| status.success())
}

/// Version of this host's Python, major and minor.
pub(crate) fn python_version() -> Option<(u32, u32)> {
    let output = std::process::Command::new("/usr/bin/python3")
        .args(["-I", "-c", SAY_VERSION])
        .stdin(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .output()
        .ok()?;
    numbers(&String::from_utf8_lossy(&output.stdout))
}

/// Prints a version such as `3.11`.
const SAY_VERSION: &str = "import sys; print('%d.%d' % sys.version_info[:2])";

fn numbers(version: &str) -> Option<(u32, u32)> {
    let (major, minor) = version.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The directory to show the proxy, which holds `venv` and `addon`; nothing where `runner setup` has not made it, or for
/// another runner.
pub(crate) fn installed(home: &Home) -> Result<Option<Dir>, ImageError> {
    let proxy = match home.dir().open_dir(rel::PROXY) {
        Err(error) if error.is_not_found() => return Ok(None),
        other => other?,
    };
    let name = match proxy.read_bounded(CURRENT, 256) {
        Err(error) if error.is_not_found() => return Ok(None),
        other => other?,
    };
    let name = String::from_utf8_lossy(&name);
    let name = name.trim();
    // A runner brings its addon; one of another version would not understand it.
    if !name.starts_with(&content()) {
        return Ok(None);
    }
    match proxy.open_dir(name) {
        Ok(directory) => Ok(Some(directory)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Makes it where it is missing. Needs root; `from` holds wheels to use instead of the package index.
pub(crate) async fn ensure(
    home: &Home,
    from: Option<&Path>,
    steps: &Steps,
) -> Result<(), ImageError> {
    let python = python(steps).await?;
    let name = format!("{}-{python}", content());
    let proxy = home.ensure_dir(rel::PROXY)?;
    let _lock = proxy.lock("lock", LockKind::Exclusive, 0o600)?;
    if proxy.open_dir(&name).is_err() {
        make(home, &proxy, &name, from, steps).await?;
    }
    proxy.write_atomic(CURRENT, 0o644, name.as_bytes())?;
    sweep(&proxy, &name);
    Ok(())
}

async fn make(
    home: &Home,
    proxy: &Dir,
    name: &str,
    from: Option<&Path>,
    steps: &Steps,
) -> Result<(), ImageError> {
    let staging = format!(".staging-{name}");
    proxy.remove_tree(&staging)?;
    proxy.create_dir(&staging, 0o755)?;
    let root = home.at(rel::PROXY).join(&staging);
    write_files(&root.join(ADDON))?;

    steps.begin("installing the proxy (mitmproxy, pinned)");
    let venv = root.join(VENV);
    Tool::new("python3")
        .args(["-I", "-m", "venv"])
        .arg(&venv)
        .run("making the proxy's virtual environment", steps)
        .await?;
    let mut pip = python_of(&venv)
        .args([
            "-I",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ])
        .args([
            "--no-deps",
            "--only-binary",
            ":all:",
            "--require-hashes",
            "--requirement",
        ])
        .arg(root.join(ADDON).join("requirements.txt"));
    if let Some(from) = from {
        pip = pip.arg("--no-index").arg("--find-links").arg(from);
    }
    pip.run("installing the proxy", steps).await?;
    // Nothing can be compiled later: the proxy cannot write here.
    python_of(&venv)
        .args(["-I", "-m", "compileall", "-q"])
        .arg(root.join(ADDON))
        .run("compiling the proxy's addon", steps)
        .await?;
    // pip is no part of what runs. The rest the proxy's own user has to read, whatever root's umask is.
    Tool::new("sh")
        .args(["-c", "rm -rf \"$1\"/lib/python*/site-packages/pip \"$1\"/lib/python*/site-packages/pip-*; chmod -R go+rX \"$1\" \"$2\"", "sh"])
        .arg(&venv)
        .arg(root.join(ADDON))
        .run("finishing the proxy", steps)
        .await?;
    steps.end();
    proxy.rename(&staging, proxy, name)?;
    proxy.sync()?;
    Ok(())
}

/// The environment's own Python.
fn python_of(venv: &Path) -> Tool {
    Tool::new("sh")
        .args(["-c", "exec \"$@\"", "sh"])
        .arg(venv.join("bin/python"))
}

/// Version of the host's Python, such as `3.11`.
async fn python(steps: &Steps) -> Result<String, ImageError> {
    let version = Tool::new("python3")
        .args(["-I", "-c", SAY_VERSION])
        .run("asking Python for its version", steps)
        .await?;
    let version = version.trim().to_owned();
    match numbers(&version) {
        Some(numbers) if numbers >= OLDEST => Ok(version),
        _ => Err(ImageError::OldPython { version }),
    }
}

/// What identifies pins and addon of this runner.
fn content() -> String {
    let mut text = String::new();
    for file in PROXY_FILES {
        text.push_str(&format!("{} {}\n", file.path, sha256(file.bytes)));
    }
    sha256(text.as_bytes()).chars().take(16).collect()
}

fn write_files(target: &Path) -> Result<(), ImageError> {
    for file in PROXY_FILES {
        let path = target.join(file.path.strip_prefix("src/").unwrap_or(file.path));
        let parent = path.parent().unwrap_or(target);
        std::fs::create_dir_all(parent).map_err(ImageError::io("create", parent))?;
        std::fs::write(&path, file.bytes).map_err(ImageError::io("write", &path))?;
    }
    Ok(())
}

/// Removes what other versions left, but not what a proxy may be running from: an older runner's goes when nobody has
/// started it for a day.
fn sweep(proxy: &Dir, current: &str) {
    const DAY: std::time::Duration = std::time::Duration::from_secs(24 * 3600);
    let Ok(entries) = proxy.list() else {
        return;
    };
    for entry in entries {
        let path = PathBuf::from(&entry.name);
        let old = || {
            let meta = proxy.metadata(&path).ok().flatten()?;
            meta.modified().ok()?.elapsed().ok()
        };
        let is_version = entry.name.to_str().is_some_and(|name| name.contains('-'));
        if is_version && entry.name.to_str() != Some(current) && old().is_some_and(|age| age > DAY)
        {
            let _ = proxy.remove_tree(&entry.name);
        }
    }
}
