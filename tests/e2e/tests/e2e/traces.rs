//! Traces of jobs, as a collector gets them from a real daemon with real VMs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;
use std::time::Duration;

use e2e::{Host, LONG};

/// Takes what is posted to it, and gives the paths and bodies.
fn collector() -> (u16, mpsc::Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let port = listener.local_addr().expect("it listens").port();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream);
                loop {
                    let mut head = Vec::new();
                    loop {
                        let mut line = String::new();
                        if reader.read_line(&mut line).unwrap_or(0) == 0 {
                            return;
                        }
                        if line.trim().is_empty() {
                            break;
                        }
                        head.push(line.trim().to_owned());
                    }
                    let length = head.iter().find_map(|line| {
                        let (name, value) = line.split_once(": ")?;
                        let length = name.eq_ignore_ascii_case("content-length");
                        length.then(|| value.parse::<usize>().ok())?
                    });
                    let mut body = vec![0; length.unwrap_or(0)];
                    if reader.read_exact(&mut body).is_err() {
                        return;
                    }
                    let path = head[0].split(' ').nth(1).unwrap_or_default().to_owned();
                    let _ = sender.send((path, body));
                    let answer = "HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n";
                    if reader.get_mut().write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    (port, receiver)
}

fn holds(body: &[u8], words: &str) -> bool {
    body.windows(words.len()).any(|at| at == words.as_bytes())
}

#[test]
fn a_collector_gets_the_steps_of_a_job_and_neither_its_prompt_nor_its_secret() {
    let (port, received) = collector();
    let endpoint = format!("{{otlp_endpoint: \"http://127.0.0.1:{port}\"}}");
    let Some(host) = Host::new().option("telemetry", endpoint).start() else {
        return;
    };
    let doctor = host.runner(&["doctor"]).output().expect("it starts");
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    let check = doctor.lines().find(|line| line.contains("trace collector"));
    assert!(
        check.is_some_and(|line| line.starts_with("PASS")),
        "{doctor}"
    );

    let outcome = host
        .submit("echo the-words-of-the-prompt")
        .secret("TOKEN", "the-value-of-the-secret", "www.example.com")
        .run();
    outcome.expect_exit(0);
    let run = outcome.run_id();
    let mut all = Vec::new();
    while !(holds(&all, &run) && holds(&all, "vm.destroy")) {
        let (path, body) = received.recv_timeout(LONG).expect("spans of the job come");
        assert_eq!(path, "/v1/traces");
        all.extend(body);
    }
    let steps = [
        "queue.wait",
        "reserve",
        "claim",
        "network.register",
        "agent",
        "network.close",
        "answer",
        "vm0/small",
    ];
    for step in steps {
        assert!(holds(&all, step), "no {step}");
    }
    assert!(holds(&all, "vm.resume") || holds(&all, "vm.restore"));
    for hidden in ["the-words-of-the-prompt", "the-value-of-the-secret"] {
        assert!(!holds(&all, hidden), "{hidden} was sent");
    }
    host.finish();
    // Nothing comes after the end.
    assert!(received.recv_timeout(Duration::ZERO).is_err());
}
