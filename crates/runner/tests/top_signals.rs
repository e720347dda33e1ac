//! What ends `runner top` from outside leaves the terminal as it was.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

/// Ends the program also when an assertion fails before it has ended.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn sigterm_and_sighup_leave_the_terminal_as_it_was() {
    let home = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("top-signals-{}", std::process::id()));
    for signal in [Signal::TERM, Signal::HUP] {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = File::from(rustix::fs::open(name, flags, Mode::empty()).unwrap());
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&terminal, size).unwrap();
        let before = tcgetattr(&terminal).unwrap();
        assert!(before.local_modes.contains(LocalModes::ECHO));

        let mut top = Ending(
            Command::new(env!("CARGO_BIN_EXE_runner"))
                .arg("--home")
                .arg(&home)
                .arg("top")
                .env("TERM", "xterm")
                .stdin(terminal.try_clone().unwrap())
                .stdout(terminal.try_clone().unwrap())
                .stderr(terminal.try_clone().unwrap())
                .spawn()
                .unwrap(),
        );
        let (sender, pieces) = mpsc::channel();
        let mut reader = File::from(master);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut shown = String::new();
        let mut shows = |wanted: &str| {
            let until = Instant::now() + Duration::from_secs(60);
            while !shown.contains(wanted) {
                let left = until.saturating_duration_since(Instant::now());
                let piece = pieces.recv_timeout(left);
                let piece = piece.unwrap_or_else(|_| panic!("no {wanted:?} in {shown:?}"));
                shown.push_str(&String::from_utf8_lossy(&piece));
            }
        };
        // The alternate screen, and a frame on it.
        shows("\x1b[?1049h");
        shows("quit");
        let during = tcgetattr(&terminal).unwrap();
        assert!(!during.local_modes.contains(LocalModes::ECHO));

        kill_process(Pid::from_child(&top.0), signal).unwrap();
        shows("\x1b[?1049l");
        let status = top.0.wait().unwrap();
        assert_eq!(
            (status.code(), status.signal()),
            (Some(128 + signal.as_raw()), None)
        );
        let after = tcgetattr(&terminal).unwrap();
        assert_eq!(after.local_modes, before.local_modes);
        assert_eq!(after.input_modes, before.input_modes);
        assert_eq!(after.output_modes, before.output_modes);
    }
    fs::remove_dir_all(&home).unwrap();
}
