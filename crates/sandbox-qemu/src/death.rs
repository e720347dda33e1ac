//! Puts the end of a QEMU process into a sentence.

use host::launcher::Reaped;
use sandbox::Death;
use sandbox::parts::{last_line, panic_line, signal_name};

use crate::qmp::Shutdown;

/// What was known of a process when it ended.
#[derive(Debug)]
pub(crate) struct Evidence<'a> {
    /// What its parent reaped.
    pub(crate) reaped: Reaped,
    /// Whether and why QEMU said it was shutting down.
    pub(crate) shutdown: Option<Shutdown>,
    /// Tail of the console.
    pub(crate) console: &'a str,
}

impl Evidence<'_> {
    /// The most telling reason first: a killed process says nothing, so the kernel's account comes before QEMU's and
    /// QEMU's before the console's, except that a panic is what a guest reset is about.
    pub(crate) fn death(&self) -> Death {
        if self.reaped.oom_killed {
            return Death {
                reason: "the VM's process exceeded its memory limit and was killed by the host"
                    .to_owned(),
                oom: true,
            };
        }
        let reason = if let Some(signal) = self.reaped.signal {
            format!(
                "the VM's process was killed by signal {signal}{}",
                signal_name(signal)
            )
        } else if let Some(panic) = panic_line(self.console) {
            format!("the guest's kernel panicked: {panic}")
        } else {
            match (self.shutdown, self.reaped.code) {
                (Some(Shutdown::GuestPoweredOff), _) => "the guest powered itself off".to_owned(),
                (Some(Shutdown::GuestReset), _) => "the guest reset itself".to_owned(),
                (Some(Shutdown::Signal), _) => {
                    "the VM's process was asked to end by a signal".to_owned()
                }
                (Some(Shutdown::Other) | None, Some(code)) => {
                    format!(
                        "the VM's process ended with exit code {code}{}",
                        last_line(self.console)
                    )
                }
                (Some(Shutdown::Other) | None, None) => "the VM's process ended".to_owned(),
            }
        };
        Death { reason, oom: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(
        code: Option<i32>,
        signal: Option<i32>,
        shutdown: Option<Shutdown>,
        console: &str,
    ) -> String {
        let reaped = Reaped {
            code,
            signal,
            oom_killed: false,
        };
        Evidence {
            reaped,
            shutdown,
            console,
        }
        .death()
        .reason
    }

    #[test]
    fn every_end_has_its_own_sentence() {
        assert_eq!(
            reason(None, Some(9), None, ""),
            "the VM's process was killed by signal 9 (SIGKILL)"
        );
        assert_eq!(
            reason(Some(0), None, Some(Shutdown::GuestPoweredOff), "bye\n"),
            "the guest powered itself off"
        );
        assert_eq!(
            reason(
                Some(0),
                None,
                Some(Shutdown::GuestReset),
                "[    1.0] Kernel panic - not syncing: init died\n[    1.0] CPU: 0\n"
            ),
            "the guest's kernel panicked: Kernel panic - not syncing: init died"
        );
        assert_eq!(
            reason(Some(0), None, Some(Shutdown::GuestReset), ""),
            "the guest reset itself"
        );
        assert_eq!(
            reason(Some(1), None, None, "a\nlast words\n\n"),
            "the VM's process ended with exit code 1; the last line of its console was: last words"
        );
    }

    #[test]
    fn out_of_memory_wins_and_is_marked() {
        let death = Evidence {
            reaped: Reaped {
                code: None,
                signal: Some(9),
                oom_killed: true,
            },
            shutdown: None,
            console: "",
        }
        .death();
        assert!(death.oom);
        assert!(death.reason.contains("memory limit"));
    }
}
