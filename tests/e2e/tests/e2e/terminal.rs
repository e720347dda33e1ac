//! `runner exec -it` in a real terminal.

use std::process::{Command, Output};

use e2e::{Host, LONG, eventually};

/// A tmux server of this test's own. Dropping it ends it and what runs in it.
pub(crate) struct Tmux {
    socket: tempfile::TempDir,
}

impl Tmux {
    /// `None`, with the reason reported, where there is no tmux.
    pub(crate) fn new() -> Option<Self> {
        if Command::new("tmux").arg("-V").output().is_err() {
            e2e::skip("it needs tmux");
            return None;
        }
        Some(Self {
            socket: tempfile::tempdir().unwrap(),
        })
    }

    fn run(&self, args: &[&str]) -> Output {
        Command::new("tmux")
            .arg("-S")
            .arg(self.socket.path().join("s"))
            .args(args)
            .output()
            .unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "tmux {args:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn screen(&self) -> String {
        self.ok(&["capture-pane", "-p"])
    }

    fn shows(&self, wanted: &str) {
        eventually(
            &format!("{wanted:?} on the screen:\n{}", self.screen()),
            LONG,
            || self.screen().contains(wanted),
        );
    }

    fn types(&self, line: &str) {
        self.ok(&["send-keys", line, "Enter"]);
    }

    /// Opens `exec <prefix> -it -- bash` of a run in a window, and checks that it is a terminal in every respect.
    pub(crate) fn try_out(self, host: &Host, run: &str) {
        let exec = host.runner(&["exec", &run[..8], "-it", "--", "bash"]);
        let mut line = format!(
            "VM0_RUNNER_HOME={} {}",
            host.home().display(),
            exec.get_program().display()
        );
        for argument in exec.get_args() {
            line += &format!(" {}", argument.display());
        }
        self.ok(&[
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            "90",
            "-y",
            "30",
            &line,
        ]);
        self.shows("$");
        self.types("tty && echo size=$(stty size)");
        self.shows("size=30 90");
        self.shows("/dev/pts/");
        self.ok(&["resize-window", "-x", "111", "-y", "40"]);
        self.types("clear; echo now=$(stty size)");
        self.shows("now=40 111");
        // Ctrl-C reaches the guest's program, not the command.
        // Only once that program has the terminal: a terminal that is signalled forgets what is typed and printed.
        self.types("(echo begun=$((20 + 2)); exec sleep 500)");
        self.shows("begun=22");
        self.ok(&["send-keys", "C-c"]);
        self.types("echo still=$((40 + 2))");
        self.shows("still=42");
        self.types("exit");
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        self.run(&["kill-server"]);
    }
}
