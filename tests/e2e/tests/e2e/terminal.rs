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

    pub(crate) fn screen(&self) -> String {
        // -J: a line that is longer than the window is one line.
        self.ok(&["capture-pane", "-p", "-J"])
    }

    pub(crate) fn shows(&self, wanted: &str) {
        eventually(
            &format!(
                "{wanted:?} on the screen, which began as:\n{}",
                self.screen()
            ),
            LONG,
            || self.screen().contains(wanted),
        );
    }

    pub(crate) fn types(&self, line: &str) {
        self.ok(&["send-keys", line, "Enter"]);
    }

    /// Sends one key.
    pub(crate) fn keys(&self, key: &str) {
        self.ok(&["send-keys", key]);
    }

    /// Changes the window's size.
    pub(crate) fn resize(&self, columns: u16, rows: u16) {
        let (columns, rows) = (columns.to_string(), rows.to_string());
        self.ok(&["resize-window", "-x", &columns, "-y", &rows]);
    }

    /// Opens a window of this size with a command of the runner in it.
    pub(crate) fn open(&self, host: &Host, args: &[&str], (columns, rows): (u16, u16)) {
        let command = host.runner(args);
        let mut line = String::new();
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                line += &format!("{}={} ", name.display(), value.display());
            }
        }
        line += &command.get_program().display().to_string();
        for argument in command.get_args() {
            line += &format!(" {}", argument.display());
        }
        let (columns, rows) = (columns.to_string(), rows.to_string());
        let size = ["-x", &columns, "-y", &rows];
        self.ok(&[
            &["-f", "/dev/null", "new-session", "-d"],
            &size[..],
            &[&line],
        ]
        .concat());
    }

    /// Waits until the command in the window has ended, and with it the server.
    pub(crate) fn ends(&self) {
        eventually("the command has ended", LONG, || {
            !self.run(&["list-sessions"]).status.success()
        });
    }

    /// Opens `exec <prefix> -it -- bash` of a run in a window, and checks that it is a terminal in every respect.
    pub(crate) fn try_out(self, host: &Host, run: &str) {
        self.open(host, &["exec", &run[..8], "-it", "--", "bash"], (90, 30));
        self.shows("$");
        self.types("tty && echo size=$(stty size)");
        self.shows("size=30 90");
        self.shows("/dev/pts/");
        self.resize(111, 40);
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
