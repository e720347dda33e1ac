//! What fills a guest's caches before it is saved.

use std::time::Duration;

use guest_control::{Client, ExecSpec, ExitStatus};

use crate::error::SandboxError;

/// Runs the warm-up processes one after another and drops the root they ran on.
pub async fn warm_up(
    client: &Client,
    specs: Vec<ExecSpec>,
    limit: Duration,
) -> Result<(), SandboxError> {
    for spec in specs {
        let program = spec
            .argv
            .first()
            .map(|program| String::from_utf8_lossy(program).into_owned())
            .unwrap_or_default();
        let session = client
            .exec(ExecSpec {
                timeout: Some(limit),
                kill_group_on_exit: true,
                ..spec
            })
            .await?;
        let report = session.wait().await?;
        if report.status != ExitStatus::Exited(0) {
            let mut output = session.attach(0, false);
            let mut said = Vec::new();
            while let Some(chunk) = output.next().await {
                said.extend_from_slice(&chunk.data);
            }
            return Err(SandboxError::Engine {
                step: "warm up",
                message: format!(
                    "{program} ended with {:?}: {}",
                    report.status,
                    String::from_utf8_lossy(&said).escape_debug()
                ),
            });
        }
    }
    client.unmount().await?;
    Ok(())
}
