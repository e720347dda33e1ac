use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::*;
use crate::machine::{describe, limit, load, save};
use crate::programs::OLDEST;

const LIMIT: Duration = Duration::from_secs(10);

/// One of every request that this engine can send, with every field that it can have.
fn all_requests() -> Vec<Request> {
    let shape = sandbox::Shape {
        vcpu: 2,
        memory_mb: 512,
        disk_mb: 1024,
    };
    let mut requests = describe(shape, "noxsave");
    requests.extend(limit(sandbox::IoLimits {
        disk_kib_s: Some(1),
        disk_ops_s: Some(1),
        network_kib_s: Some(1),
    }));
    requests.extend([
        Request::GetVersion,
        Request::PutAction(Action {
            action_type: ActionType::InstanceStart,
        }),
        Request::PutAction(Action {
            action_type: ActionType::FlushMetrics,
        }),
        Request::PatchVm(VmState {
            state: RunState::Paused,
        }),
        save(),
        load(OLDEST),
        Request::PatchBalloon(BalloonUpdate { amount_mib: 100 }),
        Request::GetBalloonStatistics,
    ]);
    requests
}

/// The variant's name: the compiler's own list cannot be had, so a request that is missing above is found by this.
fn kind(request: &Request) -> &'static str {
    match request {
        Request::GetVersion => "GetVersion",
        Request::PutMachineConfig(_) => "PutMachineConfig",
        Request::PutBootSource(_) => "PutBootSource",
        Request::PutDrive(_) => "PutDrive",
        Request::PutNetworkInterface(_) => "PutNetworkInterface",
        Request::PatchDrive(_) => "PatchDrive",
        Request::PatchNetworkInterface(_) => "PatchNetworkInterface",
        Request::PutVsock(_) => "PutVsock",
        Request::PutBalloon(_) => "PutBalloon",
        Request::PutEntropy(_) => "PutEntropy",
        Request::PutAction(_) => "PutAction",
        Request::PatchVm(_) => "PatchVm",
        Request::PutSnapshotCreate(_) => "PutSnapshotCreate",
        Request::PutSnapshotLoad(_) => "PutSnapshotLoad",
        Request::PatchBalloon(_) => "PatchBalloon",
        Request::GetBalloonStatistics => "GetBalloonStatistics",
    }
}

/// Number of variants of [`Request`]: one more needs its arm in `kind`, and then this.
const KINDS: usize = 16;

#[test]
fn every_request_is_what_the_api_description_says() {
    let requests = all_requests();
    let kinds: BTreeSet<_> = requests.iter().map(kind).collect();
    assert_eq!(
        kinds.len(),
        KINDS,
        "a request is not in the list: {kinds:?}"
    );
    let Some(path) = std::env::var_os("FIRECRACKER_API_SPEC") else {
        host::test_support::skip(
            "FIRECRACKER_API_SPEC does not name Firecracker's API description (firecracker.yaml)",
        );
        return;
    };
    let text = std::fs::read_to_string(path).unwrap();
    let spec: Value = serde_saphyr::from_str(&text).unwrap();
    for request in &requests {
        check_request(&spec, request);
    }
    // What is read is in the description as well.
    for (definition, fields) in [
        ("FirecrackerVersion", &["firecracker_version"][..]),
        (
            "BalloonStats",
            &["target_mib", "actual_mib", "available_memory"],
        ),
        ("Error", &["fault_message"]),
    ] {
        for field in fields {
            let found = &spec["definitions"][definition]["properties"][field];
            assert!(!found.is_null(), "{definition} has no {field}");
        }
    }
}

/// A description that knows a field we send by another name, or type, or not at all, is noticed.
#[test]
fn what_the_description_does_not_know_is_found() {
    let spec: Value = serde_json::json!({
        "definitions": {"Vsock": {
            "required": ["guest_cid", "uds_path"],
            "properties": {
                "guest_cid": {"type": "integer", "minimum": 3},
                "uds_path": {"type": "string", "enum": ["a", "b"]},
                "rate": {"$ref": "#/definitions/Vsock"},
            }
        }}
    });
    let schema = serde_json::json!({"$ref": "#/definitions/Vsock"});
    let check = |value: Value| check_value(&spec, &schema, &value, "");
    assert_eq!(
        check(serde_json::json!({"guest_cid": 3, "uds_path": "a"})),
        None
    );
    for bad in [
        serde_json::json!({"guest_cid": 2, "uds_path": "a"}),
        serde_json::json!({"guest_cid": "3", "uds_path": "a"}),
        serde_json::json!({"guest_cid": 3}),
        serde_json::json!({"guest_cid": 3, "uds_path": "c"}),
        serde_json::json!({"guest_cid": 3, "uds_path": "a", "more": 1}),
        serde_json::json!({"guest_cid": 3, "uds_path": "a", "rate": {"guest_cid": 3}}),
        serde_json::json!([]),
    ] {
        assert!(check(bad.clone()).is_some(), "{bad}");
    }
}

fn check_request(spec: &Value, request: &Request) {
    let path = request.path();
    let method = request.method().as_str().to_lowercase();
    let paths = spec["paths"].as_object().unwrap();
    let (template, operations) = paths
        .iter()
        .find(|(template, _)| matches_template(template, &path))
        .unwrap_or_else(|| panic!("{request}: no such path"));
    let operation = &operations[&method];
    assert!(
        !operation.is_null(),
        "{request}: {template} has no {method}"
    );
    let body = request.body().unwrap();
    let parameters = operation["parameters"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let described = parameters
        .iter()
        .find(|parameter| parameter["in"] == "body");
    match (body, described) {
        (None, None) => {}
        (Some(body), Some(parameter)) => {
            let value: Value = serde_json::from_slice(&body).unwrap();
            if let Some(wrong) = check_value(spec, &parameter["schema"], &value, "") {
                panic!("{request}: {wrong}");
            }
        }
        (body, _) => panic!("{request}: body {body:?} where the description differs"),
    }
}

fn matches_template(template: &str, path: &str) -> bool {
    let (template, path): (Vec<_>, Vec<_>) =
        (template.split('/').collect(), path.split('/').collect());
    template.len() == path.len()
        && template
            .iter()
            .zip(&path)
            .all(|(part, word)| part.starts_with('{') || part == word)
}

/// What is wrong with a value, by the part of JSON Schema that the description uses.
fn check_value(spec: &Value, schema: &Value, value: &Value, at: &str) -> Option<String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.strip_prefix("#/definitions/")?;
        return match &spec["definitions"][name] {
            Value::Null => Some(format!("{at}: no definition {name}")),
            definition => check_value(spec, definition, value, at),
        };
    }
    if let Some(choices) = schema["enum"].as_array()
        && !choices.contains(value)
    {
        return Some(format!("{at}: {value} is none of {choices:?}"));
    }
    let bounds = [("minimum", false), ("maximum", true)];
    for (name, upper) in bounds {
        if let (Some(bound), Some(number)) = (schema[name].as_i64(), value.as_i64())
            && (if upper {
                number > bound
            } else {
                number < bound
            })
        {
            return Some(format!("{at}: {number} is beyond {name} {bound}"));
        }
    }
    match (schema["type"].as_str(), value) {
        (Some("integer"), Value::Number(number)) if number.is_i64() || number.is_u64() => None,
        (Some("string"), Value::String(_)) | (Some("boolean"), Value::Bool(_)) => None,
        (Some("array"), Value::Array(items)) => items
            .iter()
            .find_map(|item| check_value(spec, &schema["items"], item, at)),
        (Some("object") | None, Value::Object(fields)) => {
            let required = schema["required"].as_array().cloned().unwrap_or_default();
            let missing = required
                .iter()
                .filter_map(Value::as_str)
                .find(|name| !fields.contains_key(*name));
            if let Some(name) = missing {
                return Some(format!("{at}: {name} is missing"));
            }
            fields.iter().find_map(|(name, value)| {
                let at = format!("{at}.{name}");
                match &schema["properties"][name] {
                    Value::Null => Some(format!("{at} is not described")),
                    schema => check_value(spec, schema, value, &at),
                }
            })
        }
        (kind, value) => Some(format!("{at}: {value} is no {kind:?}")),
    }
}

/// What a scripted Firecracker does with one connection.
enum Script {
    /// Answers with these bytes and keeps the connection.
    Answer(String),
    /// Answers with these bytes and closes.
    AnswerAndClose(&'static str),
    /// Reads the request and says nothing.
    Hang,
    /// Closes when it has read the request.
    Die,
}

/// A whole answer.
fn answer(status: &str, body: &str) -> Script {
    let length = body.len();
    Script::Answer(format!(
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}"
    ))
}

/// A connection to a Firecracker that follows a script.
async fn scripted(script: Script) -> (tempfile::TempDir, Api) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        let read = stream.read(&mut request).await.unwrap();
        assert!(read > 0);
        match script {
            Script::Answer(answer) => {
                stream.write_all(answer.as_bytes()).await.unwrap();
                // Until the client goes.
                let _ = stream.read(&mut request).await;
            }
            Script::AnswerAndClose(answer) => stream.write_all(answer.as_bytes()).await.unwrap(),
            Script::Hang => {
                let _ = stream.read(&mut request).await;
            }
            Script::Die => {}
        }
    });
    let api = Api::connect(&path).await.unwrap();
    (dir, api)
}

async fn fails(script: Script, limit: Duration) -> ApiError {
    let (_dir, mut api) = scripted(script).await;
    let answer: Result<FirecrackerVersion, _> = api.get(&Request::GetVersion, limit).await;
    answer.unwrap_err()
}

#[tokio::test]
async fn an_answer_is_read() {
    let (_dir, mut api) = scripted(answer("200 OK", "{\"firecracker_version\": \"1.16.1\"}")).await;
    let version: FirecrackerVersion = api.get(&Request::GetVersion, LIMIT).await.unwrap();
    assert_eq!(version.firecracker_version, "1.16.1");
}

#[tokio::test]
async fn success_without_a_body_is_success() {
    let (_dir, mut api) =
        scripted(Script::Answer("HTTP/1.1 204 No Content\r\n\r\n".to_owned())).await;
    api.send(&save(), LIMIT).await.unwrap();
}

#[tokio::test]
async fn a_refusal_is_told_in_firecrackers_words() {
    let error = fails(
        answer("400 Bad Request", "{\"fault_message\": \"no, I\"}"),
        LIMIT,
    )
    .await;
    assert!(matches!(error, ApiError::Refused { .. }), "{error:?}");
    assert_eq!(error.to_string(), "GET /version was refused: no, I");
}

#[tokio::test]
async fn an_error_without_words_is_shown_as_it_came() {
    let error = fails(answer("500 Internal Server Error", "ugh!"), LIMIT)
        .await
        .to_string();
    assert!(error.contains("500") && error.contains("ugh!"), "{error}");
}

#[tokio::test]
async fn silence_ends_at_the_limit() {
    let error = fails(Script::Hang, Duration::from_millis(50)).await;
    assert!(matches!(error, ApiError::Hung { .. }), "{error:?}");
}

#[tokio::test]
async fn a_firecracker_that_dies_is_noticed_at_once() {
    let error = fails(Script::Die, LIMIT).await;
    assert!(matches!(error, ApiError::Broken { .. }), "{error:?}");
}

#[tokio::test]
async fn whatever_it_dies_at_is_named() {
    for request in all_requests() {
        let (_dir, mut api) = scripted(Script::Die).await;
        let error = api.send(&request, LIMIT).await.unwrap_err();
        assert!(matches!(error, ApiError::Broken { .. }), "{error:?}");
        assert!(
            error.to_string().starts_with(&request.to_string()),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_truncated_answer_is_an_error() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Len",
        "HTTP/1.1 200 OK\r\nContent-Length: 32\r\n\r\n{\"firecracker_version\": \"1.1",
        "nonsense\r\n\r\n",
    ] {
        let error = fails(Script::AnswerAndClose(answer), LIMIT).await;
        assert!(
            matches!(error, ApiError::Broken { .. } | ApiError::Nonsense { .. }),
            "{answer:?}: {error:?}"
        );
    }
}

#[tokio::test]
async fn another_body_than_described_is_an_error() {
    let error = fails(answer("200 OK", "[]"), LIMIT).await;
    assert!(matches!(error, ApiError::Nonsense { .. }), "{error:?}");
}

#[tokio::test]
async fn a_request_that_was_given_up_does_not_spoil_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let firecracker = async {
        let mut request = vec![0; 4096];
        let (mut first, _) = listener.accept().await.unwrap();
        assert!(first.read(&mut request).await.unwrap() > 0);
        let (mut second, _) = listener.accept().await.unwrap();
        assert!(second.read(&mut request).await.unwrap() > 0);
        let text =
            "HTTP/1.1 200 OK\r\nContent-Length: 33\r\n\r\n{\"firecracker_version\": \"1.16.1\"}";
        second.write_all(text.as_bytes()).await.unwrap();
        (first, second)
    };
    let client = async {
        let mut api = Api::connect(&path).await.unwrap();
        let given_up = api.send(&save(), Duration::from_millis(20)).await;
        assert!(matches!(given_up, Err(ApiError::Hung { .. })));
        api.get::<FirecrackerVersion>(&Request::GetVersion, LIMIT)
            .await
            .unwrap()
    };
    let (_connections, version) = tokio::join!(firecracker, client);
    assert_eq!(version.firecracker_version, "1.16.1");
}
