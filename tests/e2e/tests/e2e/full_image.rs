//! The full image: the real agent CLI, Chromium, 2 CPUs and 2048 MB. Only the slow tier builds it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e::{Host, HostBuilder, LONG, World, kept};
use rustix::process::Signal;
use serde_json::json;

use crate::terminal::Tmux;

/// A page is shown by an emulated Chromium within this, also on a busy machine.
const BROWSER: Duration = LONG.saturating_mul(2);

fn full() -> HostBuilder {
    Host::new().profile("vm0/default")
}

/// A page of one's own, served inside the VM, and the documented command on it.
fn browse(screenshot: &str) -> String {
    let page = "<title>A page of this VM</title><body style=\"margin:0;background:#204a87;color:#fce94f;font:48px sans-serif\">\
                <h1>Served inside the VM</h1><p style=\"background:#cc0000\">and looked at by Chromium</p>";
    format!(
        "mkdir -p ~/site && cd ~/site && printf %s '{page}' > page.html
python3 -u -m http.server --bind 127.0.0.1 8000 > ~/server.log 2>&1 &
# The server says when it listens.
tail --pid=$! -n +1 -f ~/server.log | grep -q -m1 'Serving HTTP' || exit 90
agent-browser navigate http://127.0.0.1:8000/page.html --screenshot {screenshot} && free -m"
    )
}

/// Checks that a screenshot shows that page, and keeps it for a person to look at; gives where.
fn shows_the_page(png: &Path, name: &str) -> PathBuf {
    let place = kept(name);
    fs::copy(png, &place).expect("the target directory can be written");
    let file = File::open(png).expect("the screenshot");
    let mut reader = png::Decoder::new(BufReader::new(file))
        .read_info()
        .expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
    let frame = reader.next_frame(&mut pixels).expect("a whole PNG");
    assert!(
        (640..=3840).contains(&frame.width) && (360..=2160).contains(&frame.height),
        "{frame:?}"
    );
    let samples = frame.color_type.samples();
    let colours: BTreeSet<&[u8]> = pixels[..frame.buffer_size()]
        .chunks_exact(samples)
        .map(|pixel| &pixel[..3])
        .collect();
    for wanted in [[0x20, 0x4a, 0x87], [0xcc, 0x00, 0x00], [0xfc, 0xe9, 0x4f]] {
        assert!(
            colours.contains(wanted.as_slice()),
            "no {wanted:02x?} among {} colours of {}",
            colours.len(),
            place.display()
        );
    }
    place
}

#[test]
fn a_job_of_the_default_profile_has_two_cpus_and_two_gigabytes() {
    let Some(host) = full().start() else {
        return;
    };
    let outcome = host.submit("nproc && free -m").run();
    outcome.expect_exit(0);
    assert!(outcome.result()["error"].is_null(), "{outcome:?}");
    let log = host.log(&outcome.run_id());
    assert!(log.lines().any(|line| line.trim() == "2"), "{log}");
    let total = log
        .lines()
        .find_map(|line| line.trim().strip_prefix("Mem:")?.split_whitespace().next())
        .and_then(|word| word.parse::<u32>().ok());
    assert!(total.is_some_and(|mb| (1900..=2048).contains(&mb)), "{log}");
    host.finish();
}

#[test]
fn a_screenshot_is_collected_when_the_job_ends() {
    let Some(host) = full().start() else {
        return;
    };
    let here = tempfile::tempdir().unwrap();
    let outcome = host
        .submit(&browse("/tmp/test.png"))
        .arg("--collect")
        .arg(&format!("/tmp/test.png={}", here.path().display()))
        .spawn()
        .wait_within(BROWSER);
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    assert!(log.contains("Mem:"), "{log}");
    shows_the_page(&here.path().join("test.png"), "screenshot-collected.png");
    host.finish();
}

#[test]
fn a_page_of_the_world_is_shown_by_a_browser_that_believes_the_proxy() {
    let Some(world) = World::new() else { return };
    let Some(host) = full().world(&world).start() else {
        return;
    };
    let here = tempfile::tempdir().unwrap();
    // Whoever else asks for the list finds it in root's home too.
    let prompt = "agent-browser navigate https://www.example.com/page --screenshot /tmp/test.png
certutil -L -d sql:$HOME/.pki/nssdb -n vm0-runner-proxy > /dev/null && echo in my list
sudo -H sh -c 'certutil -L -d sql:$HOME/.pki/nssdb -n vm0-runner-proxy > /dev/null' && echo in the list of root";
    let outcome = host
        .submit(prompt)
        .allow("www.example.com")
        .arg("--collect")
        .arg(&format!("/tmp/test.png={}", here.path().display()))
        .spawn()
        .wait_within(BROWSER);
    outcome.expect_exit(0);
    let run = outcome.run_id();
    let log = host.log(&run);
    assert!(
        log.contains(
            "in my list
"
        ) && log.contains(
            "in the list of root
"
        ),
        "{log}"
    );
    shows_the_page(&here.path().join("test.png"), "screenshot-https.png");
    host.network_log(&run).one(&[
        ("url", json!("https://www.example.com/page")),
        ("action", json!("ALLOW")),
        ("status", json!(200)),
    ]);
    host.finish();
    world.finish();
}

#[test]
fn a_screenshot_is_copied_out_of_a_running_vm() {
    let Some(host) = full().start() else {
        return;
    };
    let prompt = format!(
        "{} && touch /tmp/shown && sleep 1000",
        browse("/tmp/test.png")
    );
    let job = host.submit(&prompt).spawn();
    let run = job.running();
    let waited = host
        .runner(&["exec", &run, "--", "timeout", "360", "bash", "-c"])
        .arg("until test -e /tmp/shown; do sleep 0.2; done")
        .output()
        .unwrap();
    assert!(waited.status.success(), "{waited:?}");
    let here = tempfile::tempdir().unwrap();
    let to = here.path().join("copy.png");
    let copied = host
        .runner(&["cp", &format!("{run}:/tmp/test.png"), to.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(copied.status.success(), "{copied:?}");
    shows_the_page(&to, "screenshot-copied.png");
    job.signal(Signal::INT);
    job.wait();
    host.finish();
}

#[test]
fn the_real_cli_without_credentials_says_that_it_is_not_logged_in() {
    let Some(host) = full().real_agent().start() else {
        return;
    };
    let outcome = host.submit("say hello").spawn().wait_within(BROWSER);
    outcome.expect_exit(1);
    let log = host.log(&outcome.run_id());
    assert!(
        outcome.error().contains("Not logged in") || log.contains("Not logged in"),
        "{outcome:?}: {log}"
    );
    host.finish();
}

#[test]
fn exec_it_is_a_real_terminal_beside_a_sleeping_job() {
    let Some(host) = full().start() else {
        return;
    };
    let Some(tmux) = Tmux::new() else {
        return host.finish();
    };
    let job = host
        .submit("until [ -e /tmp/go ]; do sleep 0.2; done")
        .spawn();
    let run = job.running();
    tmux.try_out(&host, &run);
    host.in_vm(&run, "touch /tmp/go");
    job.wait().expect_exit(0);
    host.finish();
}
