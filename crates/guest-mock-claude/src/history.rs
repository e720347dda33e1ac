//! The session history file, where the real CLI keeps it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::events::Stream;

/// Writes every line of the run to `$HOME/.claude/projects/<cwd dashed>/<session>.jsonl`.
pub(crate) fn save(stream: &Stream) -> io::Result<()> {
    let home = std::env::var_os("HOME").unwrap_or_else(|| "/home/user".into());
    let path = path_of(Path::new(&home), stream.cwd(), stream.session_id());
    let mut options = OpenOptions::new();
    options.create(true).write(true).truncate(true).mode(0o600);
    let mut file = match options.open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
            options.open(&path)?
        }
        other => other?,
    };
    file.write_all(stream.lines())
}

/// `/home/user/workspace` becomes the directory `-home-user-workspace`.
fn path_of(home: &Path, cwd: &Path, session_id: &str) -> PathBuf {
    home.join(".claude/projects")
        .join(cwd.to_string_lossy().replace('/', "-"))
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
