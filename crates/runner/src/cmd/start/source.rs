//! Where jobs come from: the local file queue, or the Web API.

use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use policy::{ApiAccess, Host, Scheme};
use reqwest::Url;
use zeroize::Zeroizing;

use crate::context::CliError;
use crate::provider::api::ApiSettings;

/// The variable with the runner token.
pub(in crate::cmd) const TOKEN: &str = "VM0_API_TOKEN";
/// Longest token, bytes.
const MAX_TOKEN: u64 = 512;

/// One of both.
#[derive(Debug)]
pub(in crate::cmd) enum Source {
    /// The file queue.
    Local,
    /// The Web API.
    Api(ApiSettings),
}

impl Source {
    /// What jobs may reach of the Web API.
    pub(super) fn api_access(&self) -> Result<Option<ApiAccess>, CliError> {
        let Self::Api(settings) = self else {
            return Ok(None);
        };
        let url = &settings.url;
        let scheme = if url.scheme() == "https" {
            Scheme::Https
        } else {
            Scheme::Http
        };
        let host = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or(443);
        let access = ApiAccess::new(scheme, host, port, url.path()).map_err(|why| {
            CliError::usage(format_args!(
                "no VM could reach the Web API at {url}: {why}"
            ))
        })?;
        let loopback = match access.host() {
            Host::Name(name) => name == "localhost",
            Host::Address(address) => address.is_loopback(),
        };
        if loopback {
            tracing::warn!(
                %url,
                "no VM can reach the Web API at this host's loopback, so jobs will fail: name it by another address"
            );
        }
        Ok(Some(access))
    }
}

/// Settles it.
pub(in crate::cmd) fn of(
    local: bool,
    url: Option<String>,
    token_file: Option<&Path>,
) -> Result<Source, CliError> {
    if local {
        return Ok(Source::Local);
    }
    let Some(url) = url.filter(|url| !url.is_empty()) else {
        return Err(
            CliError::usage("it is not said where jobs come from").with_hint(
                "add --local for the file queue; for the Web API, --api-url and --api-token-file (docs/api-mode.md)",
            ),
        );
    };
    let url = address(&url)?;
    let token = match token_file {
        Some(file) => secret_file(file, MAX_TOKEN)?,
        None => Zeroizing::new(std::env::var(TOKEN).unwrap_or_default()),
    };
    let token = Zeroizing::new(token.trim().to_owned());
    if token.is_empty() {
        return Err(CliError::usage(format_args!(
            "there is no runner token for {url}"
        ))
        .with_hint("name its file with --api-token-file, or set VM0_API_TOKEN; `vm0-api token create --kind runner` makes one"));
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) || !token.starts_with("vm0_runner_") {
        return Err(CliError::usage("the token is no runner token").with_hint(
            "`vm0-api token create --kind runner` makes one; it begins with vm0_runner_",
        ));
    }
    Ok(Source::Api(ApiSettings { url, token }))
}

fn address(text: &str) -> Result<Url, CliError> {
    let refused = |why: &str| {
        CliError::usage(format_args!(
            "the Web API's address {text:?} is not usable: {why}"
        ))
        .with_hint("it is like https://api.example.com")
    };
    let url: Url = text.parse().map_err(|_| refused("it is no URL"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(refused("it must begin with https:// or http://"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refused("it holds a password; the token goes elsewhere"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(refused("it has a query or fragment"));
    }
    Ok(url)
}

/// Reads a file that its owner alone may read, at most `max` bytes of it.
pub(super) fn secret_file(path: &Path, max: u64) -> Result<Zeroizing<String>, CliError> {
    let failed = |error: std::io::Error| {
        CliError::failed(format_args!("cannot read {}: {error}", path.display()))
    };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode();
    if mode & 0o077 != 0 {
        return Err(CliError::failed(format_args!(
            "{} can be read by others than its owner",
            path.display()
        ))
        .with_hint(format_args!("chmod 600 {}", path.display())));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(max).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn refused(url: &str, token: &str, mode: u32) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), token).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        match of(false, Some(url.to_owned()), Some(file.path())) {
            Ok(Source::Api(settings)) => format!("{} {}", settings.url, settings.token.as_str()),
            Ok(Source::Local) => "local".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_address_and_the_token_are_checked_before_anything_starts() {
        let good = "vm0_runner_abc_def\n";
        assert_eq!(
            refused("https://api.example.com", good, 0o600),
            "https://api.example.com/ vm0_runner_abc_def"
        );
        for (url, token, mode, why) in [
            ("ftp://api.example.com", good, 0o600, "https://"),
            ("api.example.com", good, 0o600, "no URL"),
            ("https://a:b@api.example.com", good, 0o600, "password"),
            ("https://api.example.com/?x=1", good, 0o600, "query"),
            (
                "https://api.example.com",
                "vm0_key_abc_def",
                0o600,
                "no runner token",
            ),
            (
                "https://api.example.com",
                "vm0_runner_a\nb: c",
                0o600,
                "no runner token",
            ),
            ("https://api.example.com", "", 0o600, "no runner token"),
            ("https://api.example.com", good, 0o644, "by others"),
        ] {
            let error = refused(url, token, mode);
            assert!(error.contains(why), "{url}: {error}");
        }
        assert!(of(false, None, None).is_err());
        assert!(matches!(of(true, None, None), Ok(Source::Local)));
    }
}
