//! `runner top` in a real terminal.

use std::fs;

use e2e::{Host, kept};

use crate::terminal::Tmux;

#[test]
fn top_shows_runs_pools_and_results_and_its_keys_work_at_both_sizes() {
    let Some(host) = Host::new().warm(1, 1).start() else {
        return;
    };
    let Some(tmux) = Tmux::new() else {
        return host.finish();
    };
    host.submit("exit 3").run().expect_exit(3);
    let first = host.submit("sleep 1000").spawn();
    let one = first.running();
    tmux.open(&host, &["top"], (80, 24));
    tmux.shows(&one[..8]);
    tmux.shows("e2e: running");
    tmux.shows("exit 3");
    tmux.shows("vm0/small: ");
    tmux.shows("MiB");
    tmux.shows("B/s");
    fs::write(kept("top-80x24.txt"), tmux.screen()).unwrap();
    tmux.resize(160, 48);
    // There is room for the whole id, and for the runner.
    tmux.shows(&one);
    tmux.shows("RUNNER");
    fs::write(kept("top-160x48.txt"), tmux.screen()).unwrap();
    tmux.resize(80, 24);

    tmux.keys("?");
    tmux.shows("follow its log");
    fs::write(kept("top-help.txt"), tmux.screen()).unwrap();
    tmux.keys("x");
    tmux.keys("l");
    // The head of the log: what the job itself prints, the mock agent tells at its end.
    tmux.shows("Execution");
    tmux.keys("C-c");
    tmux.shows("Enter leads back");
    tmux.keys("Enter");
    tmux.shows("Ended");
    tmux.keys("s");
    tmux.shows("$");
    tmux.types("echo inside=$((40 + 2))");
    tmux.shows("inside=42");
    tmux.types("exit");
    tmux.shows("Ended");
    tmux.keys("c");
    tmux.shows("Cancel this run?");
    tmux.keys("n");
    assert!(
        host.status().unwrap()["active_runs"]
            .to_string()
            .contains(&one)
    );
    tmux.keys("c");
    tmux.keys("y");
    first.wait().expect_error(&["cancel"]);
    tmux.shows("nothing runs");
    tmux.shows("exit 137");
    tmux.keys("q");
    tmux.ends();
    let json = host.runner(&["top", "--json"]).output().unwrap();
    let data: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(data["runs"], serde_json::json!([]));
    let refused = host.runner(&["top"]).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("needs a terminal"));
    host.finish();
}
