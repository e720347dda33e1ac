//! Claims that are on their way while something else happens.

use api_types::runner::{
    ExecutionContext, FirewallSecrets, Inputs, LeaseVerdict, NumberedInput, Offer, RunPolicy,
};
use std::collections::BTreeMap;

use super::*;

/// A provider that has been told to claim a run.
pub(super) struct Bench {
    _top: tempfile::TempDir,
    pub(super) home: Home,
    pub(super) provider: ApiProvider,
    pub(super) run: RunId,
    pub(super) asked: mpsc::UnboundedReceiver<Asked>,
    told: mpsc::UnboundedReceiver<ProviderEvent>,
}

impl Bench {
    pub(super) async fn claiming() -> Self {
        Self::claiming_at(|_, _| ()).await
    }

    /// With something that was there before.
    pub(super) async fn claiming_at(before: impl FnOnce(&Home, RunId)) -> Self {
        let (top, home) = home();
        let (settings, asked) = open_api().await;
        let (tell, told) = mpsc::unbounded_channel();
        let tell = move |event| {
            let _ = tell.send(event);
        };
        let provider = ApiProvider::start(settings, &home, runner("new"), tell).unwrap();
        let run = RunId::random();
        before(&home, run);
        provider.0.lock().offered.insert(run, head(run));
        provider.claim(run);
        Self {
            _top: top,
            home,
            provider,
            run,
            asked,
            told,
        }
    }

    /// The next request but heartbeats that nobody waits for, and those without the lease.
    pub(super) async fn asked(&mut self, path: &str) -> Asked {
        let next = async {
            loop {
                let asked = self.asked.recv().await.unwrap();
                let idle = asked.body["leases"].as_array().is_some_and(Vec::is_empty);
                if !asked.path.ends_with("/heartbeat") || (!idle && path == "/heartbeat") {
                    return asked;
                }
                asked.take_heartbeat(Vec::new());
            }
        };
        let asked = tokio::time::timeout(PATIENCE, next).await;
        let asked = asked.unwrap_or_else(|_| panic!("{path} is not asked for"));
        let (plain, _) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
        let found = plain.ends_with(path) || asked.path.ends_with(path);
        assert!(found, "{} {}", asked.path, asked.body);
        asked
    }

    /// A heartbeat of the run is answered with this revision of its policy.
    async fn renewed_with_policy(&mut self, revision: u64) {
        self.provider.0.beat.notify_one();
        let heartbeat = self.asked("/heartbeat").await;
        self.renew(heartbeat, revision);
    }

    fn renew(&self, heartbeat: Asked, policy_revision: u64) {
        heartbeat.take_heartbeat(vec![LeaseAnswer {
            run_id: self.run,
            epoch: 1,
            verdict: LeaseVerdict::Renewed,
            cancel_requested: false,
            policy_revision,
            inputs: 0,
        }]);
    }

    /// The daemon is told to stop.
    fn leave(&self) {
        let stopping = |view: &mut View| view.mode = Some(Mode::Stopping);
        self.provider.0.view.send_modify(stopping);
    }

    /// What is told next, but that something changed.
    pub(super) async fn told(&mut self) -> ProviderEvent {
        let next = async {
            loop {
                match self.told.recv().await.unwrap() {
                    ProviderEvent::Changed => {}
                    event => return event,
                }
            }
        };
        let told = tokio::time::timeout(PATIENCE, next).await;
        told.expect("nothing is told")
    }

    pub(super) fn context(&self) -> ExecutionContext {
        ExecutionContext {
            run_id: self.run,
            epoch: 1,
            lease_secs: 60,
            sandbox_token: "token".to_owned(),
            profile: "vm0/small".parse().unwrap(),
            prompt: "true".to_owned(),
            working_dir: "/tmp".to_owned(),
            cli_agent_type: "claude-code".parse().unwrap(),
            environment: BTreeMap::new(),
            session_id: None,
            resume_session: None,
            timeout_secs: None,
            policy: None,
            group_policy: None,
            secrets: vec!["KEY".parse().unwrap()],
            api_start_time: 0,
            policy_revision: 0,
            accepts_input: false,
            inputs: 0,
        }
    }

    /// The run is won, its secrets are on their way, and a heartbeat brings this meanwhile.
    async fn won_and_told(&mut self, verdict: LeaseVerdict, cancel_requested: bool) -> Asked {
        let claim = self.asked("/claim").await;
        claim.answer(&self.context());
        let secrets = self.asked("/firewall/auth").await;
        self.provider.0.beat.notify_one();
        let heartbeat = self.asked("/heartbeat").await;
        heartbeat.take_heartbeat(vec![LeaseAnswer {
            run_id: self.run,
            epoch: 1,
            verdict,
            cancel_requested,
            policy_revision: 0,
            inputs: 0,
        }]);
        // To a daemon that does not have the run yet.
        let event = self.told().await;
        assert!(matches!(event, ProviderEvent::Cancelled(run) if run == self.run));
        secrets
    }
}

#[tokio::test]
async fn a_run_that_is_cancelled_while_it_is_claimed_is_cancelled_when_it_is_ours() {
    let mut bench = Bench::claiming().await;
    let secrets = bench.won_and_told(LeaseVerdict::Renewed, true).await;
    secrets.answer(&FirewallSecrets {
        secrets: Vec::new(),
    });
    let event = bench.told().await;
    assert!(
        matches!(&event, ProviderEvent::Claimed(job) if job.job.run_id == bench.run),
        "{event:?}"
    );
    let event = bench.told().await;
    assert!(
        matches!(event, ProviderEvent::Cancelled(run) if run == bench.run),
        "{event:?}"
    );
}

#[tokio::test]
async fn a_run_whose_lease_is_lost_while_it_is_claimed_is_not_ours() {
    let mut bench = Bench::claiming().await;
    let secrets = bench.won_and_told(LeaseVerdict::Lost, false).await;
    secrets.answer(&FirewallSecrets {
        secrets: Vec::new(),
    });
    let event = bench.told().await;
    assert!(
        matches!(event, ProviderEvent::Lost(run) if run == bench.run),
        "{event:?}"
    );
    assert!(bench.provider.0.lock().held.is_empty());
}

#[tokio::test]
async fn a_policy_that_is_late_does_not_replace_a_newer_one() {
    let mut bench = Bench::claiming().await;
    let claim = bench.asked("/claim").await;
    claim.answer(&ExecutionContext {
        secrets: Vec::new(),
        policy_revision: 4,
        ..bench.context()
    });
    let event = bench.told().await;
    assert!(matches!(event, ProviderEvent::Claimed(_)), "{event:?}");
    let policy = |policy_revision| RunPolicy {
        policy: None,
        policy_revision,
    };
    let set = |bench: &Bench| bench.provider.0.lock().held[&bench.run].policy.set;
    bench.renewed_with_policy(5).await;
    let first = bench.asked("/policy").await;
    bench.renewed_with_policy(6).await;
    // Whatever is asked for while the first is on its way would come before these heartbeats.
    bench.renewed_with_policy(6).await;
    bench.renewed_with_policy(6).await;
    first.answer(&policy(5));
    let second = bench.asked("/policy").await;
    assert_eq!(set(&bench), 5);
    // From a replica that is behind: it is asked again.
    second.answer(&policy(4));
    let third = loop {
        bench.provider.0.beat.notify_one();
        match bench.asked.recv().await.unwrap() {
            asked if asked.path.contains("/policy") => break asked,
            asked => bench.renew(asked, 6),
        }
    };
    assert_eq!(set(&bench), 5);
    third.answer(&policy(6));
    let newest = async {
        while set(&bench) != 6 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, newest).await.unwrap();
}

#[tokio::test]
async fn a_claim_that_nobody_answers_does_not_keep_a_daemon_that_leaves() {
    let mut bench = Bench::claiming().await;
    let claim = bench.asked("/claim").await;
    claim.refuse(ProblemKind::Unavailable);
    let _hanging = bench.asked("/claim").await;
    bench.leave();
    // Whatever is waited for from here on, it is not the network.
    tokio::time::pause();
    let event = bench.told().await;
    assert!(
        matches!(event, ProviderEvent::Lost(run) if run == bench.run),
        "{event:?}"
    );
}

#[tokio::test]
async fn a_run_that_is_won_by_a_daemon_that_leaves_is_given_back() {
    let mut bench = Bench::claiming().await;
    let claim = bench.asked("/claim").await;
    claim.answer(&bench.context());
    let secrets = bench.asked("/firewall/auth").await;
    bench.leave();
    secrets.answer(&FirewallSecrets {
        secrets: Vec::new(),
    });
    let release = bench.asked("/release").await;
    assert_eq!(release.body["epoch"], 1);
    // The daemon may have nothing else to wait for. It says goodbye, but not before.
    {
        let (provider, asked) = (&bench.provider, &mut bench.asked);
        let leaving = provider.finish();
        let goodbye = async {
            let (mut beats, mut release) = (0, Some(release));
            loop {
                let asked = asked.recv().await.unwrap();
                let stopped = asked.body["mode"] == "stopped";
                asked.take_heartbeat(Vec::new());
                beats += 1;
                if stopped {
                    return release.is_none();
                } else if beats < 3 {
                    provider.0.beat.notify_one();
                } else if let Some(release) = release.take() {
                    release.answer(&());
                }
            }
        };
        provider.0.beat.notify_one();
        let both = futures_util::future::join(leaving, goodbye);
        let ((), given_back) = tokio::time::timeout(PATIENCE, both).await.unwrap();
        assert!(given_back);
    }
    let event = bench.told().await;
    assert!(
        matches!(event, ProviderEvent::Lost(run) if run == bench.run),
        "{event:?}"
    );
    assert!(bench.provider.0.lock().held.is_empty());
}

#[tokio::test]
async fn a_run_that_is_given_back_may_be_offered_before_that_is_answered_and_is_known_then() {
    let mut bench = Bench::claiming().await;
    let claim = bench.asked("/claim").await;
    claim.answer(&ExecutionContext {
        session_id: Some("s".parse().unwrap()),
        ..bench.context()
    });
    let _hanging = bench.asked("/release").await;
    let offer = Offer {
        run_id: bench.run,
        profile: "vm0/small".parse().unwrap(),
        session_id: Some("s".parse().unwrap()),
    };
    let inner = Arc::clone(&bench.provider.0);
    tokio::spawn(async move { discover::offered(&inner, offer).await });
    let event = bench.told().await;
    assert!(
        matches!(event, ProviderEvent::Lost(run) if run == bench.run),
        "{event:?}"
    );
    let event = bench.told().await;
    let ProviderEvent::Found(head) = event else {
        panic!("it is not found: {event:?}");
    };
    // The second time nothing is found out, and it stays.
    bench.provider.claim(bench.run);
    let claim = bench.asked("/claim").await;
    assert_eq!(head.session_id, Some("s".parse().unwrap()));
    claim.answer(&ExecutionContext {
        epoch: 2,
        session_id: Some("s".parse().unwrap()),
        ..bench.context()
    });
    let secrets = bench.asked("/firewall/auth").await;
    secrets.answer(&FirewallSecrets {
        secrets: Vec::new(),
    });
    let event = bench.told().await;
    assert!(matches!(event, ProviderEvent::Claimed(_)), "{event:?}");
}

#[tokio::test]
async fn inputs_reach_the_job_once_and_in_order_whatever_the_api_repeats() {
    let mut bench = Bench::claiming().await;
    let claim = bench.asked("/claim").await;
    claim.answer(&ExecutionContext {
        secrets: Vec::new(),
        accepts_input: true,
        inputs: 1,
        ..bench.context()
    });
    let numbered = |range: std::ops::RangeInclusive<u64>| Inputs {
        inputs: range
            .map(|sequence| NumberedInput {
                sequence,
                text: format!("input {sequence}"),
            })
            .collect(),
        cursor: 70,
    };
    bench
        .asked("after=0&cursor=0")
        .await
        .answer(&numbered(1..=1));
    let ProviderEvent::Claimed(job) = bench.told().await else {
        panic!("it is not claimed");
    };
    let inputs = job.api.unwrap().inputs.unwrap();
    let next = async || inputs.lock().await.recv().await;
    assert_eq!(next().await.as_deref(), Some("input 1"));

    bench.provider.0.beat.notify_one();
    let heartbeat = bench.asked("/heartbeat").await;
    heartbeat.take_heartbeat(vec![LeaseAnswer {
        run_id: bench.run,
        epoch: 1,
        verdict: LeaseVerdict::Renewed,
        cancel_requested: false,
        policy_revision: 0,
        inputs: 3,
    }]);
    bench
        .asked("after=1&cursor=70")
        .await
        .refuse(ProblemKind::Unavailable);
    bench
        .asked("after=1&cursor=70")
        .await
        .answer(&numbered(1..=2));
    bench
        .asked("after=2&cursor=70")
        .await
        .answer(&numbered(1..=3));
    assert_eq!(next().await.as_deref(), Some("input 2"));
    assert_eq!(next().await.as_deref(), Some("input 3"));
    // When the run is over, so is its input.
    bench.provider.0.forget(bench.run);
    assert_eq!(next().await, None);
}

#[tokio::test]
async fn a_run_that_is_offered_again_while_its_claim_is_on_its_way_is_not_found_again() {
    let mut bench = Bench::claiming().await;
    let _hanging = bench.asked("/claim").await;
    let offer = Offer {
        run_id: bench.run,
        profile: "vm0/small".parse().unwrap(),
        session_id: None,
    };
    discover::offered(&bench.provider.0, offer).await;
    let told = std::iter::from_fn(|| bench.told.try_recv().ok());
    let found = |event: &ProviderEvent| matches!(event, ProviderEvent::Found(_));
    assert!(!told.into_iter().any(|event| found(&event)));
}
