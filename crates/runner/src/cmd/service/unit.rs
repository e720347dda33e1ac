//! Unit files: their names, places and text.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::context::CliError;
use crate::names::RunnerName;
use crate::notify::WATCHDOG_SECS;

/// Longest start: every byte of a full image is compared first, on a slow disk.
const START: Duration = Duration::from_secs(600);
/// What a stop takes beside the jobs' time: VMs and networks go, the status is written.
const STOP_BESIDE: Duration = Duration::from_secs(45);

/// `vm0-runner-<name>.service`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct UnitName(String);

impl UnitName {
    /// Of all runners' units, for `systemctl`.
    pub(super) const PATTERN: &str = "vm0-runner-*.service";

    pub(super) fn of(runner: &RunnerName) -> Self {
        Self(format!("vm0-runner-{runner}.service"))
    }

    /// Whose unit one of this name is; `None`: no runner's.
    pub(super) fn runner(unit: &str) -> Option<RunnerName> {
        let name = unit.strip_prefix("vm0-runner-")?;
        name.strip_suffix(".service")?.parse().ok()
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.strip_suffix(".service").unwrap_or(&self.0))
    }
}

/// Where a unit file lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Gone after a reboot.
    UntilReboot,
    /// There until it is removed.
    Persistent,
}

impl Place {
    fn directory(self) -> &'static Path {
        Path::new(match self {
            Self::UntilReboot => "/run/systemd/system",
            Self::Persistent => "/etc/systemd/system",
        })
    }

    pub(super) fn file(self, unit: &UnitName) -> PathBuf {
        self.directory().join(unit.as_str())
    }

    /// The file's text, if it is there.
    pub(super) fn read(self, unit: &UnitName) -> Result<Option<String>, CliError> {
        let file = self.file(unit);
        match std::fs::read_to_string(&file) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &file, &error)),
        }
    }

    /// Puts the file there as a whole; `None` removes it.
    pub(super) fn write(self, unit: &UnitName, text: Option<&str>) -> Result<(), CliError> {
        use std::io::Write;
        use std::os::unix::fs::PermissionsExt;
        let file = self.file(unit);
        let Some(text) = text else {
            return match std::fs::remove_file(&file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(failed("remove", &file, &error))
                }
                _ => Ok(()),
            };
        };
        let write = || {
            // In the manager's own directory, which a name that begins with a dot does not concern.
            let mut new = tempfile::Builder::new()
                .prefix(".vm0-runner-")
                .tempfile_in(self.directory())?;
            new.write_all(text.as_bytes())?;
            // Everybody may read a unit, whatever the umask is here.
            new.as_file()
                .set_permissions(std::fs::Permissions::from_mode(0o644))?;
            new.as_file().sync_all()?;
            new.persist(&file).map_err(|error| error.error)?;
            std::fs::File::open(self.directory())?.sync_all()
        };
        write().map_err(|error| failed("write", &file, &error))
    }
}

/// Runners whose units start them with this home.
pub(super) fn of_home(home: &Path) -> Result<Vec<RunnerName>, CliError> {
    let mut found = BTreeSet::new();
    for place in [Place::Persistent, Place::UntilReboot] {
        let entries = match std::fs::read_dir(place.directory()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed("read", place.directory(), &error)),
        };
        for entry in entries {
            let name = entry?.file_name();
            let Some(name) = name.to_str().and_then(UnitName::runner) else {
                continue;
            };
            let text = place.read(&UnitName::of(&name))?.unwrap_or_default();
            if home_of(&text).is_some_and(|of| is_same(&of, home)) {
                found.insert(name);
            }
        }
    }
    Ok(found.into_iter().collect())
}

/// The home of a unit of this name, where that is another than this one.
pub(super) fn other_home(unit: &UnitName, home: &Path) -> Result<Option<PathBuf>, CliError> {
    for place in [Place::Persistent, Place::UntilReboot] {
        let of = place.read(unit)?.as_deref().and_then(home_of);
        if let Some(of) = of.filter(|of| !is_same(of, home)) {
            return Ok(Some(of));
        }
    }
    Ok(None)
}

/// The home that a unit starts its runner with, if [`Unit::text`] wrote it.
fn home_of(text: &str) -> Option<PathBuf> {
    let start = text.lines().find(|line| line.starts_with("ExecStart="))?;
    let (_, home) = start.split_once("\" --home \"")?;
    unquoted(home).map(PathBuf::from)
}

fn is_same(one: &Path, other: &Path) -> bool {
    let real = |path| std::fs::canonicalize(path).ok();
    one == other || real(one).is_some_and(|one| real(other) == Some(one))
}

fn failed(action: &str, file: &Path, error: &std::io::Error) -> CliError {
    CliError::failed(format_args!("cannot {action} {}: {error}", file.display()))
}

/// What a unit says of its runner.
#[derive(Debug)]
pub(super) struct Unit<'a> {
    pub(super) name: &'a RunnerName,
    pub(super) program: &'a Path,
    pub(super) home: &'a Path,
    pub(super) config: &'a Path,
    pub(super) local: bool,
    /// The Web API's address and the file with the token for it.
    pub(super) api: Option<(&'a str, &'a Path)>,
    pub(super) environment: &'a [(String, String)],
    pub(super) environment_file: Option<&'a Path>,
    pub(super) stop_timeout: Duration,
}

impl Unit<'_> {
    /// The unit file's text.
    pub(super) fn text(&self) -> Result<String, CliError> {
        let mut command = format!(
            "{} --home {} start --config {}",
            argument(path(self.program)?),
            argument(path(self.home)?),
            argument(path(self.config)?)
        );
        if self.local {
            command.push_str(" --local");
        }
        if let Some((url, token_file)) = self.api {
            let _ = write!(
                command,
                " --api-url {} --api-token-file {}",
                argument(url),
                argument(path(token_file)?)
            );
        }
        let mut environment = String::new();
        for (name, value) in self.environment {
            let _ = writeln!(
                environment,
                "Environment={}",
                quoted(&format!("{name}={value}"))
            );
        }
        if let Some(file) = self.environment_file {
            // The whole rest of the line is the path, which only specifiers are looked for in.
            let file = path(file)?;
            if file.chars().any(char::is_control) {
                return Err(CliError::usage(
                    "--env-file has a control character in its path",
                ));
            }
            let _ = writeln!(environment, "EnvironmentFile={}", file.replace('%', "%%"));
        }
        let stop = self.stop_timeout.saturating_add(STOP_BESIDE).as_secs();
        Ok(TEMPLATE
            .replace("@NAME@", self.name.as_str())
            .replace("@START@", &START.as_secs().to_string())
            .replace("@STOP@", &stop.to_string())
            .replace("@WATCHDOG@", &WATCHDOG_SECS.to_string())
            // Last: a value may hold anything.
            .replace("@ENVIRONMENT@\n", &environment)
            .replace("@COMMAND@", &command))
    }
}

/// Every line that is not obvious says why it is there, or why a usual one is not.
const TEMPLATE: &str = include_str!("unit.template");

fn path(path: &Path) -> Result<&str, CliError> {
    path.to_str().ok_or_else(|| {
        CliError::failed(format_args!(
            "{} is not UTF-8, which a unit file has to be",
            path.display()
        ))
    })
}

/// A word of a command line: besides quoting, `$` begins a variable there.
fn argument(text: &str) -> String {
    quoted(text).replace('$', "$$")
}

/// A quoted string of a unit file: C escapes, and `%` begins a specifier (systemd.syntax(7), systemd.unit(5)).
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '%' => out.push_str("%%"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c if u32::from(c) < 0x20 || c == '\x7f' => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// What [`argument`] made of a text, up to its closing quote.
fn unquoted(text: &str) -> Option<String> {
    let mut out = String::new();
    let mut chars = text.chars();
    loop {
        out.push(match chars.next()? {
            '"' => return Some(out),
            doubled @ ('%' | '$') => chars.next().filter(|next| *next == doubled)?,
            '\\' => match chars.next()? {
                'n' => '\n',
                't' => '\t',
                'x' => {
                    let high = chars.next()?.to_digit(16)?;
                    char::from_u32(high * 16 + chars.next()?.to_digit(16)?)?
                }
                escaped @ ('"' | '\\') => escaped,
                _ => return None,
            },
            c => c,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(environment: &[(String, String)]) -> String {
        unit_of(true, None, environment)
    }

    fn unit_of(
        local: bool,
        api: Option<(&str, &Path)>,
        environment: &[(String, String)],
    ) -> String {
        Unit {
            name: &"demo".parse().unwrap(),
            program: Path::new("/home/a b/bin/runner"),
            home: Path::new("/home/a b/.vm0-runner"),
            config: Path::new("/home/a b/100%/$x/runner.yaml"),
            local,
            api,
            environment,
            environment_file: Some(Path::new("/home/a b/100%")),
            stop_timeout: Duration::from_secs(60),
        }
        .text()
        .unwrap()
    }

    #[test]
    fn what_systemd_would_take_for_its_own_is_escaped() {
        let value = "say \"hi\" \\o/ 100% $HOME\nnext\u{1}";
        let text = unit(&[("A".to_owned(), value.to_owned())]);
        let line = "Environment=\"A=say \\\"hi\\\" \\\\o/ 100%% $HOME\\nnext\\x01\"";
        assert!(text.lines().any(|l| l == line), "{text}");
        let line = "ExecStart=\"/home/a b/bin/runner\" --home \"/home/a b/.vm0-runner\" start --config \
                    \"/home/a b/100%%/$$x/runner.yaml\" --local";
        assert!(text.lines().any(|l| l == line), "{text}");
        assert!(text.lines().any(|l| l == "EnvironmentFile=/home/a b/100%%"));
        assert!(text.lines().any(|l| l == "TimeoutStopSec=105"), "{text}");
    }

    #[test]
    fn a_unit_for_the_api_names_the_file_of_the_token() {
        let api = ("https://api.example.com/%7e", Path::new("/etc/a b/$t"));
        let text = unit_of(false, Some(api), &[]);
        let line = "ExecReload=\"/home/a b/bin/runner\" --home \"/home/a b/.vm0-runner\" start --config \
                    \"/home/a b/100%%/$$x/runner.yaml\" --api-url \"https://api.example.com/%%7e\" \
                    --api-token-file \"/etc/a b/$$t\" --takeover";
        assert!(text.lines().any(|l| l == line), "{text}");
    }

    #[test]
    fn a_value_cannot_become_another_line_or_a_placeholder() {
        let value = "x\n[Service]\nExecStart=/bin/sh @COMMAND@ @NAME@";
        let text = unit(&[("A".to_owned(), value.to_owned())]);
        assert_eq!(
            text.lines().filter(|l| l.starts_with("ExecStart=")).count(),
            1
        );
        assert_eq!(text.lines().filter(|l| *l == "[Service]").count(), 1);
    }

    #[test]
    fn the_home_of_a_unit_is_read_as_it_was_written() {
        let text = unit(&[]);
        let home = home_of(&text).unwrap();
        assert_eq!(home, Path::new("/home/a b/.vm0-runner"));
        for odd in [
            "/",
            "/a\"b\\c",
            "/100%/$x/$$",
            "/a\n\tb\u{1}\u{7f}",
            "/ü --home \"x\"",
        ] {
            assert_eq!(unquoted(&argument(odd)[1..]).as_deref(), Some(odd));
        }
        for other in [
            "",
            "ExecStart=/usr/bin/runner start",
            "ExecStart=\"/r\" --home \"/x",
        ] {
            assert_eq!(home_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_home_is_the_same_by_another_way_to_it() {
        let temp = tempfile::tempdir().unwrap();
        let (home, link) = (temp.path().join("home"), temp.path().join("link"));
        std::fs::create_dir(&home).unwrap();
        std::os::unix::fs::symlink(&home, &link).unwrap();
        assert!(is_same(&home, &link));
        assert!(!is_same(&home, temp.path()));
        // Neither is there, and they are the same all the same, or not.
        assert!(is_same(&home.join("x"), &home.join("x")));
        assert!(!is_same(&home.join("x"), &home.join("y")));
    }

    #[test]
    fn every_placeholder_is_filled() {
        let text = unit(&[]);
        assert!(!text.contains('@'), "{text}");
    }
}
