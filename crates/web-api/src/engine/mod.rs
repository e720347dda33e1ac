//! NATS JetStream: everything that outlives a replica is in it.
//!
//! | what | where | written |
//! |---|---|---|
//! | runs | bucket `<ns>_runs`, one key a run | compare-and-set only |
//! | specifications | bucket `<ns>_specs`; above 512 KiB in the object store | once |
//! | tokens, keys, group policies | buckets `<ns>_{tokens,keys,policies}` | put, create, or compare-and-set |
//! | checkpoints | bucket `<ns>_sessions`, their histories in the object store | compare-and-set |
//! | fleet | bucket `<ns>_fleet`, forgotten after a minute | put |
//! | events, outputs, logs, inputs | stream `<ns>_feed`, subject `<ns>.feed.<kind>.<run>` | compare-and-set on the subject |
//! | large blobs | object store `<ns>_blobs` | once |

mod blobs;
mod bucket;
mod check;
mod feed;
mod runs;
mod sessions;
mod specs;

use std::time::Duration;

use api_types::{GroupName, RunnerId};
use async_nats::jetstream::stream::{self, DiscardPolicy, StorageType};
use async_nats::jetstream::{self, kv, object_store};
use percent_encoding::percent_decode_str;

pub use bucket::{Bucket, Found, Swap, holds_value};
pub use check::{MIN_VERSION, ServerFault};
pub use feed::{Appended, Chunk, FeedKind, Position, body_json};
pub use runs::{Applied, ApplyError, Created, parse as parse_entry, run_policy};
pub use sessions::Checkpoint;
pub use specs::{MAX_INLINE_BYTES, Spec};

/// How long a storage operation is tried again before its caller hears that the storage does not answer. A node's
/// death costs a cluster an election of a few seconds.
pub const PATIENCE: Duration = Duration::from_secs(12);
/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(100);

/// Why the storage did not do it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// It does not answer.
    #[error("NATS does not answer: {0}")]
    Unavailable(String),
    /// What it holds is not what we wrote.
    #[error("what NATS holds cannot be understood: {0}")]
    Corrupt(String),
}

impl EngineError {
    fn unavailable(error: impl std::fmt::Display) -> Self {
        Self::Unavailable(error.to_string())
    }
}

/// How to reach NATS, and what to ask of it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `nats://user:password@host:port`, several separated by commas.
    pub url: String,
    /// The same for a user of the system account, who can learn how the servers write.
    pub system_url: Option<String>,
    /// Certificates of authorities that may have signed the servers' own, PEM.
    pub root_certificates: Option<std::path::PathBuf>,
    /// Take a server that may lose what it acknowledged.
    pub allow_data_loss: bool,
    /// First part of every name in NATS: letters and digits.
    pub namespace: String,
    /// Copies of everything: 1, or 3 in a cluster.
    pub replicas: usize,
    /// How long events, outputs and logs are kept.
    pub feed_retention: Duration,
    /// Most bytes of them in all; the oldest go first.
    pub feed_max_bytes: i64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            url: "nats://127.0.0.1:4222".to_owned(),
            system_url: None,
            root_certificates: None,
            allow_data_loss: false,
            namespace: "vm0".to_owned(),
            replicas: 1,
            feed_retention: Duration::from_secs(7 * 24 * 3600),
            feed_max_bytes: 10 << 30,
        }
    }
}

/// Why there is no engine to work with.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No connection.
    #[error("cannot connect to NATS: {0}")]
    Connect(String),
    /// One that is not to be trusted with data.
    #[error(transparent)]
    Server(#[from] ServerFault),
    /// A bucket or stream cannot be made.
    #[error("cannot make {what} in NATS: {why}")]
    Make {
        /// Its name.
        what: String,
        /// What NATS says.
        why: String,
    },
    /// Too few copies.
    #[error(
        "NATS keeps fewer copies than --replicas {wanted} of {few}: they were made under another setting, and what is there is \
         never changed. Hint: for each of them, nats stream edit NAME --replicas {wanted}"
    )]
    Copies {
        /// How many there should be.
        wanted: usize,
        /// Names of streams with how many they have.
        few: String,
    },
    /// The namespace.
    #[error("the namespace {0:?} is not usable: it is 1 to 32 letters and digits")]
    Namespace(String),
}

/// The connection, and everything in it.
#[derive(Clone)]
pub struct Engine {
    client: async_nats::Client,
    context: jetstream::Context,
    namespace: String,
    runs: Bucket,
    specs: Bucket,
    /// Tokens by id.
    pub tokens: Bucket,
    /// Wrapped keys by purpose and id.
    pub keys: Bucket,
    /// Policies of groups.
    pub policies: Bucket,
    /// The newest checkpoint of each session.
    pub sessions: Bucket,
    /// Heartbeats of runners.
    pub fleet: Bucket,
    feed: stream::Stream,
    tails: feed::Tails,
    blobs: object_store::ObjectStore,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine({})", self.namespace)
    }
}

/// The buckets, without the namespace before them.
const BUCKETS: [&str; 7] = [
    "runs", "specs", "tokens", "keys", "policies", "sessions", "fleet",
];

/// A group as two parts of a key or subject.
pub fn dotted(group: &GroupName) -> String {
    group.as_str().replace('/', ".")
}

/// How long a runner is part of the fleet after its last heartbeat.
pub const FLEET_MEMORY: Duration = Duration::from_secs(60);

impl Engine {
    /// Connects, checks the servers and makes what is missing.
    pub async fn open(settings: &Settings) -> Result<Self, OpenError> {
        let ns = &settings.namespace;
        if ns.is_empty() || ns.len() > 32 || !ns.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(OpenError::Namespace(ns.clone()));
        }
        let client = connect(&settings.url, settings).await?;
        check::servers(&client, settings).await?;
        let context = jetstream::context::ContextBuilder::new()
            .timeout(Duration::from_secs(5))
            .ack_timeout(Duration::from_secs(5))
            .max_ack_inflight(16_384)
            .build(client.clone());
        let maker = Maker {
            context: &context,
            settings,
        };
        Ok(Self {
            runs: maker.bucket("runs", None).await?,
            specs: maker.bucket("specs", None).await?,
            tokens: maker.bucket("tokens", None).await?,
            keys: maker.bucket("keys", None).await?,
            policies: maker.bucket("policies", None).await?,
            sessions: maker.bucket("sessions", None).await?,
            fleet: maker.bucket("fleet", Some(FLEET_MEMORY)).await?,
            feed: maker.feed().await?,
            tails: feed::Tails::default(),
            blobs: maker.blobs().await?,
            namespace: ns.clone(),
            client,
            context,
        })
    }

    /// Refuses a storage that keeps fewer copies than these: one that was made before by somebody who said nothing of it
    /// would lose everything with one node of a cluster.
    pub async fn check_copies(&self, wanted: usize) -> Result<(), OpenError> {
        let ns = &self.namespace;
        let buckets = BUCKETS.iter().map(|bucket| format!("KV_{ns}_{bucket}"));
        let others = [format!("{ns}_feed"), format!("OBJ_{ns}_blobs")];
        let mut few = Vec::new();
        for name in buckets.chain(others) {
            let stream = self.context.get_stream(&name).await;
            let stream = stream.map_err(|error| Maker::error(&name, error))?;
            let copies = stream.cached_info().config.num_replicas;
            if copies < wanted {
                few.push(format!("{name} ({copies})"));
            }
        }
        if few.is_empty() {
            return Ok(());
        }
        Err(OpenError::Copies {
            wanted,
            few: few.join(", "),
        })
    }

    /// For messages that need not be kept: pushes between replicas.
    pub fn client(&self) -> &async_nats::Client {
        &self.client
    }

    /// The subject `<ns>.<rest>`.
    pub fn subject(&self, rest: &str) -> String {
        format!("{}.{rest}", self.namespace)
    }

    /// Where words to a runner go. Its group is part of it: an id alone proves nothing, anybody may say it.
    pub fn push_subject(&self, group: &GroupName, runner: RunnerId) -> String {
        self.subject(&format!("push.{}.{runner}", dotted(group)))
    }

    /// The bucket of runs, to watch.
    pub fn runs_bucket(&self) -> &Bucket {
        &self.runs
    }

    /// Deletes everything under the namespace. For tests and tools; nothing of it comes back.
    pub async fn destroy(&self) {
        for bucket in BUCKETS {
            let _ = self
                .context
                .delete_key_value(format!("{}_{bucket}", self.namespace))
                .await;
        }
        let _ = self
            .context
            .delete_stream(format!("{}_feed", self.namespace))
            .await;
        let _ = self
            .context
            .delete_object_store(format!("{}_blobs", self.namespace))
            .await;
    }
}

pub(crate) async fn connect(
    url: &str,
    settings: &Settings,
) -> Result<async_nats::Client, OpenError> {
    // Where another crate of the same build brings another provider, rustls does not choose by itself. An error says that
    // it was chosen already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut options = async_nats::ConnectOptions::new()
        .name("vm0-api")
        .ping_interval(Duration::from_secs(5))
        .connection_timeout(Duration::from_secs(5))
        .request_timeout(Some(Duration::from_secs(5)))
        .client_capacity(65_536)
        .subscription_capacity(65_536);
    if let Some(path) = &settings.root_certificates {
        options = options.add_root_certificates(path.clone());
    }
    // An address may carry a user and a password; what is shown of a failure may not.
    let addresses = url
        .split(',')
        .map(|part| part.trim().parse::<async_nats::ServerAddr>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| OpenError::Connect(error.to_string()))?;
    // The client library does not take them from the address.
    let credentials = addresses
        .iter()
        .find_map(|address| Some((address.username()?, address.password().unwrap_or_default())));
    if let Some((user, password)) = credentials {
        let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        options = options.user_and_password(decode(user), decode(password));
    }
    options
        .connect(addresses)
        .await
        .map_err(|error| OpenError::Connect(explained(&error)))
}

/// All that is known of why there is no connection, with what can be done where the certificate is at fault.
fn explained(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    if text.contains("UnknownIssuer") || text.contains("BadSignature") {
        text.push_str(
            ". Hint: --nats-ca has to name the authority that signed the server's certificate",
        );
    } else if text.contains("not valid for name") {
        text.push_str(". Hint: the address has to be a name that the server's certificate holds");
    }
    text
}

struct Maker<'a> {
    context: &'a jetstream::Context,
    settings: &'a Settings,
}

impl Maker<'_> {
    fn error(what: &str, why: impl std::fmt::Display) -> OpenError {
        OpenError::Make {
            what: what.to_owned(),
            why: why.to_string(),
        }
    }

    async fn bucket(&self, name: &str, memory: Option<Duration>) -> Result<Bucket, OpenError> {
        let name = format!("{}_{name}", self.settings.namespace);
        let config = kv::Config {
            bucket: name.clone(),
            history: 1,
            max_age: memory.unwrap_or_default(),
            // Also what is soon forgotten: a node that restarts forgets a bucket in memory as a whole.
            storage: StorageType::File,
            num_replicas: self.settings.replicas,
            limit_markers: Some(bucket::MARKER_TTL),
            ..kv::Config::default()
        };
        let store = match self.context.create_key_value(config).await {
            Ok(store) => store,
            // There already, made with other settings: by an operator, who knows why, or under another --replicas, which
            // `check_copies` finds out.
            Err(made) => match self.context.get_key_value(&name).await {
                Ok(store) => store,
                Err(_) => return Err(Self::error(&name, made)),
            },
        };
        Ok(Bucket::new(store))
    }

    async fn feed(&self) -> Result<stream::Stream, OpenError> {
        let name = format!("{}_feed", self.settings.namespace);
        let config = stream::Config {
            name: name.clone(),
            subjects: vec![format!("{}.feed.>", self.settings.namespace)],
            max_age: self.settings.feed_retention,
            max_bytes: self.settings.feed_max_bytes,
            discard: DiscardPolicy::Old,
            storage: StorageType::File,
            num_replicas: self.settings.replicas,
            allow_direct: true,
            ..stream::Config::default()
        };
        match self.context.create_stream(config).await {
            Ok(stream) => Ok(stream),
            Err(made) => match self.context.get_stream(&name).await {
                Ok(stream) => Ok(stream),
                Err(_) => Err(Self::error(&name, made)),
            },
        }
    }

    async fn blobs(&self) -> Result<object_store::ObjectStore, OpenError> {
        let name = format!("{}_blobs", self.settings.namespace);
        let config = object_store::Config {
            bucket: name.clone(),
            num_replicas: self.settings.replicas,
            storage: StorageType::File,
            ..object_store::Config::default()
        };
        match self.context.create_object_store(config).await {
            Ok(store) => Ok(store),
            Err(made) => match self.context.get_object_store(&name).await {
                Ok(store) => Ok(store),
                Err(_) => Err(Self::error(&name, made)),
            },
        }
    }
}
