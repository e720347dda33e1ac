//! `vm0-api`: see `vm0-api --help` and `docs/api-mode.md`.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use futures_util::StreamExt as _;
use tokio::signal::unix::{SignalKind, signal};
use web_api::cli::{Cli, Command, MasterKeyCommand, Nats, Serve, TokenCommand};
use web_api::clock::Clock;
use web_api::engine::{Engine, holds_value};
use web_api::service::{Config, Service};
use web_api::tokens::{BearerRecord, Bearers, MasterKey, MasterKeys, new_bearer, rotate};

type Failure = Box<dyn std::error::Error>;

/// After a signal, requests under way have so long; followers and waiting runners are not waited for.
const FAREWELL: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("VM0_API_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,async_nats=warn")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    let outcome = runtime.block_on(run(cli));
    // What SQLite's thread still writes is nobody's any more.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(error.as_ref()),
    }
}

fn failed(error: &dyn std::error::Error) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {error}");
    ExitCode::FAILURE
}

async fn run(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::Serve(serve) => serve_api(*serve).await,
        Command::MasterKey { command, out } => match (command, out) {
            (Some(MasterKeyCommand::Rotate { old, new, nats }), _) => {
                let (old, new) = (MasterKey::read(&old)?, MasterKey::read(&new)?);
                let engine = Engine::open(&nats.settings()).await?;
                let done = rotate(&engine.keys, &old, &new).await?;
                print(&format!(
                    "rewrapped {}, already {}",
                    done.rewrapped, done.already
                ))
            }
            (None, Some(out)) => Ok(MasterKey::write_new(&out)?),
            (None, None) => Err("say where to: vm0-api master-key --out FILE".into()),
        },
        Command::Token { command, nats } => tokens(command, &nats).await,
        Command::Openapi => print(&serde_json::to_string_pretty(&web_api::http::openapi()?)?),
    }
}

fn print(text: &str) -> Result<(), Failure> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

async fn tokens(command: TokenCommand, nats: &Nats) -> Result<(), Failure> {
    let engine = Engine::open(&nats.settings()).await?;
    let bearers = Bearers::new(engine.tokens.clone());
    match command {
        TokenCommand::Create { kind, groups, name } => {
            let groups = groups.into_iter().collect::<BTreeSet<_>>();
            let (token, id, record) =
                new_bearer(kind.into(), &name, groups, Clock::default().now())?;
            bearers.add(&id, &record).await?;
            print(&token)
        }
        TokenCommand::Revoke { id } => {
            if bearers.revoke(&id).await? {
                Ok(())
            } else {
                Err(format!("there is no token {id}. Hint: vm0-api token list").into())
            }
        }
        TokenCommand::List => {
            if engine.tokens.messages().await? == 0 {
                return Ok(());
            }
            let mut watch = engine.tokens.watch().await?;
            while let Some(change) = watch.next().await {
                let change = change?;
                if holds_value(change.operation) {
                    let record: BearerRecord = serde_json::from_slice(&change.value)?;
                    let groups: Vec<String> =
                        record.groups.iter().map(ToString::to_string).collect();
                    let kind = serde_json::to_value(record.kind)?;
                    print(&format!(
                        "{}\t{}\t{}\t{}",
                        change.key,
                        kind.as_str().unwrap_or_default(),
                        groups.join(","),
                        record.name
                    ))?;
                }
                if change.delta == 0 {
                    break;
                }
            }
            Ok(())
        }
    }
}

async fn serve_api(serve: Serve) -> Result<(), Failure> {
    let others = match &serve.other_master_key {
        Some(path) => vec![MasterKey::read(path)?],
        None => Vec::new(),
    };
    let masters = MasterKeys::new(MasterKey::read(&serve.master_key)?, others);
    let engine = Engine::open(&serve.nats.settings()).await?;
    engine
        .check_copies(usize::from(serve.nats.replicas))
        .await?;
    let config = Config {
        lease: Duration::from_secs(serve.lease_secs),
        default_timeout_secs: serve.default_timeout_secs,
        max_wait: Duration::from_secs(serve.max_wait_secs),
        max_queued: serve.max_queued,
        run_retention: Duration::from_secs(u64::from(serve.run_days).saturating_mul(86_400)),
        ..Config::default()
    };
    let clock = Clock::skewed(serve.clock_skew_ms);
    let (service, _tasks) = Service::start(engine, masters, clock, config).await?;
    let listener = tokio::net::TcpListener::bind(serve.listen)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", serve.listen))?;
    // For whoever started it, and chose port 0.
    print(&format!("listening on http://{}", listener.local_addr()?))?;
    let (mut term, mut int) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    let (told, mut asked) = tokio::sync::watch::channel(false);
    let stop = async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        told.send_replace(true);
    };
    let app = web_api::http::router(service);
    let server = axum::serve(listener, app).with_graceful_shutdown(stop);
    tokio::select! {
        outcome = std::future::IntoFuture::into_future(server) => Ok(outcome?),
        () = async {
            let _ = asked.wait_for(|asked| *asked).await;
            tokio::time::sleep(FAREWELL).await;
        } => Ok(()),
    }
}
