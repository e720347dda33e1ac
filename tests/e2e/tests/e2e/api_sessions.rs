//! A session that goes on elsewhere: its history travels over the API, not its VM.

use std::collections::BTreeSet;

use e2e::{Api, Host, World};
use serde_json::{Value, json};

/// The sessions that the events of a run name.
fn sessions(api: &Api, run: &str) -> BTreeSet<String> {
    let feed = api.feed(run, "events");
    let data = feed.lines().filter_map(|line| line.strip_prefix("data: "));
    let events = data.filter_map(|data| serde_json::from_str::<Value>(data).ok());
    events
        .filter_map(|event| event["event"]["session_id"].as_str().map(str::to_owned))
        .collect()
}

#[test]
fn a_session_is_resumed_on_another_host_from_the_checkpoint_of_the_first() {
    let Some(world) = World::new() else { return };
    let Some(api) = Api::start(&world) else {
        return;
    };
    let Some(first) = Host::new().name("first").world(&world).api(&api).start() else {
        return;
    };
    let session = json!({"sessionId": "refactoring-1"});
    let one = api.create("touch /tmp/here; echo the-first-turn", session.clone());
    assert_eq!(api.result(&one)["exitCode"], 0, "{}", first.log(&one));
    assert_eq!(api.run(&one)["holder"]["runnerName"], "first");
    let named = sessions(&api, &one);
    assert_eq!(named.len(), 1, "{named:?}");
    // With it goes the VM that was kept for the session.
    first.finish();

    let Some(second) = Host::new().name("second").world(&world).api(&api).start() else {
        return;
    };
    let history = "cat ~/.claude/projects/-home-user-workspace/*.jsonl";
    let look = format!("test -e /tmp/here && echo same-vm; {history}; echo the-second-turn");
    let two = api.create(&look, session.clone());
    assert_eq!(api.result(&two)["exitCode"], 0, "{}", second.log(&two));
    assert_eq!(api.run(&two)["holder"]["runnerName"], "second");
    let log = second.log(&two);
    assert!(log.contains("the-first-turn"), "{log}");
    assert!(!log.lines().any(|line| line == "same-vm"), "{log}");
    // The CLI was told to go on with the session, not to begin one.
    assert_eq!(sessions(&api, &two), named);

    // The next checkpoint holds both turns; another session of the group holds neither.
    let three = api.create(&format!("{history} | grep -c the-second-turn"), session);
    assert_eq!(api.result(&three)["exitCode"], 0, "{}", second.log(&three));
    assert_eq!(sessions(&api, &three), named);
    let other = json!({"sessionId": "refactoring-2"});
    let four = api.create("test ! -e ~/.claude/projects", other);
    assert_eq!(api.result(&four)["exitCode"], 0, "{}", second.log(&four));
    assert_ne!(sessions(&api, &four), named);
    second.finish();
    world.finish();
}
