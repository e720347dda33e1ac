//! What logs of jobs that ended lately say of the setting they ran in.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

use host::fs::{Access, Dir};

use super::{Line, Outcome};
use crate::home::Home;
use crate::names::RunId;

/// Logs that were written to before are of no interest any more.
const LATELY: Duration = Duration::from_secs(3600);
/// Most logs that are looked at, the newest first.
const MOST: usize = 50;
/// How much of the end of each, bytes.
const TAIL: u64 = 64 << 10;

/// A failure that has a name.
struct Known {
    name: &'static str,
    /// What the log says.
    says: &'static [&'static str],
    what: &'static str,
    fix: &'static str,
}

const KNOWN: &[Known] = &[
    Known {
        name: "not logged in",
        says: &["Not logged in"],
        what: "the real agent CLI ran without credentials",
        fix: "start the runner with the mock agent: runner service start … --env USE_MOCK_CLAUDE=true; or give the job credentials",
    },
    Known {
        name: "upstream certificate",
        says: &[
            "ertificate verify failed",
            "unable to get local issuer certificate",
        ],
        what: "the proxy did not believe a server's certificate, and answered 502 Bad Gateway (or curl ended with 92)",
        fix: "network.ssl_verify_upstream_trusted_ca in runner.yaml has to name the host's list, /etc/ssl/certs/ca-certificates.crt; \
              an authority of your own goes into /usr/local/share/ca-certificates, then sudo update-ca-certificates, then restart the runner",
    },
    Known {
        name: "HTTP/2 stream",
        says: &["curl: (92)"],
        what: "curl ended with 92, an HTTP/2 stream that was not closed cleanly: most often the server broke its answer off",
        fix: "runner logs RUN --network says why; \"certificate verify failed\": see network.ssl_verify_upstream_trusted_ca",
    },
];

/// What is found, one line for each kind.
pub(super) fn look(home: &Home) -> Vec<Line> {
    let Ok(logs) = home.logs() else {
        return Vec::new();
    };
    let mut recent: Vec<(SystemTime, String, RunId)> = Vec::new();
    for entry in logs.list().unwrap_or_default() {
        let Some(name) = entry.name.to_str() else {
            continue;
        };
        let run = name
            .strip_prefix("system-")
            .and_then(|rest| rest.strip_suffix(".log"))
            .or_else(|| name.strip_prefix("network-")?.strip_suffix(".jsonl"));
        let Some(run) = run.and_then(|run| run.parse().ok()) else {
            continue;
        };
        let written = logs.metadata(name).ok().flatten();
        let Some(written) = written.and_then(|meta| meta.modified().ok()) else {
            continue;
        };
        if written.elapsed().unwrap_or_default() < LATELY {
            recent.push((written, name.to_owned(), run));
        }
    }
    recent.sort_by(|a, b| b.cmp(a));
    let mut found: BTreeMap<&'static str, (&Known, Vec<RunId>)> = BTreeMap::new();
    for (_, name, run) in recent.iter().take(MOST) {
        let text = tail(&logs, name);
        for known in KNOWN {
            if known.says.iter().any(|says| text.contains(says)) {
                let (_, runs) = found.entry(known.name).or_insert((known, Vec::new()));
                if !runs.contains(run) {
                    runs.push(*run);
                }
            }
        }
    }
    let line = |(known, runs): (&Known, Vec<RunId>)| {
        let first = runs.first().map(ToString::to_string).unwrap_or_default();
        let more = match runs.len() {
            0 | 1 => String::new(),
            several => format!(" and {} more", several.saturating_sub(1)),
        };
        Line {
            name: known.name,
            outcome: Outcome::warn(
                format_args!("{} within the last hour: run {first}{more}", known.what),
                known.fix,
            ),
        }
    };
    found.into_values().map(line).collect()
}

fn tail(logs: &Dir, name: &str) -> String {
    let Ok(file) = logs.open_file(name, Access::Read) else {
        return String::new();
    };
    let length = file.metadata().map(|meta| meta.len()).unwrap_or(0);
    let mut text = vec![0; usize::try_from(length.min(TAIL)).unwrap_or(0)];
    match file.read_exact_at(&mut text, length.saturating_sub(TAIL)) {
        Ok(()) => String::from_utf8_lossy(&text).into_owned(),
        Err(_) => String::new(),
    }
}
