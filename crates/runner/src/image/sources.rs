//! Where packages come from: the host's own apt configuration, or what `--mirror` and `--suite` say.
//!
//! Only the distribution's own suites are taken (release, updates, security; component `main`, with Ubuntu's
//! `universe`): a third party's repository that the host happens to use has no business in an image.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::ImageError;

/// A distribution whose packages make images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Distribution {
    Debian,
    Ubuntu,
}

impl Distribution {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Ubuntu => "ubuntu",
        }
    }

    fn components(self) -> &'static [&'static str] {
        match self {
            Self::Debian => &["main"],
            Self::Ubuntu => &["main", "universe"],
        }
    }

    /// The meta package of the kernel made for VMs.
    pub(super) fn kernel_package(self, arch: &str) -> String {
        match self {
            Self::Debian => format!("linux-image-cloud-{arch}"),
            Self::Ubuntu => "linux-image-virtual".to_owned(),
        }
    }
}

/// The host's distribution and the code name of its release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Release {
    pub(super) distribution: Distribution,
    pub(super) codename: String,
}

impl Release {
    /// Reads os-release(5).
    pub(super) fn of_host() -> Result<Self, ImageError> {
        let path = Path::new("/etc/os-release");
        let text = fs::read_to_string(path).map_err(ImageError::io("read", path))?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self, ImageError> {
        let value = |key: &str| {
            text.lines()
                .filter_map(|line| line.split_once('='))
                .find(|(name, _)| *name == key)
                .map(|(_, value)| value.trim().trim_matches(['"', '\'']).to_owned())
        };
        let id = value("ID").unwrap_or_default();
        let distribution = match id.as_str() {
            "debian" => Distribution::Debian,
            "ubuntu" => Distribution::Ubuntu,
            _ => return Err(ImageError::Distribution(value("PRETTY_NAME").unwrap_or(id))),
        };
        // Derivatives of testing may have none; then --suite names it.
        let codename = value("VERSION_CODENAME").unwrap_or_else(|| "sid".to_owned());
        Ok(Self {
            distribution,
            codename,
        })
    }
}

/// What images are built from where nothing else is said, such as `debian bookworm`.
pub(crate) fn host_suite() -> Result<String, ImageError> {
    let release = Release::of_host()?;
    let sources = Sources::choose(&release, &[], None)?;
    Ok(format!("{} {}", release.distribution.name(), sources.suite))
}

/// One `deb` source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Source {
    uri: String,
    suite: String,
    components: Vec<String>,
    /// Value of `Signed-By`: a path, fingerprints, or an embedded key of several lines.
    signed_by: Option<String>,
    /// Value of `Trusted`, when the host's operator set it.
    trusted: Option<String>,
}

/// The sources of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sources {
    pub(super) suite: String,
    list: Vec<Source>,
}

impl Sources {
    /// Decides: each `--mirror` is used alone; otherwise the host's sources of the suite.
    pub(super) fn choose(
        release: &Release,
        mirrors: &[String],
        suite: Option<&str>,
    ) -> Result<Self, ImageError> {
        let suite = suite.unwrap_or(&release.codename).to_owned();
        let components = release.distribution.components();
        let list = if mirrors.is_empty() {
            select(host_sources(Path::new("/etc/apt"))?, &suite, components)
        } else {
            mirrors
                .iter()
                .flat_map(|mirror| match parse_line(mirror) {
                    Some(entries) => entries,
                    None => vec![Source {
                        uri: mirror.clone(),
                        suite: suite.clone(),
                        components: components.iter().map(ToString::to_string).collect(),
                        ..Source::default()
                    }],
                })
                .collect()
        };
        if list.is_empty() {
            return Err(ImageError::NoSource { suite });
        }
        Ok(Self { suite, list })
    }

    /// As a deb822 sources file (sources.list(5)), for apt and mmdebstrap alike.
    pub(super) fn to_deb822(&self) -> String {
        let mut text = String::new();
        for source in &self.list {
            let Source {
                uri,
                suite,
                components,
                signed_by,
                trusted,
            } = source;
            let _ = write!(text, "Types: deb\nURIs: {uri}\nSuites: {suite}\n");
            // An exact path (`./`) as a suite takes no components.
            if !components.is_empty() {
                let _ = writeln!(text, "Components: {}", components.join(" "));
            }
            for (key, value) in [("Signed-By", signed_by), ("Trusted", trusted)] {
                if let Some(value) = value {
                    let _ = writeln!(text, "{key}: {value}");
                }
            }
            text.push('\n');
        }
        text
    }
}

/// Keeps the suite with its updates and security, and of each only the given components.
fn select(sources: Vec<Source>, suite: &str, components: &[&str]) -> Vec<Source> {
    let suites = [
        suite.to_owned(),
        format!("{suite}-updates"),
        format!("{suite}-security"),
        format!("{suite}/updates"),
    ];
    let mut kept: Vec<Source> = Vec::new();
    for mut source in sources {
        source
            .components
            .retain(|component| components.contains(&component.as_str()));
        let known = |other: &Source| {
            other.uri == source.uri
                && other.suite == source.suite
                && other.components == source.components
        };
        if suites.contains(&source.suite)
            && !source.components.is_empty()
            && !kept.iter().any(known)
        {
            kept.push(source);
        }
    }
    kept
}

/// Everything that the apt configuration below `etc` names.
fn host_sources(etc: &Path) -> Result<Vec<Source>, ImageError> {
    let mut files = vec![etc.join("sources.list")];
    let parts = etc.join("sources.list.d");
    if let Ok(entries) = fs::read_dir(&parts) {
        let mut more: Vec<_> = entries
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .collect();
        more.sort();
        files.extend(more);
    }
    let mut sources = Vec::new();
    for file in files {
        let deb822 = match file.extension().and_then(|e| e.to_str()) {
            Some("list") => false,
            Some("sources") => true,
            _ => continue,
        };
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(ImageError::io("read", &file)(error)),
        };
        if deb822 {
            sources.extend(parse_deb822(&text));
        } else {
            sources.extend(text.lines().filter_map(parse_line).flatten());
        }
    }
    Ok(sources)
}

/// `deb [options] uri suite components…`; `None` for comments, `deb-src` and what is no source line.
fn parse_line(line: &str) -> Option<Vec<Source>> {
    let line = line.split('#').next()?.trim();
    let mut rest = line
        .strip_prefix("deb")?
        .strip_prefix([' ', '\t'])?
        .trim_start();
    let mut source = Source::default();
    if let Some(after) = rest.strip_prefix('[') {
        let (options, remainder) = after.split_once(']')?;
        for (key, value) in options
            .split_whitespace()
            .filter_map(|option| option.split_once('='))
        {
            match key {
                "signed-by" => source.signed_by = Some(value.replace(',', " ")),
                "trusted" => source.trusted = Some(value.to_owned()),
                _ => {}
            }
        }
        rest = remainder;
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    source.uri = words.next()?;
    source.suite = words.next()?;
    source.components = words.collect();
    Some(vec![source])
}

/// Stanzas of a `.sources` file.
fn parse_deb822(text: &str) -> Vec<Source> {
    // Comment lines may stand anywhere, also inside a stanza; they separate nothing.
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines
        .split(|line| line.trim().is_empty())
        .flat_map(|stanza| parse_stanza(stanza).unwrap_or_default())
        .collect()
}

fn parse_stanza(lines: &[&str]) -> Option<Vec<Source>> {
    let field = |wanted: &str| -> Option<String> {
        let mut lines = lines.iter().skip_while(|line| {
            !line
                .split_once(':')
                .is_some_and(|(key, _)| key.trim().eq_ignore_ascii_case(wanted))
        });
        let mut value = lines.next()?.split_once(':')?.1.trim().to_owned();
        for more in lines.take_while(|line| line.starts_with([' ', '\t'])) {
            value.push('\n');
            value.push_str(more);
        }
        Some(value)
    };
    let words = |key: &str| -> Vec<String> {
        field(key)
            .unwrap_or_default()
            .split_whitespace()
            .map(str::to_owned)
            .collect()
    };
    let enabled = field("Enabled")
        .is_none_or(|value| !matches!(value.to_ascii_lowercase().as_str(), "no" | "false" | "0"));
    if !enabled || !words("Types").iter().any(|kind| kind == "deb") {
        return None;
    }
    let components = words("Components");
    let (signed_by, trusted) = (field("Signed-By"), field("Trusted"));
    let mut sources = Vec::new();
    for uri in words("URIs") {
        for suite in words("Suites") {
            sources.push(Source {
                uri: uri.clone(),
                suite,
                components: components.clone(),
                signed_by: signed_by.clone(),
                trusted: trusted.clone(),
            });
        }
    }
    Some(sources)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEB822: &str = "\
# The archive.
Types: deb deb-src
URIs: http://archive.test/debian
# in the middle
Suites: bookworm bookworm-updates bookworm-backports
Components: main contrib
Signed-By: /usr/share/keyrings/a.gpg

Types: deb
URIs: http://other.test/
Suites: bookworm
Components: stable
Enabled: yes

Types: deb
URIs: http://off.test/
Suites: bookworm
Components: main
Enabled: no

Types: deb
URIs: http://security.test/
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
";

    #[test]
    fn the_distributions_own_suites_are_kept_and_nothing_else() {
        let kept = select(parse_deb822(DEB822), "bookworm", &["main"]);
        let pairs: Vec<_> = kept
            .iter()
            .map(|s| (s.uri.as_str(), s.suite.as_str()))
            .collect();
        assert_eq!(
            pairs,
            [
                ("http://archive.test/debian", "bookworm"),
                ("http://archive.test/debian", "bookworm-updates"),
                ("http://security.test/", "bookworm-security"),
            ]
        );
        assert_eq!(kept[0].components, ["main"]);
    }

    #[test]
    fn what_is_written_reads_back_with_its_keys() {
        let list = select(parse_deb822(DEB822), "bookworm", &["main"]);
        let sources = Sources {
            suite: "bookworm".into(),
            list,
        };
        assert_eq!(parse_deb822(&sources.to_deb822()), sources.list);
        assert!(
            sources
                .to_deb822()
                .contains("Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n")
        );
    }

    #[test]
    fn one_line_entries_are_understood() {
        let line = "deb [arch=amd64 signed-by=/k/a.gpg] http://a.test/ubuntu noble main universe # comment";
        let parsed = parse_line(line).unwrap();
        assert_eq!(parsed[0].suite, "noble");
        assert_eq!(parsed[0].components, ["main", "universe"]);
        assert_eq!(parsed[0].signed_by.as_deref(), Some("/k/a.gpg"));
        for nothing in [
            "# deb http://a b c",
            "deb-src http://a b c",
            "",
            "debian",
            "deb [x",
            "http://a.test/debian",
        ] {
            assert_eq!(parse_line(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn a_mirror_is_used_alone_with_the_suite_asked_for() {
        let release = Release {
            distribution: Distribution::Ubuntu,
            codename: "noble".into(),
        };
        let mirrors = [
            "http://m.test/ubuntu".to_owned(),
            "deb [trusted=yes] http://n.test/ x-security main".to_owned(),
        ];
        let sources = Sources::choose(&release, &mirrors, Some("jammy")).unwrap();
        assert_eq!(sources.list.len(), 2);
        assert_eq!(
            (sources.list[0].suite.as_str(), sources.suite.as_str()),
            ("jammy", "jammy")
        );
        assert_eq!(sources.list[0].components, ["main", "universe"]);
        assert_eq!(sources.list[1].trusted.as_deref(), Some("yes"));
    }

    #[test]
    fn releases_are_read_and_other_systems_are_refused() {
        let debian =
            Release::parse("PRETTY_NAME=\"Debian\"\nID=debian\nVERSION_CODENAME=trixie\n").unwrap();
        assert_eq!(debian.codename, "trixie");
        let error = Release::parse("ID=fedora\nPRETTY_NAME=\"Fedora 40\"\n").unwrap_err();
        assert!(error.to_string().contains("Fedora 40"));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_fail(text in "(?s).{0,200}") {
            let _ = parse_deb822(&text);
            let _ = parse_line(&text);
            let _ = Release::parse(&text);
        }
    }
}
