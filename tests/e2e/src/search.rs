//! Looking for what must not be somewhere: texts and bytes, in memory and files.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
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
    let mut grep = command
        // Bytes, not characters.
        .env("LC_ALL", "C")
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
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = source.read(&mut buffer).expect("it can be read");
        if read == 0 {
            break;
        }
        into.write_all(&buffer[..read]).expect("grep reads on");
    }
    drop(into);
    let status = grep.wait().expect("our child");
    // 1: nothing found; anything above would be taken for that.
    assert!(matches!(status.code(), Some(0 | 1)), "grep: {status}");
    let hits = hits.join().expect("it does not panic");
    let hits: BTreeSet<&[u8]> = hits.split(|byte| *byte == 0).collect();
    let held = |needle: &&Needle| {
        let mut windows = hits
            .iter()
            .flat_map(|hit| hit.windows(needle.bytes.len().max(1)));
        windows.any(|window| window == needle.bytes)
    };
    needles
        .iter()
        .filter(held)
        .map(|needle| needle.what.clone())
        .collect()
}

/// Which of these stand in files below a directory, without following links, as `what in path`; `leave` is not looked
/// at.
pub fn found_below(directory: &Path, leave: &[&Path], needles: &[Needle]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if leave.contains(&path.as_path()) {
            continue;
        }
        // What has vanished meanwhile holds nothing.
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        if kind.is_dir() {
            found.extend(found_below(&path, leave, needles));
        } else if kind.is_file()
            && let Ok(file) = File::open(&path)
        {
            let held = found_in(file, needles);
            found.extend(
                held.iter()
                    .map(|what| format!("{what} in {}", path.display())),
            );
        }
    }
    found
}
