//! A signal that ends the dashboard gives the terminal back first: without that its shell would be left without echo, on
//! the alternate screen.

use std::io;
use std::process;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::signal::unix::{SignalKind, signal};

/// Who may write to the terminal: the dashboard while it draws a frame, or the thread that leaves it for good.
#[derive(Clone, Debug, Default)]
pub(super) struct Drawing(Arc<Mutex<()>>);

impl Drawing {
    /// Draws, and is not interrupted in the middle of it.
    pub(super) fn undisturbed<T>(&self, draw: impl FnOnce() -> T) -> T {
        let _held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        draw()
    }
}

/// From now on SIGTERM and SIGHUP restore the terminal and end the process with 128 and the signal's number.
///
/// # Errors
///
/// The signals cannot be watched, or there is no thread to be had.
pub(super) fn watch() -> io::Result<Drawing> {
    let drawing = Drawing::default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Here and not in the thread: a signal that comes before it runs is not lost.
    let (mut terminate, mut hang_up) = {
        let _entered = runtime.enter();
        (
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        )
    };
    let held = drawing.clone();
    // A thread of its own: the dashboard waits for keys, which no signal interrupts.
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let number = runtime.block_on(async {
                tokio::select! {
                    _ = terminate.recv() => libc::SIGTERM,
                    _ = hang_up.recv() => libc::SIGHUP,
                }
            });
            held.undisturbed(|| {
                // After SIGHUP the terminal may be gone, and nobody is there to be told.
                let _ = ratatui::try_restore();
                process::exit(128 + number);
            });
        })?;
    Ok(drawing)
}
