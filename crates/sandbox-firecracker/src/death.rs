//! Puts the end of a Firecracker process into a sentence.

use host::launcher::Reaped;
use sandbox::Death;
use sandbox::parts::{last_line, panic_line, signal_name};

/// The most telling reason first: a killed process says nothing, so the kernel's account comes before the console's.
/// Firecracker ends with 0 when its guest resets, which is also how a guest powers itself off: there is no switch.
pub(crate) fn death(reaped: Reaped, console: &str) -> Death {
    if reaped.oom_killed {
        return Death {
            reason: "the VM's process exceeded its memory limit and was killed by the host"
                .to_owned(),
            oom: true,
        };
    }
    let reason = match (reaped.signal, panic_line(console), reaped.code) {
        (Some(signal), _, _) => format!(
            "the VM's process was killed by signal {signal}{}",
            signal_name(signal)
        ),
        (None, Some(panic), _) => format!("the guest's kernel panicked: {panic}"),
        (None, None, Some(0)) => "the guest powered itself off".to_owned(),
        (None, None, Some(code)) => format!(
            "the VM's process ended with exit code {code}{}",
            last_line(console)
        ),
        (None, None, None) => "the VM's process ended".to_owned(),
    };
    Death { reason, oom: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_its_own_sentence() {
        let reason = |code, signal, console| {
            let reaped = Reaped {
                code,
                signal,
                oom_killed: false,
            };
            death(reaped, console).reason
        };
        assert_eq!(
            reason(None, Some(9), "Kernel panic - not syncing: x"),
            "the VM's process was killed by signal 9 (SIGKILL)"
        );
        assert_eq!(
            reason(Some(0), None, "[ 1.0] Kernel panic - not syncing: x\nmore"),
            "the guest's kernel panicked: Kernel panic - not syncing: x"
        );
        assert_eq!(reason(Some(0), None, ""), "the guest powered itself off");
        assert_eq!(
            reason(Some(148), None, "a\nbad system call\n\n"),
            "the VM's process ended with exit code 148; the last line of its console was: bad system call"
        );
    }

    #[test]
    fn out_of_memory_wins_and_is_marked() {
        let reaped = Reaped {
            code: None,
            signal: Some(9),
            oom_killed: true,
        };
        assert!(death(reaped, "").oom);
    }
}
