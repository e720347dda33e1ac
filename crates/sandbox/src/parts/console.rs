//! The serial console's tail, kept for the error of a VM that did not come up or panicked.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

/// Bytes kept: a panic with its call trace, no more. A guest may print as much as it likes.
const KEPT: usize = 8 * 1024;

/// Reads a console for as long as it exists.
#[derive(Debug)]
pub struct Console {
    tail: Arc<Mutex<VecDeque<u8>>>,
    reader: JoinHandle<()>,
}

impl Console {
    /// Starts reading.
    pub fn start(mut stream: UnixStream) -> Console {
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let kept = Arc::clone(&tail);
        let reader = tokio::spawn(async move {
            let mut buffer = [0; 1024];
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                let Some(new) = buffer.get(..length) else {
                    break;
                };
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend(new);
                let excess = kept.len().saturating_sub(KEPT);
                kept.drain(..excess);
            }
        });
        Console { tail, reader }
    }

    /// Reads on until the process's end is closed: what it printed last is then in the tail.
    pub async fn finish(&mut self) {
        if !self.reader.is_finished() {
            let _ = (&mut self.reader).await;
        }
    }

    /// What was printed last, control characters made harmless.
    pub fn tail(&self) -> String {
        let kept = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        printable(&bytes)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Escapes what a terminal would act on; keeps line breaks.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .filter(|character| *character != '\r')
        .flat_map(|character| {
            let harmless = character == '\n' || !character.is_control();
            let escaped = (!harmless).then(|| character.escape_default());
            harmless
                .then_some(character)
                .into_iter()
                .chain(escaped.into_iter().flatten())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn keeps_the_tail_of_a_flood_and_disarms_it() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut console = Console::start(ours);
        theirs.write_all(&vec![b'x'; 100 * 1024]).await.unwrap();
        theirs
            .write_all(b"\r\n\x1b[31mKernel panic\x07\r\n")
            .await
            .unwrap();
        drop(theirs);
        console.finish().await;
        let tail = console.tail();
        assert!(tail.len() < KEPT + 64);
        assert!(tail.ends_with("x\n\\u{1b}[31mKernel panic\\u{7}\n"));
    }
}
