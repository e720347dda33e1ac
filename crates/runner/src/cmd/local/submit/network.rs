//! `--allow`, `--deny`, `--firewall` and `--secret`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use policy::{Draft, HostPattern, RuleArgument, SecretName, SecretValue};
use zeroize::Zeroizing;

use crate::context::CliError;
use crate::queue::{HandedSecret, JobNetwork};

/// The options.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Network")]
pub(super) struct NetworkArgs {
    /// Let the job reach this host (on 80 and 443, or on one TCP port), and nothing else that no rule allows; may be
    /// repeated
    #[arg(long, value_name = "HOST[:PORT]")]
    allow: Vec<RuleArgument>,
    /// Keep the job from this host; may be repeated, and stands before --allow
    #[arg(long, value_name = "HOST[:PORT]")]
    deny: Vec<RuleArgument>,
    /// Read rules from a file (docs/network.md, "Policy"); those of --deny and --allow stand before them
    #[arg(long, value_name = "FILE")]
    firewall: Option<PathBuf>,
    /// Give the job a secret that never enters its VM: it finds a placeholder in the variable NAME, which the proxy
    /// replaces by the value of your variable VAR in requests to HOST, or where a rule of the firewall file names it
    #[arg(long, value_name = "NAME=env:VAR[@HOST]")]
    secret: Vec<SecretArgument>,
}

/// `NAME=env:VAR[@HOST]`.
#[derive(Clone, Debug)]
struct SecretArgument {
    name: SecretName,
    variable: String,
    host: Option<HostPattern>,
}

impl FromStr for SecretArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The value itself never stands here, so the text may be shown.
        let form =
            "it is NAME=env:VAR or NAME=env:VAR@HOST, such as API_KEY=env:MY_KEY@api.example.com";
        let (name, source) = text.split_once('=').ok_or(form)?;
        let source = source.strip_prefix("env:").ok_or(form)?;
        let (variable, host) = match source.split_once('@') {
            Some((variable, host)) => (variable, Some(host)),
            None => (source, None),
        };
        if variable.is_empty() {
            return Err(form.to_owned());
        }
        Ok(Self {
            name: name.parse().map_err(|error| format!("{error}"))?,
            variable: variable.to_owned(),
            host: host
                .map(str::parse)
                .transpose()
                .map_err(|error| format!("{error}"))?,
        })
    }
}

impl NetworkArgs {
    /// What goes into the job file, and what is handed over beside it.
    pub(super) fn resolve(self) -> Result<(Option<JobNetwork>, Vec<HandedSecret>), CliError> {
        let mut draft = match &self.firewall {
            Some(file) => read(file)?,
            None => Draft::default(),
        };
        let denied = self.deny.iter().map(RuleArgument::deny);
        let allowed = self.allow.iter().map(RuleArgument::allow);
        let first: Vec<_> = denied.chain(allowed).collect();
        draft.rules.splice(0..0, first);

        let mut secrets: Vec<HandedSecret> = Vec::new();
        // Of each secret, the variable that its value is from.
        let mut variables: Vec<String> = Vec::new();
        for argument in self.secret {
            let SecretArgument {
                name,
                variable,
                host,
            } = argument;
            let mut known = secrets.iter_mut().zip(&variables);
            if let Some((known, from)) = known.find(|(secret, _)| secret.name == name) {
                // Or one of both values would go to the host that the other is for.
                if *from != variable {
                    return Err(CliError::usage(format_args!(
                        "--secret {} is given twice, from {from} and from {variable}",
                        name.as_str()
                    ))
                    .with_hint("give each value a name of its own"));
                }
                // Several hosts for one secret.
                match host {
                    Some(host) if !known.hosts.is_empty() => known.hosts.push(host),
                    _ => {
                        return Err(CliError::usage(format_args!(
                            "--secret {} is given twice, and not both times with a host",
                            name.as_str()
                        )));
                    }
                }
                continue;
            }
            let value = value_of(&name, &variable)?;
            secrets.push(HandedSecret {
                name,
                value,
                hosts: host.into_iter().collect(),
            });
            variables.push(variable);
        }
        let network = JobNetwork {
            policy: draft,
            secrets: secrets.iter().map(|secret| secret.name.clone()).collect(),
        };
        Ok(((!network.is_empty()).then_some(network), secrets))
    }
}

fn value_of(name: &SecretName, variable: &str) -> Result<Zeroizing<String>, CliError> {
    let failed = |why: &dyn std::fmt::Display| {
        CliError::usage(format_args!("--secret {}: {why}", name.as_str()))
    };
    let value = std::env::var(variable)
        .map(Zeroizing::new)
        .map_err(|error| match error {
            std::env::VarError::NotPresent => failed(&format_args!(
                "there is no variable {variable} in the environment"
            ))
            .with_hint(format_args!("export {variable}=…")),
            std::env::VarError::NotUnicode(_) => {
                failed(&format_args!("the variable {variable} is not UTF-8 text"))
            }
        })?;
    // Refused here rather than when the job is claimed.
    SecretValue::new(value.as_str().to_owned()).map_err(|error| failed(&error))?;
    Ok(value)
}

fn read(file: &Path) -> Result<Draft, CliError> {
    let shown = file.display();
    let text = std::fs::read_to_string(file)
        .map_err(|error| CliError::failed(format_args!("cannot read {shown}: {error}")))?;
    Draft::from_yaml(&text).map_err(|error| CliError::failed(format_args!("{shown}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_names_a_variable_and_perhaps_a_host() {
        let parse = |text: &str| text.parse::<SecretArgument>();
        let plain = parse("KEY=env:MY_KEY").unwrap();
        assert_eq!((plain.variable.as_str(), plain.host), ("MY_KEY", None));
        let bound = parse("KEY=env:MY_KEY@*.example.com").unwrap();
        assert_eq!(bound.host, Some("*.example.com".parse().unwrap()));
        for bad in [
            "KEY",
            "KEY=value",
            "KEY=env:",
            "=env:X",
            "KEY=env:X@",
            "VM0_KEY=env:X@a b",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_secret_has_one_value_for_all_its_hosts() {
        let resolve = |secrets: &[&str]| {
            NetworkArgs {
                allow: Vec::new(),
                deny: Vec::new(),
                firewall: None,
                secret: secrets.iter().map(|text| text.parse().unwrap()).collect(),
            }
            .resolve()
        };
        // Two variables that cargo sets.
        let here = "KEY=env:CARGO_MANIFEST_DIR@api.example.com";
        let (_, secrets) = resolve(&[here, "KEY=env:CARGO_MANIFEST_DIR@b.example.com"]).unwrap();
        assert_eq!((secrets.len(), secrets[0].hosts.len()), (1, 2));
        let there = "KEY=env:CARGO_MANIFEST_PATH@b.example.com";
        let error = resolve(&[here, there]).unwrap_err().to_string();
        assert!(error.contains("CARGO_MANIFEST_PATH"), "{error}");
        // As ever: with a host both times, or the first goes everywhere.
        assert!(resolve(&["KEY=env:CARGO_MANIFEST_DIR", here]).is_err());
        let (_, secrets) = resolve(&[here, "OTHER=env:CARGO_MANIFEST_PATH@b.example.com"]).unwrap();
        assert_eq!(secrets.len(), 2);
    }

    #[test]
    fn denials_stand_before_permissions_and_both_before_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("firewall.yaml");
        std::fs::write(&file, "default: deny\nrules:\n  - host: c.example.com\n").unwrap();
        let args = NetworkArgs {
            allow: vec!["a.example.com".parse().unwrap()],
            deny: vec!["b.example.com".parse().unwrap()],
            firewall: Some(file),
            secret: Vec::new(),
        };
        let (network, secrets) = args.resolve().unwrap();
        let rules = network.unwrap().policy.rules;
        let hosts: Vec<String> = rules.iter().map(|rule| rule.host().to_string()).collect();
        assert_eq!(hosts, ["b.example.com", "a.example.com", "c.example.com"]);
        assert!(secrets.is_empty());
    }
}
