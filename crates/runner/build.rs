//! Embeds what the runner carries with it: the guest binaries, the image flavours and the commit it was built from.
//!
//! `GUEST_INIT_PATH`, `GUEST_AGENT_PATH` and `GUEST_MOCK_CLAUDE_PATH` name the guest binaries (`scripts/build.sh` builds
//! them and sets all three). Without them the runner still builds; `runner build` then asks for `--guest-init` and so on.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let out = PathBuf::from(
        env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("OUT_DIR is not set"))?,
    );
    let mut code = String::new();
    for (variable, constant) in [
        ("GUEST_INIT_PATH", "GUEST_INIT"),
        ("GUEST_AGENT_PATH", "GUEST_AGENT"),
        ("GUEST_MOCK_CLAUDE_PATH", "GUEST_MOCK_CLAUDE"),
    ] {
        println!("cargo::rerun-if-env-changed={variable}");
        code += &guest_binary(variable, constant)?;
    }
    let image = Path::new("image");
    code += &table("FLAVOUR_FILES", "FlavourFile", image, &below(image)?)?;
    fs::write(out.join("embedded.rs"), code)?;
    let proxy = Path::new("mitm-addon");
    let mut files = Vec::new();
    collect(&proxy.join("src"), &mut files)?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "py"));
    files.sort();
    files.push(proxy.join("requirements.txt"));
    let code = table("PROXY_FILES", "ProxyFile", proxy, &files)?;
    fs::write(out.join("proxy.rs"), code)?;
    let commit = commit();
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    println!("cargo::rustc-env=VM0_RUNNER_COMMIT={commit}");
    println!("cargo::rustc-env=VM0_RUNNER_VERSION={version} (commit {commit})");
    Ok(())
}

fn guest_binary(variable: &str, constant: &str) -> io::Result<String> {
    let Some(path) = env::var_os(variable).filter(|value| !value.is_empty()) else {
        return Ok(format!(
            "pub(crate) const {constant}: Option<&[u8]> = None;\n"
        ));
    };
    let path = fs::canonicalize(&path)
        .map_err(|error| io::Error::other(format!("{variable}={}: {error}", path.display())))?;
    println!("cargo::rerun-if-changed={}", path.display());
    Ok(format!(
        "pub(crate) const {constant}: Option<&[u8]> = Some(include_bytes!({path:?}));\n"
    ))
}

/// Every file in the directories below `root`, sorted.
fn below(root: &Path) -> io::Result<Vec<PathBuf>> {
    println!("cargo::rerun-if-changed={}", root.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, &mut files)?;
        }
    }
    files.sort();
    Ok(files)
}

/// Files with their paths relative to `root`, as one table.
fn table(name: &str, kind: &str, root: &Path, files: &[PathBuf]) -> io::Result<String> {
    let mut code = format!("pub(crate) const {name}: &[{kind}] = &[\n");
    for file in files {
        println!("cargo::rerun-if-changed={}", file.display());
        let absolute = fs::canonicalize(file)?;
        let relative = file.strip_prefix(root).map_err(io::Error::other)?;
        writeln!(
            code,
            "    {kind} {{ path: {relative:?}, bytes: include_bytes!({absolute:?}) }},"
        )
        .map_err(io::Error::other)?;
    }
    code += "];\n";
    Ok(code)
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    println!("cargo::rerun-if-changed={}", directory.display());
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// `VM0_RUNNER_COMMIT`, else what git says of the working tree, else `unknown` (a source archive).
fn commit() -> String {
    println!("cargo::rerun-if-env-changed=VM0_RUNNER_COMMIT");
    if let Ok(given) = env::var("VM0_RUNNER_COMMIT") {
        return given;
    }
    // The log of HEAD changes with every commit and checkout, also in a linked worktree.
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", file]) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned())
}

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}
