//! Files that a job leaves in its VM and that its submitter wants here.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use host::fs::Access;

use crate::context::CliError;
use crate::names::RunId;
use crate::queue::GroupQueue;

/// `PATH=DIR` of the command line.
#[derive(Clone, Debug)]
pub(crate) struct Collect {
    guest_path: String,
    name: String,
    dir: PathBuf,
}

impl Collect {
    /// The path in the guest.
    pub(super) fn guest_path(&self) -> &str {
        &self.guest_path
    }

    /// Makes sure, before the job is submitted, that there is somewhere to put the file.
    pub(super) fn open(self) -> Result<Self, CliError> {
        std::fs::create_dir_all(&self.dir).map_err(|error| {
            CliError::failed(format_args!(
                "cannot make the directory {}: {error}",
                self.dir.display()
            ))
        })?;
        Ok(self)
    }
}

impl FromStr for Collect {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (guest_path, dir) = text
            .rsplit_once('=')
            .ok_or_else(|| "it is PATH=DIR".to_owned())?;
        let name = Path::new(guest_path)
            .file_name()
            .and_then(|name| name.to_str())
            .filter(|_| guest_path.starts_with('/') && !guest_path.ends_with('/'))
            .ok_or_else(|| "PATH is the absolute path of a file in the VM".to_owned())?;
        if dir.is_empty() {
            return Err("DIR is empty; `.` is the current directory".to_owned());
        }
        Ok(Self {
            name: name.to_owned(),
            guest_path: guest_path.to_owned(),
            dir: PathBuf::from(dir),
        })
    }
}

/// Copies what the runner brought out of the VM to where it was wanted. Each file appears whole or not at all.
pub(super) fn bring_out(
    queue: &GroupQueue,
    run: RunId,
    wanted: &[Collect],
) -> Result<(), CliError> {
    if wanted.is_empty() {
        return Ok(());
    }
    let source = queue.collected(run)?;
    let mut missing = Vec::new();
    for (index, collect) in wanted.iter().enumerate() {
        let file = match &source {
            Some(source) => match source.open_file(index.to_string(), Access::Read) {
                Ok(file) => Some(file),
                Err(error) if error.is_not_found() => None,
                Err(error) => return Err(error.into()),
            },
            None => None,
        };
        match file {
            Some(mut file) => place(&mut file, collect).map_err(|error| {
                CliError::failed(format_args!(
                    "cannot write {}: {error}",
                    collect.dir.join(&collect.name).display()
                ))
            })?,
            None => missing.push(collect.guest_path.as_str()),
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(CliError::failed(format_args!(
        "the job left no such file to collect: {}",
        missing.join(", ")
    )))
}

fn place(file: &mut File, collect: &Collect) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mut copy = tempfile::Builder::new()
        .prefix(".runner-collect-")
        .permissions(std::fs::Permissions::from_mode(0o666))
        .tempfile_in(&collect.dir)?;
    io::copy(file, &mut copy)?;
    copy.persist(collect.dir.join(&collect.name))
        .map(drop)
        .map_err(|error| error.error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_files_and_directories_are_named() {
        let collect: Collect = "/tmp/a=b.png=out".parse().unwrap();
        assert_eq!(collect.guest_path(), "/tmp/a=b.png");
        assert_eq!(collect.name, "a=b.png");
        assert_eq!(collect.dir, Path::new("out"));
        for bad in ["/tmp/x", "x=.", "/tmp/=.", "/=.", "/tmp/..=.", "/tmp/x="] {
            bad.parse::<Collect>().unwrap_err();
        }
    }
}
