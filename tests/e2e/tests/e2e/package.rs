//! The Debian package, on a host without Rust and this checkout: installed by apt, a job as a service, and off again.

use std::fs::File;
use std::process::Output;

use e2e::Metal;
use serde_json::Value;

/// Files of the host, but for what the kernel, apt, dpkg and systemd keep for themselves, and the home that the host
/// began with.
const LISTING: &str = "sudo -n find / -xdev \\( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /var/tmp \
    -o -path /var/backups -o -path /var/cache -o -path /var/lib/apt -o -path /var/lib/dpkg -o -path /var/lib/systemd -o -path /var/log \
    -o -path /home/dev/.vm0-runner \\) -prune -o -printf '%y %p\\n' | sort";

/// What of a runner could still be there: processes, network namespaces, tables, mounts, users' cgroups.
const REMAINS: &str = "pgrep -fa 'qemu-system|mitmdump|runner start' | grep -v pgrep; sudo -n ip netns list; sudo -n nft list tables; \
    cut -d' ' -f2 /proc/mounts | grep vm0; ls /etc/systemd/system /run/systemd/system | grep vm0; ls -d ~/.vm0-runner 2>/dev/null; true";

fn said(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

#[test]
fn the_package_runs_a_job_on_a_host_without_rust_and_goes_without_a_trace() {
    let Some(metal) = Metal::new("vm0/small") else {
        return;
    };
    let directory = metal.laptop_directory().join("dist");
    let made = metal
        .laptop("scripts/dist.sh")
        .args(["--no-api", "--out"])
        .arg(&directory)
        .arg("--runner")
        .arg(metal.binary())
        .output()
        .expect("it starts");
    assert!(made.status.success(), "{}", said(&made));
    let package = std::fs::read_dir(&directory)
        .expect("it was made")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .expect("a package");

    let before = metal.on_host(LISTING);
    assert!(
        !metal
            .ssh("command -v cargo || command -v rustc")
            .status
            .success()
    );
    let copied = metal
        .laptop("scripts/cf-ssh.sh")
        .args([
            "198.18.0.1",
            "-o",
            "LogLevel=ERROR",
            "--",
            "cat >/tmp/vm0-runner.deb",
        ])
        .stdin(File::open(package).expect("it is there"))
        .output()
        .expect("it starts");
    assert!(copied.status.success(), "{}", said(&copied));
    metal.on_host("sudo -n DEBIAN_FRONTEND=noninteractive apt-get install -y /tmp/vm0-runner.deb");
    metal.on_host("runner setup --check && sudo -n runner setup --profile vm0/small && sudo -n runner build --profile vm0/small");
    metal.on_host(
        "sudo -n runner config --name deb --group vm0/deb --profile vm0/small --warm 0:0 && \
         sudo -n sed -i '/^stop_timeout_secs:/s/:.*/: 1/' ~/.vm0-runner/runners/deb/runner.yaml && \
         grep -q '^stop_timeout_secs: 1$' ~/.vm0-runner/runners/deb/runner.yaml && \
         sudo -n runner service install --config ~/.vm0-runner/runners/deb/runner.yaml --local --env USE_MOCK_CLAUDE=true",
    );
    let answer = metal.on_host(
        "runner local submit --group vm0/deb --profile vm0/small --prompt 'echo from the package' 2>/dev/null | tail -n 1",
    );
    let result: Value = serde_json::from_str(&answer).expect("JSON");
    assert_eq!(result["exit_code"], 0, "{answer}");
    let run = result["run_id"].as_str().expect("an id");
    let log = metal.on_host(&format!("cat ~/.vm0-runner/logs/system-{run}.log"));
    assert!(log.contains("from the package"), "{log}");

    // The program of a service is not removed under it.
    let early = metal.ssh("sudo -n apt-get purge -y vm0-runner");
    assert!(
        !early.status.success() && said(&early).contains("runner uninstall"),
        "{}",
        said(&early)
    );
    // Nobody is asked here, and nothing goes without a word.
    let unasked = metal.ssh("sudo -n runner uninstall");
    assert_eq!(unasked.status.code(), Some(2), "{}", said(&unasked));
    let user = metal.ssh("runner uninstall --yes");
    assert!(
        !user.status.success() && said(&user).contains("sudo"),
        "{}",
        said(&user)
    );
    let would = metal.on_host("sudo -n runner uninstall --dry-run");
    assert!(
        would.contains("would remove the service of runner deb\n"),
        "{would}"
    );
    assert_eq!(
        metal.on_host("systemctl is-active vm0-runner-deb"),
        "active\n"
    );
    // With a job on it, only by force.
    metal.on_host(
        "setsid -f runner local submit --group vm0/deb --profile vm0/small --prompt 'sleep 1000' >/tmp/job 2>&1; \
         until runner local list --group vm0/deb --json | grep -q running; do sleep 0.2; done",
    );
    let busy = metal.ssh("sudo -n runner uninstall --yes");
    assert!(
        !busy.status.success() && said(&busy).contains("active job"),
        "{}",
        said(&busy)
    );
    let removed = metal.on_host("sudo -n runner uninstall --yes --force --json");
    let removed: Value = serde_json::from_str(&removed).expect("JSON");
    assert_eq!(removed["services"][0], "deb", "{removed}");
    metal.on_host("sudo -n apt-get purge -y vm0-runner");

    assert_eq!(metal.on_host(REMAINS), "");
    let after = metal.on_host(LISTING);
    let new: Vec<_> = after
        .lines()
        .filter(|line| !before.lines().any(|was| was == *line))
        .collect();
    let gone: Vec<_> = before
        .lines()
        .filter(|line| !after.lines().any(|is| is == *line))
        .collect();
    assert!(
        new.is_empty() && gone.is_empty(),
        "new: {new:#?}, gone: {gone:#?}"
    );
    metal.finish();
}
