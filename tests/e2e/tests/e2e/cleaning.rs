//! What a runner cleans up: by `runner gc`, and by itself.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use e2e::{Host, LONG, copy_program, eventually};
use serde_json::Value;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn aged(path: &Path, age: Duration) {
    let file = File::open(path).unwrap();
    file.set_modified(SystemTime::now() - age).unwrap();
}

/// A log of a run that nobody knows any more.
fn old_log(host: &Host) -> PathBuf {
    let path = host.log_path("6f1c2f0e-3a7b-4c1d-9e55-0a1b2c3d4e5f");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, "long ago\n").unwrap();
    aged(&path, 30 * DAY);
    path
}

fn gc(host: &Host, args: &[&str]) -> Value {
    let report = tried_gc(host, args);
    assert_eq!(report["failed"], Value::Array(Vec::new()), "{report}");
    report
}

/// The same, where something may have to stay for now.
fn tried_gc(host: &Host, args: &[&str]) -> Value {
    let output = host
        .runner(&[&["gc", "--json"], args].concat())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn removed(report: &Value, kind: &str) -> usize {
    let removed = report["removed"].as_array().unwrap();
    removed.iter().filter(|one| one["kind"] == kind).count()
}

/// The one image of a host's home.
fn image(host: &Host) -> PathBuf {
    let mut images = fs::read_dir(host.home().join("images")).unwrap().flatten();
    images.next().expect("an image").path()
}

/// Makes the host's image and snapshot as old as can be. Their files are links of what all tests share, so each manifest
/// becomes a file of its own first.
fn old_image(host: &Host) {
    let image = image(host);
    let snapshots = fs::read_dir(image.join("snapshots")).unwrap().flatten();
    let snapshots = snapshots.map(|entry| entry.path());
    for directory in snapshots.chain([image.clone()]) {
        let (manifest, copy) = (directory.join("manifest.json"), directory.join("copy"));
        fs::copy(&manifest, &copy).unwrap();
        aged(&copy, 30 * DAY);
        fs::rename(&copy, &manifest).unwrap();
    }
    for entry in fs::read_dir(host.home().join("locks")).unwrap().flatten() {
        aged(&entry.path(), 30 * DAY);
    }
}

#[test]
fn gc_takes_nothing_from_a_running_runner_and_everything_after_it() {
    let Some(host) = Host::new().start() else {
        return;
    };
    // Its configuration is gone, and its image old: the lock of the running daemon is all that keeps it.
    let yaml = fs::read(host.config()).unwrap();
    fs::remove_file(host.config()).unwrap();
    old_image(&host);
    let old = old_log(&host);
    let report = gc(&host, &["--dry-run"]);
    assert_eq!((removed(&report, "log"), old.exists()), (1, true));
    let report = gc(&host, &[]);
    assert_eq!((removed(&report, "log"), old.exists()), (1, false));
    assert_eq!(removed(&report, "image") + removed(&report, "snapshot"), 0);
    assert!(
        report["kept"].to_string().contains("it is in use"),
        "{report}"
    );
    host.submit("echo still here").run().expect_exit(0);
    fs::write(host.config(), yaml).unwrap();

    // A configuration that names it keeps it when nobody runs.
    host.stop();
    old_image(&host);
    let report = gc(&host, &[]);
    assert!(
        report["kept"].to_string().contains("runner.yaml"),
        "{report}"
    );
    fs::remove_file(host.config()).unwrap();
    let whole = image(&host);
    let report = gc(&host, &["--keep-latest", "1"]);
    assert_eq!(removed(&report, "snapshot"), 0, "{report}");
    let report = gc(&host, &[]);
    assert_eq!(
        (removed(&report, "snapshot"), removed(&report, "image")),
        (1, 1)
    );
    assert!(report["bytes"].as_u64().unwrap() > 100 << 20, "{report}");
    assert!(!whole.exists());
    let text = host.runner(&["gc"]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&text.stdout),
        "nothing to clean up\n"
    );
    host.finish();
}

#[test]
fn gc_reclaims_the_slots_of_a_runner_that_was_killed_with_its_launcher() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    job.running();
    let launcher = host.launcher();
    // Stopped, the launcher cannot clean up; killed, it never will.
    launcher.signal(rustix::process::Signal::STOP);
    launcher.kill();
    host.kill_daemon();
    drop(job);
    let rehearsal = gc(&host, &["--dry-run"]);
    assert_eq!(removed(&rehearsal, "slot"), 1, "{rehearsal}");
    // The kernel may let go of its control group late.
    eventually("it is reclaimed", LONG, || {
        removed(&tried_gc(&host, &[]), "slot") == 1
    });
    assert_eq!(removed(&gc(&host, &[]), "slot"), 0);
    // The claim is answered by the next runner, as after any crash.
    host.start_runner();
    host.finish();
}

#[test]
fn a_running_runner_cleans_up_by_itself() {
    let Some(host) = Host::new()
        .option("gc", "{interval_secs: 1, logs_days: 7}")
        .start()
    else {
        return;
    };
    let old = old_log(&host);
    let outcome = host.submit("echo new").run();
    outcome.expect_exit(0);
    eventually("the old log is gone", LONG, || !old.exists());
    assert!(host.log_path(&outcome.run_id()).exists());
    // Said after it is done.
    eventually("it is told", LONG, || {
        host.daemon_log_text().contains("cleaned up")
    });
    host.finish();
}

#[test]
fn deployed_runners_go_when_nobody_starts_them() {
    let Some(host) = Host::new().prepare() else {
        return;
    };
    let bin = host.home().join("bin");
    let deploy = |name: &str, file: &str, program: &str| {
        let directory = bin.join(name);
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join(file);
        copy_program(Path::new(program), &path);
        aged(&path, DAY);
        aged(&directory, DAY);
        path
    };
    let gone = deploy("old", "runner", "/bin/sleep");
    let configured = deploy("e2e", "runner", "/bin/sleep");
    let upload = deploy("e2e", ".runner.new", "/bin/sleep");
    let executed = deploy("v1.2.3", "runner", "/bin/sleep");
    let mut sleeper = Command::new(&executed).arg("1000").spawn().unwrap();
    let report = gc(&host, &[]);
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert_eq!(removed(&report, "deployed"), 2, "{report}");
    let left = [&gone, &configured, &upload, &executed].map(|path| path.exists());
    assert_eq!(left, [false, true, false, true]);
    host.finish();
}
