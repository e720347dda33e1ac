//! VMs for jobs: up for one, warm before one, kept after one.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use guest_control::{ExecSpec, ExitStatus, UserSpec, Wake};
use sandbox::{BalloonStats, Place, Sandbox, SandboxError, Template};
use tokio::time::timeout;

use super::agent::{AGENT, TIMEOUT_GRACE};
use super::{Setting, VmSource};

/// Limit on the warm-up job: an emulated guest on a busy host.
const WARM_UP_LIMIT: Duration = Duration::from_secs(120);
/// Warm-up jobs before a clone counts as warm. The first brings nearly everything; under emulation the second still takes
/// a fifth off a job's way from submit to result (33 to 27 ms), for 30 ms of a CPU spent while nobody waits.
const WARM_UP_ROUNDS: u32 = 2;

/// Gets a VM that runs and has a mounted disk.
pub(super) async fn vm_up(setting: &Setting, source: VmSource) -> Result<Sandbox, SandboxError> {
    match source {
        VmSource::Paused(sandbox) => {
            sandbox.resume().await?;
            Ok(sandbox)
        }
        VmSource::Restore(template, place) => {
            // Closed only when the process ends.
            let _turn = setting.restores.acquire().await;
            let vm = template.restore(place).await?;
            Ok(Sandbox::adopt(vm, place.slot))
        }
    }
}

/// Time and entropy for a guest that was standing still until now.
pub(crate) fn wake_now() -> Result<Wake, SandboxError> {
    let mut entropy = [0_u8; 32];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty()).map_err(
        |errno| SandboxError::Io {
            action: "get entropy for the guest".to_owned(),
            source: errno.into(),
        },
    )?;
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Wake {
        realtime_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
        entropy,
    })
}

/// Restores a clone, runs the fixed warm-up job through the whole chain (agent, mock CLI, bash) and pauses it. The
/// warm-up knows no secret, and clock and entropy are set again at the claim.
pub(crate) async fn warm_up(
    template: &Arc<dyn Template>,
    place: Place,
) -> Result<Sandbox, SandboxError> {
    let vm = template.restore(place).await?;
    let sandbox = Sandbox::adopt(vm, place.slot);
    for _ in 0..WARM_UP_ROUNDS {
        warm_up_job(&sandbox).await?;
    }
    sandbox.pause(sandbox::PausedAs::Warm).await?;
    Ok(sandbox)
}

async fn warm_up_job(sandbox: &Sandbox) -> Result<(), SandboxError> {
    let env = [
        ("VM0_RUN_ID", "00000000-0000-0000-0000-000000000000"),
        ("VM0_API_URL", ""),
        ("VM0_API_TOKEN", ""),
        ("VM0_WORKING_DIR", "/tmp"),
        ("CLI_AGENT_TYPE", "claude-code"),
        ("VM0_PROMPT", "true"),
        ("USE_MOCK_CLAUDE", "true"),
    ];
    let spec = ExecSpec {
        argv: vec![AGENT.to_vec()],
        env: env.map(|(n, v)| (n.to_owned(), v.to_owned())).to_vec(),
        user: UserSpec::User,
        timeout: Some(WARM_UP_LIMIT),
        wake: Some(wake_now()?),
        kill_group_on_exit: true,
        ..ExecSpec::default()
    };
    let session = sandbox.client().exec(spec).await?;
    let report = timeout(WARM_UP_LIMIT.saturating_add(TIMEOUT_GRACE), session.wait())
        .await
        .map_err(|_| SandboxError::Timeout {
            step: "the end of the warm-up job",
            limit: WARM_UP_LIMIT,
            detail: String::new(),
        })??;
    if report.status != ExitStatus::Exited(0) {
        return Err(SandboxError::Engine {
            step: "warm-up job",
            message: format!("it ended with {:?}", report.status),
        });
    }
    Ok(())
}

/// Makes a VM fit to wait for its session's next job: nothing of the last one runs.
pub(crate) async fn park(sandbox: &Sandbox) -> Result<(), SandboxError> {
    sandbox.client().kill_all().await?;
    sandbox.pause(sandbox::PausedAs::Parked).await
}

/// Has a VM that is parked give its memory back, where its engine can.
pub(crate) async fn give_memory_back(
    sandbox: &Sandbox,
) -> Result<Option<BalloonStats>, SandboxError> {
    match sandbox.reclaim_memory().await {
        Ok(balloon) => Ok(Some(balloon)),
        Err(SandboxError::Unavailable { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
