//! docs/runner-testing.md, done as it says, by a user who is not root and reads every file without sudo.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;
use std::process::{Command, Output};

use e2e::{LONG, METAL_NAME, Metal, eventually_some, kept, skip};
use serde_json::Value;

/// The document's pictures, the sites that they show, and the colour that the test's web gives each of these.
const SHOTS: [(&str, &str, [u8; 3]); 3] = [
    ("test.png", "example.com", [0xfa, 0x4e, 0xb9]),
    ("hn.png", "news.ycombinator.com", [0x31, 0x73, 0x71]),
    ("gh.png", "github.com", [0x35, 0xa2, 0xce]),
];

/// A command block of the document.
struct Block {
    /// What stands beside `sh`.
    kind: String,
    text: String,
}

fn blocks() -> Vec<Block> {
    let document = include_str!("../../../../docs/runner-testing.md");
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for line in document.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => block.text += &format!("{line}\n"),
            (None, Some(info)) => {
                open = Some(Block {
                    kind: info.to_owned(),
                    text: String::new(),
                });
            }
            (None, None) => {}
        }
    }
    blocks.retain(|block| block.kind.starts_with("sh"));
    // What ends it comes last: the chapter on debugging stands behind it.
    blocks.sort_by_key(|block| (block.text.contains("runner:remove"), block.kind == "sh api"));
    blocks
}

/// Runs a block as somebody types it.
fn typed(metal: &Metal, text: &str) -> Output {
    let mut bash: Command = metal.laptop("bash");
    bash.args(["-o", "pipefail", "-c", text]).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The document from its first command to its last; `slow` also with the browser.
fn follow(metal: &Metal, profile: &str, slow: bool) {
    let mut last_run = String::new();
    let mut done = 0;
    for block in blocks() {
        if block.kind == "sh slow" && !slow {
            continue;
        }
        let job = block
            .text
            .contains("<run-id-prefix>")
            .then(|| metal.submit("sleep 1000"));
        let active = job
            .as_ref()
            .map(|_| eventually_some("a job runs", LONG, || metal.active().pop()));
        let mut text = block
            .text
            .replace("vm0/default", profile)
            .replace("<host>", "198.18.0.1")
            .replace("<name>", METAL_NAME)
            .replace("<run-id>", &last_run);
        if let Some(active) = &active {
            text = text.replace("<run-id-prefix>", &active[..8]);
        }
        if block.kind == "sh slow" {
            // Only to look at the pictures afterwards: the job's last files come out of the VM.
            let files = SHOTS
                .iter()
                .filter(|(name, ..)| text.contains(&format!("/{name} ")));
            let collect: String = files
                .map(|(name, ..)| format!(" --collect /tmp/{name}=shots"))
                .collect();
            text = format!("{}{collect}\n", text.trim_end());
        }
        if block.kind == "sh api" {
            metal
                .settings("VM0_API_URL=https://api.example.com\nVM0_RUNNER_TOKEN='a \"token\" $x'");
        }
        let main = if done == 0 {
            String::new()
        } else {
            metal.property("MainPID")
        };
        let output = typed(metal, &text);
        if block.kind == "sh api" {
            // What is no runner token is one clear error; what ran goes on. The token is nobody's to read.
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success(), "{output:?}");
            assert!(told.contains("the token is no runner token"), "{told}");
            assert_eq!(metal.property("MainPID"), main);
        } else {
            assert!(output.status.success(), "{text}: {output:?}");
        }
        let out = said(&output);
        if text.contains("runner:submit") && !text.contains("jq") {
            let result: Value = serde_json::from_str(out.trim()).expect("nothing but a result");
            assert_eq!(result["exit_code"], 0, "{out}");
            last_run = result["run_id"].as_str().unwrap().to_owned();
        } else if text.contains("jq") {
            assert_eq!(out, "0\n");
        } else if text.contains("runner:exec") {
            // The laptop's shell expands what stands in double quotes, as the document says; the rest ran in the guest.
            assert!(
                out.contains("sleep 1000") && out.contains("root is who"),
                "{out}"
            );
        } else if text.contains("system-") {
            assert!(out.contains("Mem:"), "{out}");
        } else if text.contains("network-") {
            for line in out.lines() {
                serde_json::from_str::<Value>(line).expect("a line of JSON");
            }
            if slow {
                for (_, site, _) in &SHOTS[1..] {
                    assert!(out.contains(site), "no {site} in {out}");
                }
            }
        } else if text.contains("journalctl") {
            assert!(out.contains("job ended"), "{out}");
        } else if text.contains("status.json") {
            let status: Value = serde_json::from_str(&out).expect("JSON");
            assert_eq!(status["mode"], "running");
        } else if text.contains("proxy-registry.json") {
            serde_json::from_str::<Value>(&out).expect("JSON");
        } else if text.contains("--local") && text.contains("systemctl") {
            assert!(out.contains("start --config"), "{out}");
        }
        if let (Some(job), Some(active)) = (job, active) {
            let kill = format!("~/.vm0-runner/bin/{METAL_NAME}/runner kill {active}");
            metal.on_host(&kill);
            assert_ne!(job.result()["exit_code"], 0);
        }
        done += 1;
    }
    assert!(done >= 10, "{done} blocks");
}

/// Nothing of the runner is on the host, and what others need is; who did what to its jobs is still to be known.
fn removed(metal: &Metal) {
    let left = metal.on_host(&format!(
        "cd ~/.vm0-runner && find . -name '*{METAL_NAME}*' -o -path './logs/*' ! -name audit.jsonl -o -path './groups/*/*' -o -name '*.service' | sort; \
         ls /run/systemd/system /etc/systemd/system | grep {METAL_NAME}; sudo -n ls /run/vm0/slots | wc -l >/dev/null; \
         pgrep -u root,dev -a runner || true"
    ));
    assert_eq!(left, "");
    metal.on_host("ls ~/.vm0-runner/images/*/manifest.json ~/.vm0-runner/ca/ca.pem ~/.vm0-runner/proxy/current");
}

#[test]
fn every_command_of_the_document_works_as_written() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    if !metal.has_pnpm() {
        skip("pnpm comes by npm, which is not installed");
        return metal.finish();
    }
    follow(&metal, "vm0/small", false);
    removed(&metal);
    // With --all the home goes too.
    metal.settings("");
    let all = metal.dev_runner(&["remove", "--all"]).output().unwrap();
    assert!(all.status.success(), "{all:?}");
    assert_eq!(metal.on_host("ls -A ~ | grep vm0 || true"), "");
    metal.finish();
}

/// Colours of a picture, and keeps it for a person to look at.
fn colours(png: &Path, name: &str) -> BTreeSet<[u8; 3]> {
    let place = kept(name);
    fs::copy(png, &place).unwrap();
    let mut reader = png::Decoder::new(BufReader::new(File::open(png).unwrap()))
        .read_info()
        .unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let frame = reader.next_frame(&mut pixels).unwrap();
    let samples = frame.color_type.samples();
    pixels[..frame.buffer_size()]
        .chunks_exact(samples)
        .map(|pixel| [pixel[0], pixel[1], pixel[2]])
        .collect()
}

#[test]
fn the_browser_commands_of_the_document_show_their_pages() {
    let sites = SHOTS.map(|(_, site, _)| site);
    let Some(metal) = Metal::with_sites("vm0/default", &sites) else {
        return;
    };
    if !metal.has_pnpm() {
        skip("pnpm comes by npm, which is not installed");
        return metal.finish();
    }
    // Here the deploy builds the runner itself, for the architecture that the host says it has.
    metal.settings("RUNNER_BINARY=");
    follow(&metal, "vm0/default", true);
    for (name, site, colour) in SHOTS {
        let png = metal.laptop_directory().join(name);
        let sent = metal.ssh(&format!("cat shots/{name}"));
        fs::write(&png, sent.stdout).unwrap();
        let seen = colours(&png, &format!("document-{name}"));
        assert!(seen.contains(&colour), "{site}: {} colours", seen.len());
    }
    metal.finish();
}
