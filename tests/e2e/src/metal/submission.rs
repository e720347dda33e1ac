//! A job that was submitted from a laptop.

use std::process::Child;

use rustix::process::Signal;

use crate::process::Proc;
use crate::text::Text;
use crate::wait::LONG;

/// A job submitted from the laptop.
pub struct Submission {
    pub(super) child: Child,
    pub(super) stdout: Text,
    pub(super) stderr: Text,
}

impl Submission {
    /// Ctrl-C, as the script gets it.
    pub fn interrupt(&self) {
        let script = Proc::open(self.child.id()).expect("it waits for its job");
        script.signal(Signal::INT);
    }

    /// Kills the script.
    pub fn kill(&mut self) {
        self.child.kill().expect("our child");
        self.child.wait().expect("our child");
    }

    /// Waits for its result.
    pub fn result(mut self) -> serde_json::Value {
        let out = self.stdout.all(LONG);
        let status = self.child.wait().expect("our child");
        let line = out.lines().last().unwrap_or_default();
        serde_json::from_str(line)
            .unwrap_or_else(|error| panic!("{error}: {status}: {out:?} {}", self.stderr.now()))
    }

    /// Waits for its result, which is this exit code.
    pub fn expect_exit(self, code: u64) -> String {
        let result = self.result();
        assert_eq!(result["exit_code"], code, "{result}");
        result["run_id"].as_str().expect("an id").to_owned()
    }
}
