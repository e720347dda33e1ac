//! What a submitter is promised.

use e2e::{Host, seconds_now};
use rustix::process::Signal;

#[test]
fn a_job_prints_one_line_of_json_and_leaves_its_output_in_the_system_log() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let outcome = host.submit("echo out; echo err >&2; nproc; id -un").run();
    outcome.expect_exit(0);
    assert!(outcome.result()["error"].is_null(), "{outcome:?}");
    let log = host.log(&outcome.run_id());
    for wanted in ["out", "1", "user"] {
        assert!(log.contains(wanted), "{wanted} in {log}");
    }
    host.finish();
}

#[test]
fn the_vm_has_the_profile_s_size_and_one_network_card() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let prompt = "echo cpus=$(nproc) mem=$(free -m | awk '/^Mem/ {print $2}') net=$(ls /sys/class/net | tr '\\n' ,)";
    let outcome = host.submit(prompt).run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    assert!(log.contains("cpus=1 "), "{log}");
    let mem = log
        .split("mem=")
        .find_map(|rest| rest.split(' ').next()?.parse::<u32>().ok())
        .unwrap();
    assert!((180..=256).contains(&mem), "{mem} MB");
    assert!(log.contains("net=eth0,lo,"), "{log}");
    host.finish();
}

#[test]
fn a_job_s_exit_code_is_its_prompt_s_and_submit_fails_with_it() {
    let Some(host) = Host::new().start() else {
        return;
    };
    host.submit("exit 0").run().expect_exit(0);
    let outcome = host.submit("echo why >&2; exit 7").run();
    outcome.expect_exit(7);
    assert!(host.log(&outcome.run_id()).contains("why"));
    host.finish();
}

#[test]
fn follow_shows_output_while_the_job_runs() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").arg("--follow").spawn();
    job.stderr.wait_for("Execution", e2e::LONG);
    assert_eq!(job.stdout.now(), "");
    job.signal(Signal::INT);
    let outcome = job.wait();
    assert!(!outcome.status.success(), "{outcome:?}");
    host.finish();
}

#[test]
fn a_terminal_never_gets_a_guest_s_control_characters() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let prompt = "printf 'red \\033[31m title \\033]0;owned\\007 end' >&2; exit 1";
    let outcome = host.submit(prompt).run();
    outcome.expect_exit(1);
    let run = outcome.run_id();
    let shown = host.on_a_terminal(&["logs", &run]);
    assert!(shown.contains("end"), "{shown:?}");
    assert!(
        !shown.contains("\u{1b}]0;") && !shown.contains("\u{1b}[31m"),
        "{shown:?}"
    );
    let followed = host.on_a_terminal(&[
        "local",
        "submit",
        "--follow",
        "--group",
        host.group(),
        "--profile",
        host.profile(),
        "--prompt",
        prompt,
    ]);
    assert!(followed.contains("end"), "{followed:?}");
    assert!(
        !followed.contains("\u{1b}]0;") && !followed.contains("\u{1b}[31m"),
        "{followed:?}"
    );
    host.finish();
}

#[test]
fn environment_reaches_the_agent_and_never_overrides_vm0_variables() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let outcome = host
        .submit("echo greeting=$GREETING; echo run=$VM0_RUN_ID")
        .env("GREETING", "it's \"quoted\" $HOME; true")
        .run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    assert!(log.contains("$HOME; true"), "{log}");
    assert!(log.contains(&format!("run={}", outcome.run_id())), "{log}");

    for name in ["VM0_RUN_ID", "VM0_API_TOKEN", "VM0_PROMPT"] {
        let outcome = host.submit("echo $VM0_RUN_ID").env(name, "planted").run();
        if outcome.stdout.is_empty() {
            // Refused at submit, which is as good.
            assert!(outcome.stderr.contains(name), "{outcome:?}");
        } else {
            assert!(!host.log(&outcome.run_id()).contains("planted"));
        }
    }
    host.finish();
}

#[test]
fn prompts_arrive_as_they_were_typed() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let prompt =
        "printf '%s' \"it's\"' \"x\" $(echo no) `id` \\ ; é 🦀'\n# second line\nprintf ' three'";
    let outcome = host.submit(prompt).run();
    outcome.expect_exit(0);
    let log = host.log(&outcome.run_id());
    assert!(log.contains("$(echo no) `id`"), "{log}");
    assert!(log.contains("é 🦀"), "{log}");
    host.finish();
}

#[test]
fn a_prompt_of_a_megabyte_arrives_whole() {
    let Some(host) = Host::new().start() else {
        return;
    };
    // The bytes must reach bash: a comment would be enough to fill, so the end of the prompt does the proof.
    let filler = "#".repeat(1 << 20);
    let job = e2e::Job::new(&host, &format!("x=1 {filler}\necho reached the end"));
    let id = host.queue_job(&job);
    let answer = host.answer(&id);
    assert_eq!(answer["exit_code"], 0, "{answer}");
    let log = host.log(&id);
    assert!(log.contains("reached the end"), "{log}");
    host.finish();
}

#[test]
fn ctrl_c_cancels_the_job() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host.submit("sleep 1000").spawn();
    let run = job.running();
    job.signal(Signal::INT);
    let outcome = job.wait();
    assert!(!outcome.status.success(), "{outcome:?}");
    let answer = host.answer_if_kept(&run);
    assert!(answer.is_none_or(|answer| answer["exit_code"] != 0));
    e2e::eventually("the VM is gone", e2e::LONG, || host.vms().is_empty());
    host.finish();
}

#[test]
fn cancel_answers_the_submitter_whatever_the_job_does() {
    let Some(host) = Host::new().start() else {
        return;
    };
    let job = host
        .submit("trap '' TERM INT; while :; do sleep 1; done")
        .spawn();
    let run = job.running();
    let cancel = host
        .runner(&["local", "cancel", "--group", host.group(), &run])
        .output()
        .unwrap();
    assert!(cancel.status.success(), "{cancel:?}");
    job.wait().expect_error(&["cancel"]);
    host.finish();
}

#[test]
fn a_job_that_takes_too_long_is_ended_and_says_so() {
    let Some(host) = Host::new().start() else {
        return;
    };
    host.submit("sleep 1000")
        .timeout_secs(3)
        .run()
        .expect_error(&["3 s after its submission", "timed out after 3 s"]);
    // The runner's own limit, for submitters that do not wait.
    let job = e2e::Job::new(&host, "sleep 1000").with("timeout_secs", 3);
    let answer = host.answer(&host.queue_job(&job));
    assert_ne!(answer["exit_code"], 0, "{answer}");
    assert_eq!(answer["error"], "timed out after 3 s", "{answer}");
    host.finish();
}

#[test]
fn a_session_s_next_job_finds_the_files_of_the_last_and_another_session_does_not() {
    let Some(host) = Host::new().sandbox("idle_timeout_secs", 300).start() else {
        return;
    };
    host.submit("echo kept > ~/note")
        .session("s-1")
        .run()
        .expect_exit(0);
    host.until_status("the VM is kept", |status| {
        status["idle_vms"]
            .as_array()
            .is_some_and(|kept| !kept.is_empty())
    });
    host.submit("grep -q kept ~/note")
        .session("s-1")
        .run()
        .expect_exit(0);
    host.submit("test ! -e ~/note")
        .session("s-2")
        .run()
        .expect_exit(0);
    host.submit("test ! -e ~/note").run().expect_exit(0);
    host.finish();
}

#[test]
fn clones_have_their_own_randomness_and_the_right_time() {
    let Some(host) = Host::new().warm(2, 2).start() else {
        return;
    };
    let prompt = "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo \" at=$(date +%s)=\"";
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..3 {
        let before = seconds_now();
        let outcome = host.submit(prompt).run();
        let after = seconds_now();
        outcome.expect_exit(0);
        let log = host.log(&outcome.run_id());
        let at = log
            .rsplit("at=")
            .find_map(|rest| rest.split('=').next()?.parse::<i64>().ok());
        assert!((before - 5..=after + 5).contains(&at.unwrap()), "{log}");
        let random: String = log
            .split(|c: char| !c.is_ascii_hexdigit())
            .find(|word| word.len() == 32)
            .unwrap()
            .to_owned();
        assert!(seen.insert(random), "two VMs had the same randomness");
    }
    host.finish();
}

#[test]
fn a_group_that_nobody_watches_is_mentioned_after_five_seconds() {
    let Some(host) = Host::new().prepare() else {
        return;
    };
    let job = host.submit("true").spawn();
    job.stderr.wait_for("no runner", e2e::LONG);
    job.signal(Signal::INT);
    assert!(!job.wait().status.success());
    host.finish();
}
