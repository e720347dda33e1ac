//! Looking for what must not be somewhere: texts and bytes, in memory and files.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Shorter runs of bytes are found by chance, in the memory of a VM at least.
const SHORTEST: usize = 12;

/// What is looked for.
#[derive(Debug)]
pub struct Needle {
    what: String,
    bytes: Vec<u8>,
}

impl Needle {
    /// A text, found as it is; `what` is how it is called when it is found.
    pub fn text(what: &str, text: &str) -> Self {
        Self::bytes(what, text.as_bytes())
    }

    /// Bytes, found by their longest part without NUL and newline, between which grep(1) looks.
    pub fn bytes(what: &str, bytes: &[u8]) -> Self {
        let longest = bytes
            .split(|byte| matches!(byte, 0 | b'\n'))
            .max_by_key(|run| run.len())
            .unwrap_or_default();
        assert!(longest.len() >= SHORTEST, "{what} is too short to look for");
        Self {
            what: what.to_owned(),
            bytes: longest.to_owned(),
        }
    }
}

/// Which of these stand in the rest of `source`, by grep(1): fast enough for the memory of a VM.
pub fn found_in(mut source: impl Read, needles: &[Needle]) -> BTreeSet<String> {
    let mut grep = grep(needles)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("grep is installed");
    let mut into = grep.stdin.take().expect("piped");
    let mut out_of = grep.stdout.take().expect("piped");
    let hits = std::thread::spawn(move || {
        let mut hits = Vec::new();
        out_of.read_to_end(&mut hits).expect("grep ends");
        hits
    });
    let mut buffer = vec![0; 1 << 16];
    let nothing = vec![0; buffer.len()];
    loop {
        let read = source.read(&mut buffer).expect("it can be read");
        if read == 0 {
            break;
        }
        // Most of a VM's memory was never used, and one NUL parts what it parts as well as many.
        let part = if buffer[..read] == nothing[..read] {
            &nothing[..1]
        } else {
            &buffer[..read]
        };
        into.write_all(part).expect("grep reads on");
    }
    drop(into);
    let status = grep.wait().expect("our child");
    // 1: nothing found; anything above would be taken for that.
    assert!(matches!(status.code(), Some(0 | 1)), "grep: {status}");
    let hits = hits.join().expect("it does not panic");
    let hits: BTreeSet<&[u8]> = hits.split(|byte| *byte == 0).collect();
    let held = |needle: &&Needle| hits.contains(needle.bytes.as_slice());
    needles
        .iter()
        .filter(held)
        .map(|needle| needle.what.clone())
        .collect()
}

/// Which of these stand in files below a directory, without following links, as `what in path`; `leave` names entries of
/// the directory that are not looked at.
pub fn found_below(directory: &Path, leave: &[&str], needles: &[Needle]) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let paths: Vec<PathBuf> = entries
        .filter(|entry| !leave.iter().any(|name| entry.file_name() == *name))
        // grep follows the links that it is given, though not those that it meets.
        .filter(|entry| entry.file_type().is_ok_and(|kind| !kind.is_symlink()))
        .map(|entry| entry.path())
        .collect();
    if paths.is_empty() {
        return Vec::new();
    }
    // One for the whole tree: a process for each file would take minutes.
    let mut command = grep(needles);
    command
        .args(["--recursive", "--devices=skip", "--no-messages"])
        .args(["--with-filename", "--null", "--"])
        .args(&paths)
        .stdin(Stdio::null());
    let output = command.output().expect("grep is installed");
    // 2: something has vanished meanwhile, and holds nothing.
    let code = output.status.code();
    assert!(matches!(code, Some(0..=2)), "grep: {}", output.status);
    let fields: Vec<&[u8]> = output.stdout.split(|byte| *byte == 0).collect();
    let mut found = BTreeSet::new();
    for pair in fields.chunks_exact(2) {
        let path = String::from_utf8_lossy(pair[0]).into_owned();
        for needle in needles.iter().filter(|needle| needle.bytes == pair[1]) {
            found.insert(format!("{} in {path}", needle.what));
        }
    }
    found.into_iter().collect()
}

/// Prints what it finds, each ended by NUL; where two needles overlap, the first.
fn grep(needles: &[Needle]) -> Command {
    let mut command = Command::new("grep");
    command.args([
        "--text",
        "--only-matching",
        "--fixed-strings",
        "--null-data",
    ]);
    for needle in needles {
        command.arg("-e").arg(OsStr::from_bytes(&needle.bytes));
    }
    // Bytes, not characters.
    command.env("LC_ALL", "C");
    command
}
