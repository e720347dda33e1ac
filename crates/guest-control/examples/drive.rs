use guest_control::*;
use std::time::{Duration, Instant};
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut args = std::env::args().skip(1);
    let sock = args.next().unwrap();
    let t = Instant::now();
    let s = loop {
        if let Ok(s) = tokio::net::UnixStream::connect(&sock).await { break s; }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let c = Client::connect(s, Duration::from_secs(120)).await.unwrap();
    println!("connected {:?}", t.elapsed());
    let src = if std::env::var_os("TMPFS").is_some() { MountSource::Tmpfs } else { MountSource::Disk };
    c.mount(src).await.unwrap();
    let mut entropy = [7u8; 32];
    for a in args {
        entropy[0] = entropy[0].wrapping_add(1);
        let wake = Wake { realtime_ns: std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64, entropy };
        let mut spec = ExecSpec { user: UserSpec::User, wake: Some(wake), ..Default::default() };
        if let Some(p) = a.strip_prefix("mock:").or(a.strip_prefix("real:")) {
            spec.argv = vec![b"/usr/local/bin/guest-agent".to_vec()];
            spec.kill_group_on_exit = true;
            spec.cwd = Some("/home/user/workspace".into());
            spec.env = [("VM0_RUN_ID", "r1"), ("VM0_PROMPT", p), ("VM0_WORKING_DIR", "/home/user/workspace"), ("VM0_API_TOKEN", ""), ("VM0_API_URL", ""), ("CLI_AGENT_TYPE", "claude-code"), ("USE_MOCK_CLAUDE", if a.starts_with("mock") { "true" } else { "false" })].map(|(a, b)| (a.to_owned(), b.to_owned())).to_vec();
        } else {
            spec.argv = vec![b"bash".to_vec(), b"-c".to_vec(), a.clone().into_bytes()];
        }
        let t = Instant::now();
        let session = c.exec(spec).await.unwrap();
        let mut started = t.elapsed();
        let mut out = Vec::new();
        let mut first = None;
        {
        let mut output = session.attach(0, true);
        while let Some(chunk) = output.next().await { first.get_or_insert(t.elapsed()); out.extend_from_slice(&chunk.data); }
        }
        let r = session.wait().await.unwrap();
        let took = t.elapsed();
        if std::env::var_os("QUIET").is_none() { println!("--- {}\n{}", &a[..a.len().min(120)], String::from_utf8_lossy(&out)); }
        println!("=== {:?} started {:?} first {:?} took {:?}", r.status, started, first, took);
        started = took; let _ = started;
    }
    c.shutdown().await.ok();
}
