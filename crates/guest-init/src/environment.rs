//! The environment a process starts with.

use std::collections::BTreeMap;
use std::ffi::CString;

use guest_control::ExecSpec;
use guest_control::server::OsError;
use rustix::io::Errno;

use crate::users::Account;

/// Where programs are looked for unless the image or the host says otherwise (Debian's default for all users).
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Variables by name; the last word is the host's.
pub(crate) fn build(
    account: &Account,
    etc: &[(String, String)],
    spec: &ExecSpec,
) -> BTreeMap<String, String> {
    let mut env: BTreeMap<String, String> = [
        ("HOME", account.home.as_str()),
        ("USER", account.name.as_str()),
        ("LOGNAME", account.name.as_str()),
        ("SHELL", account.shell.as_str()),
        ("PATH", PATH),
        ("LANG", "C.UTF-8"),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .collect();
    if spec.pty.is_some() {
        env.insert("TERM".to_owned(), "xterm-256color".to_owned());
    }
    env.extend(etc.iter().cloned());
    env.extend(spec.env.iter().cloned());
    env
}

/// A line of /etc/environment as pam_env reads it: `NAME=value`, quotes around the value optional.
pub(crate) fn assignment(line: &str) -> Option<(String, String)> {
    let line = line.trim();
    let line = line.strip_prefix("export ").unwrap_or(line);
    let (name, value) = line.split_once('=')?;
    let name = name.trim();
    if name.is_empty() || name.starts_with('#') {
        return None;
    }
    let value = value.trim();
    let bare = ['"', '\'']
        .into_iter()
        .find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote));
    Some((name.to_owned(), bare.unwrap_or(value).to_owned()))
}

/// `NAME=value` strings for execve.
pub(crate) fn strings(env: &BTreeMap<String, String>) -> Result<Vec<CString>, OsError> {
    env.iter()
        .map(|(name, value)| {
            if name.is_empty() || name.contains('=') {
                return Err(OsError::new(
                    format_args!("an environment variable called {name:?}"),
                    Errno::INVAL,
                ));
            }
            c_string(format!("{name}={value}"), "an environment variable")
        })
        .collect()
}

/// The places where a program may be, in the order in which they are tried.
pub(crate) fn candidates(program: &[u8], path: &str) -> Result<Vec<CString>, OsError> {
    if program.contains(&b'/') {
        return Ok(vec![c_string(program, "the program's name")?]);
    }
    path.split(':')
        .map(|dir| {
            let mut candidate = if dir.is_empty() { "." } else { dir }.as_bytes().to_vec();
            candidate.push(b'/');
            candidate.extend_from_slice(program);
            c_string(candidate, "the program's name")
        })
        .collect()
}

/// A string the kernel can take.
pub(crate) fn c_string(bytes: impl Into<Vec<u8>>, what: &str) -> Result<CString, OsError> {
    CString::new(bytes)
        .map_err(|_| OsError::new(format_args!("{what} holds a NUL byte"), Errno::INVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account() -> Account {
        Account {
            name: "user".to_owned(),
            uid: 1000,
            gid: 1000,
            groups: vec![1000],
            home: "/home/user".to_owned(),
            shell: "/bin/bash".to_owned(),
        }
    }

    #[test]
    fn the_host_wins_over_the_image_and_the_image_over_defaults() {
        let spec = ExecSpec {
            env: vec![("A".to_owned(), "host".to_owned())],
            ..ExecSpec::default()
        };
        let env = build(
            &account(),
            &[
                ("A".to_owned(), "image".to_owned()),
                ("PATH".to_owned(), "/opt/bin:/bin".to_owned()),
            ],
            &spec,
        );
        assert_eq!(env["A"], "host");
        assert_eq!(env["PATH"], "/opt/bin:/bin");
        assert_eq!(env["HOME"], "/home/user");
        assert!(!env.contains_key("TERM"));
    }

    #[test]
    fn reads_assignments_as_pam_does() {
        assert_eq!(
            assignment("export B='x y'"),
            Some(("B".to_owned(), "x y".to_owned()))
        );
        assert_eq!(assignment("#A=1"), None);
        assert_eq!(
            assignment("C=\"open"),
            Some(("C".to_owned(), "\"open".to_owned()))
        );
    }

    #[test]
    fn looks_along_the_path_only_for_bare_names() {
        let found = candidates(b"true", "/a::/b").unwrap();
        assert_eq!(
            found,
            [
                c"/a/true".into(),
                c"./true".into(),
                CString::from(c"/b/true")
            ]
        );
        assert_eq!(candidates(b"./x", "/a").unwrap(), [CString::from(c"./x")]);
        assert!(candidates(b"a\0b", "/a").is_err());
    }
}
