//! What is brought of a run's logs, where an earlier claim of it has left some.

use std::io::Write as _;

use api_types::runner::{ExecutionContext, Uploaded};
use host::fs::Access;

use super::claims::Bench;
use super::*;
use crate::home::rel;

fn append(home: &Home, run: RunId, text: &str) {
    home.logs().unwrap();
    let log = rel::system_log(&run);
    let file = home.dir().open_file(log, Access::Append { mode: 0o600 });
    file.unwrap().write_all(text.as_bytes()).unwrap();
}

async fn uploads(asked: &mut mpsc::UnboundedReceiver<Asked>, expected: &[(u64, &str, u64)]) {
    for (start, text, next) in expected {
        let upload = loop {
            let asked = tokio::time::timeout(PATIENCE, asked.recv()).await;
            let asked = asked.expect("nothing is brought").unwrap();
            match asked.path.ends_with("/logs") {
                true => break asked,
                false => asked.take_heartbeat(Vec::new()),
            }
        };
        let body = &upload.body;
        assert_eq!(
            (&body["start"], &body["text"]),
            (&(*start).into(), &(*text).into())
        );
        upload.answer(&Uploaded { next: *next });
    }
}

#[tokio::test]
async fn what_an_earlier_claim_wrote_is_not_brought_again() {
    let mut bench = Bench::claiming_at(|home, run| append(home, run, "earlier €\n")).await;
    bench.asked("/claim").await.answer(&ExecutionContext {
        epoch: 2,
        secrets: Vec::new(),
        ..bench.context()
    });
    let event = bench.told().await;
    assert!(matches!(event, ProviderEvent::Claimed(_)), "{event:?}");
    append(&bench.home, bench.run, "now\n");
    uploads(&mut bench.asked, &[(0, "now\n", 4)]).await;
    append(&bench.home, bench.run, "then\n");
    // The API had more of it than it had said.
    uploads(&mut bench.asked, &[(4, "then\n", 6), (6, "en\n", 9)]).await;

    // Nor by the next process, which brings the answer of this one.
    bench.provider.complete(JobResult::exited(bench.run, 0));
    while !matches!(bench.told().await, ProviderEvent::Completed(_)) {}
    lock(&bench.provider.0.tasks).abort_all();
    let name = "demo".parse().unwrap();
    let gone = rel::instances(&name).join("new");
    bench.home.ensure_dir(gone).unwrap();
    let settings = ApiSettings {
        url: bench.provider.0.api.url().parse().unwrap(),
        token: Zeroizing::new("vm0_runner_a_b".to_owned()),
    };
    let next = ApiProvider::start(settings, &bench.home, runner("next"), |_| {}).unwrap();
    uploads(&mut bench.asked, &[(0, "now\nthen\n", 9)]).await;
    bench.asked("/complete").await.answer(&());
    settled(&next).await;
}
