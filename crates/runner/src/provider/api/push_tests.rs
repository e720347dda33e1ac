//! Commands of operators, in a fake VM whose processes do what a test says.

use async_trait::async_trait;
use guest_control::Client;
use host::slot::SlotId;
use policy::RuleArgument;
use sandbox::fake::{FakeEngine, FakeExec};
use sandbox::{Place, Sandbox, Shape};

use super::*;
use crate::control::protocol::{Failure, Refusal, RunInfo};
use crate::home::{Home, rel};
use crate::status::Status;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon with one VM.
struct OneVm(Sandbox);

#[async_trait]
impl RunLookup for OneVm {
    async fn client(&self, _: RunId) -> Result<Client, Failure> {
        Ok(self.0.client().clone())
    }
    fn blot(&self, _: RunId, text: String) -> String {
        text
    }
    async fn runs(&self) -> Vec<RunInfo> {
        panic!("nobody asks for it")
    }
    async fn cancel(&self, _: RunId) -> Result<(), Failure> {
        panic!("nobody asks for it")
    }
    fn snapshot(&self) -> Option<Status> {
        panic!("nobody asks for it")
    }
    async fn retire(&self, _: u32) {
        panic!("nobody asks for it")
    }
    async fn status(&self) -> String {
        panic!("nobody asks for it")
    }
    async fn policy(&self, _: RunId) -> Result<String, Refusal> {
        panic!("nobody asks for it")
    }
    async fn change_policy(
        &self,
        _: RunId,
        _: &[RuleArgument],
        _: &[RuleArgument],
    ) -> Result<String, Refusal> {
        panic!("nobody asks for it")
    }
}

/// A command that runs, what is said of it, and its process.
async fn running(home: &Home) -> (Wanted, mpsc::Receiver<FromRunner>, FakeExec) {
    let (engine, _) = FakeEngine::new();
    let (started, mut execs) = mpsc::unbounded_channel();
    engine.on_exec(move |exec| drop(started.send(exec)));
    let shape = Shape {
        vcpu: 1,
        memory_mb: 128,
        disk_mb: 64,
    };
    let place = Place::unplugged(SlotId(3));
    let vm = engine.template(shape).restore(place).await.unwrap();
    home.logs().unwrap();
    let dir = home.dir().try_clone().unwrap();
    let logs = move || dir.open_dir(rel::LOGS);
    let operators = Operators {
        lookup: Arc::new(OneVm(Sandbox::adopt(vm, place.slot))),
        audit: Audit::new(logs, "demo".parse().unwrap(), "i1".to_owned()),
    };
    let start = Start {
        exec_id: "e".to_owned(),
        run: RunId::random(),
        argv: vec!["sleep".to_owned()],
        by: None,
        pty: None,
    };
    let (input, inputs) = mpsc::channel(MAX_QUEUED);
    let (end, ended) = oneshot::channel();
    let (say, said) = mpsc::channel(64);
    tokio::spawn(command(Arc::new(operators), 0, start, inputs, ended, say));
    let exec = tokio::time::timeout(PATIENCE, execs.recv()).await;
    let wanted = Wanted { input, _end: end };
    (wanted, said, exec.unwrap().unwrap())
}

#[tokio::test]
async fn a_command_that_reads_nothing_ends_when_nobody_wants_it() {
    let top = tempfile::tempdir().unwrap();
    let home = Home::open_or_create(&top.path().join("home")).unwrap();
    let (wanted, mut said, exec) = running(&home).await;
    // More than a guest takes of what nobody reads.
    let much = Bytes::from(vec![b'x'; 1 << 20]);
    wanted.input.send(Input::Data(much)).await.unwrap();
    let taken = async {
        while wanted.input.capacity() < MAX_QUEUED {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, taken).await.unwrap();
    drop(wanted);
    let killed = tokio::time::timeout(PATIENCE, exec.signalled()).await;
    killed.expect("it goes on");
    drop(exec);
    let last = tokio::time::timeout(PATIENCE, said.recv()).await.unwrap();
    assert!(
        matches!(
            last,
            Some(FromRunner::ExecExit {
                exit_code: Some(137),
                ..
            })
        ),
        "{last:?}"
    );
}
