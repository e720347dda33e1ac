//! Whatever is tried on a run, in whatever order, keeps these promises.

use api_types::RunnerName;
use proptest::prelude::*;

use super::*;
use crate::run::fixture;

fn entry(on_lost: OnRunnerLost) -> Entry {
    Entry {
        on_lost,
        ..fixture::entry()
    }
}

fn runner(n: u8) -> RunnerId {
    RunnerId::from_hash([n; 16])
}

fn holder(n: u8) -> Holder {
    Holder {
        runner_id: runner(n),
        runner_name: Some("metal-1".parse::<RunnerName>().unwrap()),
        claimed_at: 2,
    }
}

fn claim(n: u8, attempt: u8) -> Command {
    Command::Claim {
        holder: holder(n),
        claim: ClaimId::from_hash([attempt; 16]),
        revision: 7,
    }
}

fn write(entry: &Entry, command: &Command) -> Entry {
    match transition(entry, command, 9).unwrap() {
        Step::Write(next) => *next,
        Step::Same => panic!("nothing to write"),
    }
}

fn complete(n: u8, epoch: Epoch) -> Command {
    Command::Complete {
        runner: runner(n),
        epoch,
        exit_code: 0,
        error: None,
    }
}

#[test]
fn a_run_is_claimed_once_and_completed_once() {
    let queued = entry(OnRunnerLost::Answer);
    let running = write(&queued, &claim(1, 1));
    assert_eq!((running.epoch, running.order), (1, Some(7)));
    assert_eq!(
        transition(&running, &claim(2, 2), 9),
        Err(Refusal::ClaimLost)
    );
    assert_eq!(
        transition(&running, &complete(2, 1), 9),
        Err(Refusal::LeaseLost)
    );
    let done = write(&running, &complete(1, 1));
    assert_eq!(transition(&done, &complete(1, 1), 10), Ok(Step::Same));
    assert_eq!(
        transition(&done, &complete(1, 2), 9),
        Err(Refusal::LeaseLost)
    );
    assert_eq!(transition(&done, &claim(2, 2), 9), Err(Refusal::ClaimLost));
}

#[test]
fn a_claim_sent_twice_gets_the_same_answer_but_not_somebody_elses() {
    let running = write(&entry(OnRunnerLost::Answer), &claim(1, 1));
    assert_eq!(transition(&running, &claim(1, 1), 9), Ok(Step::Same));
    assert_eq!(
        transition(&running, &claim(1, 2), 9),
        Err(Refusal::ClaimLost)
    );
    assert_eq!(
        transition(&running, &claim(2, 1), 9),
        Err(Refusal::ClaimLost)
    );
}

#[test]
fn a_lost_runner_is_answered_or_retried_up_to_its_limit() {
    let lost = write(
        &write(&entry(OnRunnerLost::Answer), &claim(1, 1)),
        &Command::Expire { epoch: 1 },
    );
    let result = lost.view().result.unwrap();
    assert_eq!(result.reason, EndReason::RunnerLost);
    assert!(result.error.unwrap().contains("metal-1"));

    let retry = OnRunnerLost::Retry { max_attempts: 2 };
    let again = write(
        &write(&entry(retry), &claim(1, 1)),
        &Command::Expire { epoch: 1 },
    );
    assert_eq!(again.state, State::Queued);
    let second = write(
        &again,
        &Command::Claim {
            holder: holder(2),
            claim: ClaimId::random(),
            revision: 99,
        },
    );
    assert_eq!(second.epoch, 2);
    assert_eq!(second.order, Some(7), "it keeps its place in the queue");
    assert_eq!(
        transition(&second, &complete(1, 1), 9),
        Err(Refusal::LeaseLost),
        "the fence"
    );
    let end = write(&second, &Command::Expire { epoch: 2 });
    assert!(matches!(end.state, State::Done { .. }));
}

#[test]
fn a_cancel_ends_a_waiting_run_at_once_and_asks_the_runner_of_a_running_one() {
    let queued = entry(OnRunnerLost::Retry { max_attempts: 5 });
    let result = write(&queued, &Command::Cancel).view().result.unwrap();
    assert_eq!(
        (result.exit_code, result.reason),
        (137, EndReason::Cancelled)
    );

    let asked = write(&write(&queued, &claim(1, 1)), &Command::Cancel);
    assert!(asked.view().cancel_requested);
    assert_eq!(transition(&asked, &Command::Cancel, 9), Ok(Step::Same));
    for end in [
        Command::Expire { epoch: 1 },
        Command::Release {
            runner: runner(1),
            epoch: 1,
        },
    ] {
        let result = write(&asked, &end).view().result.unwrap();
        assert_eq!(result.reason, EndReason::Cancelled, "never run again");
    }
}

#[test]
fn a_run_that_waits_keeps_its_place_whatever_its_client_says_meanwhile() {
    let announce = |inputs, revision| Command::Announce {
        policy_revision: 0,
        inputs,
        revision,
    };
    let said = write(&entry(OnRunnerLost::Answer), &announce(1, 3));
    assert_eq!(said.order, Some(3));
    let again = write(&said, &announce(2, 5));
    assert_eq!(again.order, Some(3));
    assert_eq!(transition(&again, &announce(2, 8), 9), Ok(Step::Same));
    assert_eq!(write(&again, &claim(1, 1)).order, Some(3));
}

#[test]
fn a_guests_word_changes_no_state() {
    let advice = |epoch| {
        Command::Advise(Advice {
            epoch,
            exit_code: 3,
            error: Some("\u{1b}[31mred".to_owned()),
        })
    };
    let running = write(&entry(OnRunnerLost::Answer), &claim(1, 1));
    let advised = write(&running, &advice(1));
    assert_eq!(advised.state, running.state);
    assert!(
        !advised
            .advice
            .clone()
            .unwrap()
            .error
            .unwrap()
            .contains('\u{1b}')
    );
    assert_eq!(transition(&running, &advice(0), 9), Err(Refusal::LeaseLost));
    let done = write(&advised, &complete(1, 1));
    assert_eq!(transition(&done, &advice(1), 9), Err(Refusal::Finished));
}

#[test]
fn an_error_text_is_bounded() {
    let long = Command::Complete {
        runner: runner(1),
        epoch: 1,
        exit_code: 1,
        error: Some("\u{0}".repeat(1 << 20)),
    };
    let done = write(&write(&entry(OnRunnerLost::Answer), &claim(1, 1)), &long);
    assert!(done.view().result.unwrap().error.unwrap().len() < MAX_ERROR_BYTES + 16);
}

fn commands() -> impl Strategy<Value = Command> {
    let who = 0..3_u8;
    let epoch = 0..5_u64;
    prop_oneof![
        4 => (who.clone(), 0..6_u8).prop_map(|(n, attempt)| claim(n, attempt)),
        2 => (who.clone(), epoch.clone()).prop_map(|(n, epoch)| Command::Renew { runner: runner(n), epoch }),
        1 => (who.clone(), epoch.clone()).prop_map(|(n, epoch)| Command::Release { runner: runner(n), epoch }),
        2 => (who, epoch.clone()).prop_map(|(n, epoch)| complete(n, epoch)),
        1 => Just(Command::Cancel),
        2 => epoch.clone().prop_map(|epoch| Command::Expire { epoch }),
        1 => (0..3_u64, 0..3_u64).prop_map(|(policy_revision, inputs)| Command::Announce { policy_revision, inputs, revision: 1 }),
        1 => epoch.prop_map(|epoch| Command::Advise(Advice { epoch, exit_code: 0, error: None })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn whatever_is_tried(
        commands in proptest::collection::vec(commands(), 1..60),
        attempts in 2..5_u8,
        retries in any::<bool>(),
    ) {
        let on_lost = if retries { OnRunnerLost::Retry { max_attempts: attempts } } else { OnRunnerLost::Answer };
        let mut now = entry(on_lost);
        let mut expirations = 0_u64;
        for command in &commands {
            let before = now.clone();
            let outcome = transition(&before, command, 9);
            prop_assert_eq!(&outcome, &transition(&before, command, 9), "pure");
            let Ok(Step::Write(next)) = outcome else { continue };
            now = *next;
            // What makes the run never changes.
            prop_assert_eq!((now.run, &now.group, &now.profile, now.spec), (before.run, &before.group, &before.profile, before.spec));
            // Done is for good, except that nothing may be written at all.
            prop_assert!(!matches!(before.state, State::Done { .. }), "{:?} changed a finished run", command);
            // Once it has a place, it keeps it.
            prop_assert!(before.order.is_none() || now.order == before.order);
            // Only a claim starts, only from the queue, and each one raises the epoch by one; nothing else does.
            match command {
                Command::Claim { .. } => {
                    prop_assert_eq!(&before.state, &State::Queued);
                    prop_assert_eq!(now.epoch, before.epoch + 1);
                    prop_assert!(matches!(now.state, State::Running(_)));
                }
                _ => prop_assert_eq!(now.epoch, before.epoch),
            }
            // A runner's word counts only from the holder, in its epoch.
            if let Command::Renew { runner, epoch } | Command::Release { runner, epoch } | Command::Complete { runner, epoch, .. } = command {
                let State::Running(lease) = &before.state else { panic!("{command:?} changed {before:?}") };
                prop_assert_eq!((lease.holder.runner_id, before.epoch), (*runner, *epoch));
            }
            // A wish to cancel is never forgotten: the run ends, or keeps the wish.
            if let State::Running(lease) = &before.state && lease.cancel_requested {
                let kept = match &now.state {
                    State::Queued => false,
                    State::Running(lease) => lease.cancel_requested,
                    State::Done { .. } => true,
                };
                prop_assert!(kept);
            }
            if matches!(command, Command::Expire { .. }) {
                expirations += 1;
            }
            // What the entry holds survives its bytes.
            let bytes = serde_json::to_vec(&now).unwrap();
            prop_assert_eq!(&serde_json::from_slice::<Entry>(&bytes).unwrap(), &now);
        }
        let limit = if retries { u64::from(attempts) } else { 1 };
        prop_assert!(expirations <= now.epoch);
        // Without releases a run is claimed no more often than its policy says.
        if !commands.iter().any(|c| matches!(c, Command::Release { .. })) {
            prop_assert!(now.epoch <= limit);
        }
    }
}
