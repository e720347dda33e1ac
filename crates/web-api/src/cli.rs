//! The command line of `vm0-api`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use api_types::GroupName;
use api_types::runner::MAX_WAIT_SECS;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::engine::Settings;
use crate::tokens::BearerKind;

/// The Web API of API mode: a stateless HTTP server over NATS JetStream.
///
/// Any number of replicas may run behind a load balancer, all with the same NATS, namespace and master key file.
#[derive(Debug, Parser)]
#[command(
    name = "vm0-api",
    version,
    after_help = "EXAMPLES:
    vm0-api master-key --out /etc/vm0/master.key
    vm0-api token create --kind client --group vm0/demo --name ci
    vm0-api serve --master-key /etc/vm0/master.key --nats-system-url nats://sys:…@127.0.0.1:4222
    vm0-api openapi > openapi.json"
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the API until SIGTERM or SIGINT
    Serve(Box<Serve>),
    /// Make a master key file, which every replica is to be given, or replace one
    #[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
    MasterKey {
        /// What to do with it
        #[command(subcommand)]
        command: Option<MasterKeyCommand>,
        /// Make one here; nothing may be there yet
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Make, list or revoke API keys and runner tokens
    Token {
        /// What to do with them
        #[command(subcommand)]
        command: TokenCommand,
        /// Where they are
        #[command(flatten)]
        nats: Nats,
    },
    /// Print the OpenAPI description
    Openapi,
}

/// What to do with a master key.
#[derive(Debug, Subcommand)]
pub enum MasterKeyCommand {
    /// Wrap all keys by another master key
    ///
    /// Every replica has to have been given both files before (serve --master-key OLD --other-master-key NEW). May be killed and run
    /// again at any time. docs/api-mode.md has all steps.
    Rotate {
        /// The file that the keys are wrapped by
        #[arg(long, value_name = "FILE")]
        old: PathBuf,
        /// The file that they are to be wrapped by
        #[arg(long, value_name = "FILE")]
        new: PathBuf,
        /// Where they are
        #[command(flatten)]
        nats: Nats,
    },
}

/// What a token is for.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kind {
    /// An API key
    Client,
    /// An API key that may also set policies of groups
    Operator,
    /// A runner's token
    Runner,
}

impl From<Kind> for BearerKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Client => Self::Client,
            Kind::Operator => Self::Operator,
            Kind::Runner => Self::Runner,
        }
    }
}

/// What to do with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make one and print it, this once
    Create {
        /// What for
        #[arg(long, value_enum)]
        kind: Kind,
        /// Of which group; may be repeated
        #[arg(long = "group", required = true, value_name = "ORG/NAME")]
        groups: Vec<GroupName>,
        /// Whose it is, for people
        #[arg(long)]
        name: String,
    },
    /// List them: id, kind, groups, name
    List,
    /// Take one back; every replica refuses it at once, and ends within 15 seconds what goes on with it
    Revoke {
        /// Its id: the part between the second and the third underscore
        id: String,
    },
}

/// Where NATS is. Global: also behind `token create`, where they are looked for.
#[derive(Clone, Debug, Args)]
pub struct Nats {
    /// Addresses of the NATS servers, separated by commas: nats://user:password@host:port
    #[arg(
        long,
        global = true,
        env = "VM0_NATS_URL",
        default_value = "nats://127.0.0.1:4222",
        hide_env_values = true
    )]
    pub nats_url: String,
    /// The same for a user of the system account, by whom it is learnt whether the servers sync each write
    #[arg(
        long,
        global = true,
        env = "VM0_NATS_SYSTEM_URL",
        hide_env_values = true
    )]
    pub nats_system_url: Option<String>,
    /// Authorities that may have signed the servers' certificates, PEM
    #[arg(long, global = true, value_name = "FILE")]
    pub nats_ca: Option<PathBuf>,
    /// Take servers that may lose what they acknowledged
    #[arg(long, global = true)]
    pub allow_data_loss: bool,
    /// First part of every name in NATS
    #[arg(long, global = true, default_value = "vm0")]
    pub namespace: String,
    /// Copies of everything in NATS: 3 in a cluster. Whichever command is the first one makes them; `serve` refuses fewer
    #[arg(long, global = true, env = "VM0_NATS_REPLICAS", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=5))]
    pub replicas: u8,
    /// How long events, outputs and logs are kept, days
    #[arg(long, global = true, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub feed_days: u32,
    /// Most of them in all, MiB; the oldest go first
    #[arg(long, global = true, default_value_t = 10_240, value_parser = clap::value_parser!(u32).range(1..))]
    pub feed_mb: u32,
}

impl Nats {
    /// As the engine takes them.
    pub fn settings(&self) -> Settings {
        Settings {
            url: self.nats_url.clone(),
            system_url: self.nats_system_url.clone(),
            root_certificates: self.nats_ca.clone(),
            allow_data_loss: self.allow_data_loss,
            namespace: self.namespace.clone(),
            replicas: usize::from(self.replicas),
            feed_retention: Duration::from_secs(u64::from(self.feed_days).saturating_mul(86_400)),
            feed_max_bytes: i64::from(self.feed_mb).saturating_mul(1 << 20),
        }
    }
}

/// How to serve.
#[derive(Debug, Args)]
pub struct Serve {
    /// Where to listen: plain HTTP, so on loopback or behind a load balancer that ends TLS
    #[arg(long, env = "VM0_API_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// The master key file
    #[arg(long, env = "VM0_API_MASTER_KEY", value_name = "FILE")]
    pub master_key: PathBuf,
    /// A further master key file whose keys are understood, while the master key is being replaced
    #[arg(long, env = "VM0_API_OTHER_MASTER_KEY", value_name = "FILE")]
    pub other_master_key: Option<PathBuf>,
    /// How long a runner keeps a run without renewing its lease, seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub lease_secs: u64,
    /// Most runs of a group that wait; further ones are answered with 429
    #[arg(long, default_value_t = 100_000)]
    pub max_queued: u64,
    /// How long finished runs are kept, days
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub run_days: u32,
    /// Time limit of runs whose client gives none, seconds: as the runners have it
    #[arg(long, default_value_t = 7200, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub default_timeout_secs: u64,
    /// How long a runner's request for work is held at most, seconds: less than what a load balancer in between gives an
    /// idle connection
    #[arg(long, default_value_t = MAX_WAIT_SECS, value_parser = clap::value_parser!(u64).range(1..=MAX_WAIT_SECS))]
    pub max_wait_secs: u64,
    /// How wrong the replica's clock goes, milliseconds: for tests of the others' tolerance
    #[arg(long, default_value_t = 0, hide = true, allow_negative_numbers = true)]
    pub clock_skew_ms: i64,
    /// Where everything is kept
    #[command(flatten)]
    pub nats: Nats,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn who_makes_the_first_token_can_say_how_many_copies_there_are_to_be() {
        let mut cli = super::Cli::command();
        cli.build();
        let create = cli
            .find_subcommand_mut("token")
            .and_then(|token| token.find_subcommand_mut("create"))
            .unwrap();
        let help = create.render_long_help().to_string();
        assert!(help.contains("--replicas"), "{help}");
        assert!(help.contains("VM0_NATS_REPLICAS"), "{help}");
    }
}
