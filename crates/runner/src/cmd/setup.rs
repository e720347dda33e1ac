//! Installs what the runner needs on this host.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use sandbox_qemu::Kvm;
use serde::Serialize;

use crate::config::EngineChoice;
use crate::context::{CliError, Context, block_on};
use crate::firecracker::{self, Pins, Source};
use crate::home::Home;
use crate::image::{Steps, Tool};
use crate::profile::{Flavour, ProfileSpec};
use crate::proxy::{Authority, install};

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  sudo runner setup\n  sudo runner setup --profile vm0/default\n  runner setup --check\n  \
    sudo runner setup --from /media/files\n  sudo runner setup --engine firecracker --from https://mirror.example.com/firecracker\n\n\
    --check exits with 1 if something is missing: packages, the proxy, its certificate authority, or Firecracker where it is \
    wanted. A directory given with --from needs the listed packages and what they depend on as .deb files, for \
    example from `apt-get download`, the proxy's wheels, and Firecracker's two files where that is wanted (docs/operations.md). A URL given with --from is a mirror of Firecracker's files alone."
)]
pub(crate) struct Args {
    /// Only list what is missing
    #[arg(long)]
    check: bool,
    /// Take everything from this directory, without a network; or Firecracker's files from this mirror
    #[arg(long, value_name = "DIR|URL", conflicts_with = "check")]
    from: Option<Source>,
    /// Engine to prepare; auto fetches Firecracker only where this host's KVM has hardware support
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
    /// Firecracker of your own build: its hashes, as JSON, to use instead of those this runner pins
    #[arg(long, value_name = "FILE", requires = "from")]
    firecracker_pins: Option<PathBuf>,
    /// Also install what building this profile's image needs; may be repeated
    #[arg(long = "profile", value_name = "ORG/NAME")]
    profiles: Vec<ProfileSpec>,
    /// Make a new certificate authority for the proxy; profiles have to be built again
    #[arg(long, conflicts_with = "check")]
    rotate_ca: bool,
    /// Accepted for scripts; setup never asks
    #[arg(long, short)]
    yes: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A distribution package, and a program by which its presence is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Requirement {
    /// Package to install.
    pub(crate) package: &'static str,
    /// Program that must be there.
    pub(crate) program: &'static str,
}

/// Everything a runner's host needs, and what building the images of `flavours`, perhaps for Firecracker too, needs beside.
/// Names are the same on Debian and Ubuntu.
pub(crate) fn requirements(flavours: &[Flavour], firecracker: bool) -> Vec<Requirement> {
    let qemu = match std::env::consts::ARCH {
        "aarch64" => Requirement {
            package: "qemu-system-arm",
            program: "qemu-system-aarch64",
        },
        _ => Requirement {
            package: "qemu-system-x86",
            program: "qemu-system-x86_64",
        },
    };
    let tools = crate::image::build::TOOLS
        .iter()
        .chain(flavours.iter().flat_map(|flavour| flavour.tools()))
        .chain(match firecracker {
            true => crate::image::build::FIRECRACKER_TOOLS,
            false => &[],
        })
        .map(|(program, package)| Requirement { package, program });
    let nft = Requirement {
        package: "nftables",
        program: "nft",
    };
    let venv = Requirement {
        package: "python3-venv",
        program: PYTHON_VENV,
    };
    [qemu, nft, venv].into_iter().chain(tools).collect()
}

/// No program of its own, but what Debian leaves out of Python.
const PYTHON_VENV: &str = "python3 -m venv";

/// Those that are not there.
pub(crate) fn missing(flavours: &[Flavour], firecracker: bool) -> Vec<Requirement> {
    requirements(flavours, firecracker)
        .into_iter()
        .filter(|needed| match needed.program {
            PYTHON_VENV => !install::python_is_ready(),
            program => !Tool::exists(program),
        })
        .collect()
}

/// The package names of requirements, each once.
pub(crate) fn packages(missing: &[Requirement]) -> Vec<&'static str> {
    let mut names: Vec<_> = missing.iter().map(|needed| needed.package).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[derive(Serialize)]
struct Report<'a> {
    missing: &'a [Requirement],
    installed: &'a [&'static str],
    /// What is not in the home.
    unmade: &'a [Unmade],
    firecracker: Firecracker,
}

/// Something that setup makes in the home, and why it is to be made.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Unmade {
    what: &'static str,
    reason: String,
}

impl Unmade {
    /// What is not in this home; `None`: nobody has made that.
    fn of(home: Option<&Home>) -> Vec<Self> {
        let authority = home.map_or(Ok(false), |home| {
            let loaded = Authority::load(home).map_err(|error| error.to_string());
            loaded.map(|authority| authority.is_some())
        });
        let proxy = home.map_or(Ok(false), |home| {
            let installed = install::installed(home).map_err(|error| error.to_string());
            installed.map(|proxy| proxy.is_some())
        });
        let reason = |there, absent: &str| match there {
            Ok(true) => None,
            Ok(false) => Some(absent.to_owned()),
            Err(error) => Some(error),
        };
        let proxy = reason(
            proxy,
            "it is not installed for this home, or for a runner of another version",
        );
        let authority = reason(authority, "it has not been made for this home");
        [
            ("the proxy", proxy),
            ("the proxy's certificate authority", authority),
        ]
        .into_iter()
        .filter_map(|(what, reason)| reason.map(|reason| Self { what, reason }))
        .collect()
    }
}

/// What became of Firecracker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "status")]
enum Firecracker {
    /// It is there, verified.
    Installed { version: String },
    /// It is wanted, and not there.
    Missing { reason: String },
    /// It is not wanted.
    Skipped { reason: String },
}

/// Why Firecracker is not fetched; nothing where it is wanted.
pub(crate) fn not_wanted(engine: EngineChoice, kvm: &Kvm) -> Option<String> {
    match (engine, kvm) {
        (EngineChoice::Firecracker, _) => None,
        (EngineChoice::Qemu, _) => Some("the engine is to be QEMU".to_owned()),
        (EngineChoice::Auto, _) if Pins::built_in().is_none() => {
            Some(format!("it has no release for {}", std::env::consts::ARCH))
        }
        (EngineChoice::Auto, Kvm::Hardware) => None,
        (EngineChoice::Auto, kvm) => Some(format!(
            "{kvm}, so it could not run here (--engine firecracker fetches it all the same)"
        )),
    }
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    // Nothing is ever asked; the option exists so that scripts can say what they mean.
    let _ = args.yes;
    let flavours: Vec<_> = args
        .profiles
        .iter()
        .map(|named| named.profile.flavour)
        .collect();
    let firecracker = not_wanted(args.engine, &Kvm::of_host()).is_none();
    let absent = missing(&flavours, firecracker);
    if args.check {
        return check(&args, &absent, context);
    }
    let wanted = packages(&absent);
    if !rustix::process::geteuid().is_root() {
        return Err(CliError::failed("installing packages and preparing the host needs root")
            .with_hint("run it as `sudo runner setup`; `runner setup --check` lists what is missing without it"));
    }
    let pins = args
        .firecracker_pins
        .as_deref()
        .map(Pins::read)
        .transpose()?;
    let directory = match &args.from {
        Some(Source::Directory(path)) => Some(path.as_path()),
        _ => None,
    };
    if !wanted.is_empty() {
        block_on(install(&wanted, directory))?;
        let left = packages(&missing(&flavours, firecracker));
        if !left.is_empty() {
            let failed = CliError::failed(format_args!(
                "still missing after the installation: {}",
                left.join(", ")
            ));
            return Err(match directory {
                Some(directory) => failed.with_hint(format_args!(
                    "put their .deb files, with what they depend on, into {}",
                    directory.display()
                )),
                None => failed,
            });
        }
    }
    prepare_run_dir()?;
    // The home is made now, so that it belongs to the person behind sudo.
    let home = context.home()?;
    let firecracker = block_on(async {
        let steps = Steps::new();
        steps.catch_signals()?;
        if args.rotate_ca {
            Authority::rotate(&home, &steps).await?;
            steps.note(
                "note: images trust the authority they were built with: build each profile again",
            );
        } else {
            Authority::ensure(&home, &steps).await?;
        }
        install::ensure(&home, directory, &steps).await?;
        fetch_firecracker(&args, pins, &home, &steps).await
    })?;
    if args.json {
        context.print_json(&Report {
            missing: &[],
            installed: &wanted,
            unmade: &[],
            firecracker,
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    if wanted.is_empty() {
        context.print_line("everything the runner needs is installed")?;
    } else {
        context.print_line(format_args!("installed {}", wanted.join(", ")))?;
    }
    match firecracker {
        Firecracker::Installed { version } => {
            context.print_line(format_args!("Firecracker {version} is installed"))?;
        }
        Firecracker::Missing { reason } | Firecracker::Skipped { reason } => {
            context.print_line(format_args!("Firecracker is not fetched: {reason}"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Lists what is missing.
fn check(args: &Args, absent: &[Requirement], context: &Context) -> Result<ExitCode, CliError> {
    // A home that nobody has made is not made by a look.
    let home = match context.home_path()?.exists() {
        true => Some(context.home()?),
        false => None,
    };
    let firecracker = match (not_wanted(args.engine, &Kvm::of_host()), &home) {
        (Some(reason), _) => Firecracker::Skipped { reason },
        (None, None) => Firecracker::Missing {
            reason: "Firecracker is not installed for this home".to_owned(),
        },
        (None, Some(home)) => match firecracker::find(home) {
            Ok(found) => Firecracker::Installed {
                version: found.version().to_owned(),
            },
            Err(error) => Firecracker::Missing {
                reason: error.to_string(),
            },
        },
    };
    let unmade = Unmade::of(home.as_ref());
    let complete = absent.is_empty()
        && unmade.is_empty()
        && !matches!(firecracker, Firecracker::Missing { .. });
    if args.json {
        context.print_json(&Report {
            missing: absent,
            installed: &[],
            unmade: &unmade,
            firecracker,
        })?;
    } else {
        for needed in absent {
            context.print_line(format_args!(
                "missing: {} ({})",
                needed.package, needed.program
            ))?;
        }
        for Unmade { what, reason } in &unmade {
            context.print_line(format_args!("missing: {what} ({reason})"))?;
        }
        if let Firecracker::Missing { reason } = firecracker {
            context.print_line(format_args!("missing: Firecracker ({reason})"))?;
        }
    }
    Ok(match complete {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

async fn fetch_firecracker(
    args: &Args,
    pins: Option<Pins>,
    home: &Home,
    steps: &Steps,
) -> Result<Firecracker, CliError> {
    if let Some(reason) = not_wanted(args.engine, &Kvm::of_host()) {
        return Ok(Firecracker::Skipped { reason });
    }
    let source = args.from.as_ref().unwrap_or(&Source::Upstream);
    let installed = firecracker::ensure(home, pins, source, steps).await?;
    Ok(Firecracker::Installed {
        version: installed.version().to_owned(),
    })
}

async fn install(packages: &[&str], from: Option<&Path>) -> Result<(), CliError> {
    let steps = Steps::new();
    steps.catch_signals()?;
    let apt = |program_args: &[&str]| {
        Tool::new("apt-get")
            .arg("-q")
            // Somebody else's apt may be running; five minutes are enough for any upgrade to end.
            .args(["-o", "DPkg::Lock::Timeout=300"])
            .args(program_args)
            .env("DEBIAN_FRONTEND", "noninteractive")
    };
    let install = ["install", "--yes", "--no-install-recommends"];
    if let Some(directory) = from {
        let files = debs(directory)?;
        steps.begin("installing packages from files");
        apt(&install)
            .args(files)
            .run("installing packages from files", &steps)
            .await?;
    } else {
        steps.begin("fetching the package lists");
        apt(&["update"])
            .run("fetching the package lists", &steps)
            .await?;
        steps.begin(&format!("installing {}", packages.join(", ")));
        apt(&install)
            .args(packages)
            .run("installing packages", &steps)
            .await?;
    }
    steps.end();
    Ok(())
}

/// The .deb files of a directory, as absolute paths (apt takes a bare name for a package's).
fn debs(directory: &Path) -> Result<Vec<PathBuf>, CliError> {
    let directory = std::fs::canonicalize(directory).map_err(|error| {
        CliError::failed(format_args!("cannot open {}: {error}", directory.display()))
    })?;
    let mut files: Vec<_> = std::fs::read_dir(&directory)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(CliError::failed(format_args!(
            "there is no .deb file in {}",
            directory.display()
        )));
    }
    Ok(files)
}

/// Where slots are locked; root's, closed to everybody for writing.
fn prepare_run_dir() -> Result<(), CliError> {
    use std::os::unix::fs::DirBuilderExt;
    let path = run_dir();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&path)
        .map_err(|error| {
            CliError::failed(format_args!("cannot create {}: {error}", path.display()))
        })
}

/// The launcher's run directory.
pub(crate) fn run_dir() -> PathBuf {
    std::env::var_os("VM0_RUNNER_RUN_DIR").map_or_else(
        || PathBuf::from(host::launcher::LauncherConfig::DEFAULT_RUN_DIR),
        PathBuf::from,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_named_once_each() {
        let all = requirements(&[], false);
        let names = packages(&all);
        assert!(names.contains(&"mmdebstrap") && names.contains(&"erofs-utils"));
        assert_eq!(
            names.iter().filter(|name| **name == "util-linux").count(),
            1
        );
        assert!(names.iter().any(|name| name.starts_with("qemu-system-")));
        // A third of a thousand packages, which only the full image is worth.
        assert!(!names.contains(&"npm"));
        assert!(packages(&requirements(&[Flavour::Full], false)).contains(&"npm"));
        assert!(!names.contains(&"squashfs-tools"));
        assert!(packages(&requirements(&[], true)).contains(&"squashfs-tools"));
    }

    #[test]
    fn firecracker_is_fetched_where_it_could_run_or_was_asked_for() {
        for kvm in [Kvm::Missing, Kvm::Denied("no".to_owned()), Kvm::NotHardware] {
            let reason = not_wanted(EngineChoice::Auto, &kvm).unwrap();
            assert!(reason.contains(&kvm.to_string()), "{reason}");
            assert_eq!(not_wanted(EngineChoice::Firecracker, &kvm), None);
        }
        assert_eq!(not_wanted(EngineChoice::Auto, &Kvm::Hardware), None);
        assert!(not_wanted(EngineChoice::Qemu, &Kvm::Hardware).is_some());
    }

    #[test]
    fn proxy_and_authority_are_missing_until_they_are_made() {
        let what = |home| -> Vec<_> {
            let unmade = Unmade::of(home).into_iter();
            unmade.map(|unmade| unmade.what).collect()
        };
        let (proxy, authority) = ("the proxy", "the proxy's certificate authority");
        assert_eq!(what(None), [proxy, authority]);
        let temp = tempfile::tempdir().unwrap();
        let home = Home::open_or_create(&temp.path().join("home")).unwrap();
        assert_eq!(what(Some(&home)), [proxy, authority]);
        home.ensure_dir("ca").unwrap();
        std::fs::write(home.at("ca/ca.pem"), "-----BEGIN CERTIFICATE-----\n").unwrap();
        assert_eq!(what(Some(&home)), [proxy]);
        // And no look makes a home.
        let context = Context::new(Some(temp.path().join("other")));
        let args = Args {
            check: true,
            from: None,
            engine: EngineChoice::Qemu,
            firecracker_pins: None,
            profiles: Vec::new(),
            rotate_ca: false,
            yes: false,
            json: true,
        };
        let code = check(&args, &[], &context).unwrap();
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::FAILURE));
        assert!(!temp.path().join("other").exists());
    }

    #[test]
    fn only_deb_files_are_offered_to_apt_and_an_empty_directory_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        assert!(debs(directory.path()).is_err());
        for name in ["b.deb", "a.deb", "notes.txt"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        let files = debs(directory.path()).unwrap();
        assert_eq!(files.len(), 2);
        assert!(files[0].ends_with("a.deb") && files[0].is_absolute());
    }
}
