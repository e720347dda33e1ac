//! The CLI's session on disk: `~/.claude/projects/<directory>/<session id>.jsonl`, where Claude Code keeps it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use api_types::SessionId;

/// Longest history that the API takes.
const MAX_HISTORY: u64 = 32 * 1024 * 1024;

/// A session as the CLI's first event names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    /// The CLI's working directory.
    pub(crate) cwd: PathBuf,
}

/// Why a session is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("its history {path:?} cannot be {action}: {source}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("its history has more than {} MiB, which the API does not take", MAX_HISTORY >> 20)]
    TooLong,
}

impl Session {
    /// Where its history lies.
    pub(crate) fn path(&self, home: &Path) -> PathBuf {
        home.join(".claude/projects")
            .join(directory_of(&self.cwd))
            .join(format!("{}.jsonl", self.id))
    }

    /// Its history.
    pub(crate) fn read(&self, home: &Path) -> Result<String, SessionError> {
        let path = self.path(home);
        let failed = |source| SessionError::File {
            action: "read",
            path: path.clone(),
            source,
        };
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(MAX_HISTORY + 1).read_to_end(&mut bytes))
            .map_err(failed)?;
        if bytes.len() as u64 > MAX_HISTORY {
            return Err(SessionError::TooLong);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Puts the history in `source`, which an earlier run left, where the CLI looks for it.
    pub(crate) fn restore(&self, home: &Path, source: &Path) -> Result<(), SessionError> {
        let path = self.path(home);
        let failed = |action, path: &Path, source| SessionError::File {
            action,
            path: path.to_owned(),
            source,
        };
        let history = fs::read(source).map_err(|error| failed("read", source, error))?;
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
            let mut options = OpenOptions::new();
            options.create(true).write(true).truncate(true).mode(0o600);
            options.open(&path)?.write_all(&history)
        };
        write().map_err(|error| failed("written", &path, error))
    }
}

/// Claude Code's name of a working directory: whatever is no letter or digit becomes a hyphen.
fn directory_of(cwd: &Path) -> String {
    cwd.to_string_lossy()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_is_put_where_it_is_found_again() {
        let home = tempfile::tempdir().unwrap();
        let session = Session {
            id: "0c5b-1".parse().unwrap(),
            cwd: "/home/user/work.space".into(),
        };
        let path = home
            .path()
            .join(".claude/projects/-home-user-work-space/0c5b-1.jsonl");
        assert_eq!(session.path(home.path()), path);
        assert!(session.read(home.path()).is_err());
        let source = home.path().join("from-another-host");
        fs::write(&source, "{\"a\":1}\n").unwrap();
        session.restore(home.path(), &source).unwrap();
        assert_eq!(session.read(home.path()).unwrap(), "{\"a\":1}\n");
        fs::write(&path, vec![b'x'; 33 << 20]).unwrap();
        let error = session.read(home.path()).unwrap_err();
        assert!(matches!(error, SessionError::TooLong));
    }
}
