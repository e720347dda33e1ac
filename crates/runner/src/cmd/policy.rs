//! `runner policy`: what a running job may reach, shown and changed.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use policy::{Effect, Mode, Policy, Rule, RuleArgument};
use serde_json::Value;
use tokio::time::timeout;

use crate::context::{CliError, Context, block_on};
use crate::control::client::{self, ActiveRun, RunPrefix};
use crate::control::protocol::{self, Reply, Request};
use crate::terminal;

/// Longest wait for the proxy to take a change: it closes connections that are denied now.
const LIMIT: Duration = Duration::from_secs(120);

/// Command line.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without --allow and --deny it only shows the policy, which holds no secret's value. A change stands before \
all other rules, denials first, holds from the next request on, and lasts until the job ends.\n\n\
Examples:\n  runner policy 6f1c\n  runner policy 6f1c --allow '*.npmjs.org' --allow git.example.com:22\n  \
runner policy 6f1c --deny api.example.com\n  runner policy 6f1c --json"
)]
pub(crate) struct Args {
    /// Beginning of the run's id
    #[arg(value_name = "RUN")]
    run: RunPrefix,
    /// Let the job reach this host from now on (on 80 and 443, or on one TCP port); may be repeated
    #[arg(long, value_name = "HOST[:PORT]")]
    allow: Vec<RuleArgument>,
    /// Keep the job from this host from now on; may be repeated, and stands before --allow
    #[arg(long, value_name = "HOST[:PORT]")]
    deny: Vec<RuleArgument>,
    /// Print the canonical form (docs/network.md, "Policy"), one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(crate) fn run(args: Args, context: &Context) -> Result<ExitCode, CliError> {
    let home = context.home()?;
    block_on(async {
        let found = client::find(&home, &args.run).await?;
        let canonical = ask(&found, args.deny, args.allow).await?;
        if args.json {
            context.print_line(canonical)?;
        } else {
            let policy = Policy::from_json(&canonical).map_err(|_| client::odd())?;
            context.print(table(&policy))?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// The policy of a run, changed if anything is to be denied or allowed.
pub(crate) async fn ask(
    found: &ActiveRun,
    deny: Vec<RuleArgument>,
    allow: Vec<RuleArgument>,
) -> Result<String, CliError> {
    let run = found.info.run_id;
    let request = if deny.is_empty() && allow.is_empty() {
        Request::Policy { run }
    } else {
        Request::ChangePolicy { run, deny, allow }
    };
    let answer = async {
        let mut connection = found.instance.request(&request).await?;
        protocol::receive::<Reply, _>(&mut connection)
            .await?
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
    };
    let reply = timeout(LIMIT, answer)
        .await
        .unwrap_or_else(|limit| Err(limit.into()));
    match reply.map_err(|error| client::broken(&error))? {
        Reply::Policy(canonical) => Ok(canonical),
        Reply::Refused(refusal) => Err(CliError::failed(refusal.message).with_hint(refusal.hint)),
        Reply::Failed(failure) => Err(client::told(failure)),
        _ => Err(client::odd()),
    }
}

/// The policy for people: the rules in the order in which they decide, one a line, as a firewall file's YAML takes them.
fn table(policy: &Policy) -> String {
    let default = match policy.default_effect() {
        Effect::Allow => "allow",
        Effect::Deny => "deny",
    };
    let mut text = format!("default: {default}\n");
    if policy.mode() == Mode::Audit {
        text.push_str("mode: audit\n");
    }
    if policy.rules().is_empty() {
        return text;
    }
    text.push_str("rules:\n");
    for rule in policy.rules() {
        text.push_str(&format!("  - {}\n", terminal::escape(&rule_line(rule))));
    }
    text
}

/// A rule without what it says nothing about, as JSON, which is YAML too.
fn rule_line(rule: &Rule) -> String {
    // As somebody would write it; what is in no list follows.
    const ORDER: [&str; 6] = ["name", "action", "scheme", "host", "port", "path"];
    let Ok(Value::Object(mut fields)) = serde_json::to_value(rule) else {
        return String::new();
    };
    fields.retain(|_, value| match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    });
    let first = ORDER
        .iter()
        .filter_map(|name| fields.remove(*name).map(|value| format!("{name}: {value}")));
    let mut parts: Vec<String> = first.collect();
    parts.extend(
        fields
            .iter()
            .map(|(name, value)| format!("{name}: {value}")),
    );
    format!("{{{}}}", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use policy::Draft;

    use super::*;

    #[test]
    fn what_is_shown_is_a_firewall_file_that_means_the_same() {
        let written = "default: allow\nmode: audit\nrules:\n  - base: https://api.example.com/v1\n    \
                       allow: ['GET /{x+}']\n    headers: {Authorization: 'Bearer ${{ secrets.KEY }}'}\n  \
                       - {host: git.example.com, port: 22}\n";
        let policy = Draft::from_yaml(written).unwrap().into_policy().unwrap();
        let shown = table(&policy);
        let again = Draft::from_yaml(&shown).unwrap().into_policy().unwrap();
        assert_eq!(again.to_json(), policy.to_json());
        assert_eq!(shown.lines().count(), 5, "{shown}");
        assert_eq!(table(&Policy::default()).lines().count(), 1);
    }
}
