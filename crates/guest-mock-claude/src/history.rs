//! The session history file, where the real CLI keeps it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::events::Stream;

/// What an earlier run of this session left.
pub(crate) fn load(cwd: &Path, session_id: &str) -> io::Result<Vec<u8>> {
    fs::read(path_of(&home(), cwd, session_id))
}

fn home() -> PathBuf {
    std::env::var_os("HOME")
        .unwrap_or_else(|| "/home/user".into())
        .into()
}

/// Writes every line of the session to `$HOME/.claude/projects/<cwd dashed>/<session>.jsonl`.
pub(crate) fn save(stream: &Stream) -> io::Result<()> {
    let path = path_of(&home(), stream.cwd(), stream.session_id());
    let mut options = OpenOptions::new();
    options.create(true).write(true).truncate(true).mode(0o600);
    let mut file = match options.open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
            options.open(&path)?
        }
        other => other?,
    };
    file.write_all(stream.earlier())?;
    file.write_all(stream.lines())
}

/// Whatever is no letter or digit of the working directory becomes a hyphen: `/home/user/workspace` is
/// `-home-user-workspace`.
fn path_of(home: &Path, cwd: &Path, session_id: &str) -> PathBuf {
    home.join(".claude/projects")
        .join(
            cwd.to_string_lossy()
                .replace(|c: char| !c.is_ascii_alphanumeric(), "-"),
        )
        .join(format!("{session_id}.jsonl"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_lies_where_the_real_cli_keeps_it() {
        assert_eq!(
            path_of(
                Path::new("/home/user"),
                Path::new("/home/user/workspace"),
                "mock-1"
            ),
            Path::new("/home/user/.claude/projects/-home-user-workspace/mock-1.jsonl")
        );
    }
}
