//! The checks of what carries jobs' traffic: packet filter, proxy, authorities.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::{Check, Outcome, Subject};
use crate::config::{self, Config};
use crate::home::{Home, rel};
use crate::image::Tool;
use crate::names::RunnerName;
use crate::proxy::{Authority, install};

/// All of them.
pub(super) const ALL: &[Check] = &[
    Check {
        name: "packet filter",
        run: packet_filter,
    },
    Check {
        name: "forwarding",
        run: forwarding,
    },
    Check {
        name: "python",
        run: python,
    },
    Check {
        name: "proxy",
        run: proxy,
    },
    Check {
        name: "proxy authority",
        run: authority,
    },
    Check {
        name: "upstream trust",
        run: upstream_trust,
    },
];

/// What a hub's rules are made of, in small.
const RULES: &str = "
table inet vm0_probe {
  set open { type ipv4_addr . ipv4_addr . inet_service; flags timeout; }
  chain nat { type nat hook prerouting priority dstnat; tcp dport 443 redirect to :8080; }
  chain out { type nat hook postrouting priority srcnat; masquerade; }
  chain forward {
    type filter hook forward priority filter; policy drop;
    ip saddr . ip daddr . tcp dport @open ct state new accept
    limit rate 10/second log group 1
    ct count over 10 reject with tcp reset
  }
}
";

fn packet_filter(_: &Subject<'_>) -> Outcome {
    if !Tool::exists("nft") {
        return Outcome::fail("nft is not installed", "sudo runner setup");
    }
    if !rustix::process::geteuid().is_root() {
        return Outcome::warn(
            "nft is installed; whether the kernel takes rules only root can try",
            "look as root: sudo runner doctor",
        );
    }
    // A namespace of its own, which ends with the program: nothing of the host's is touched.
    match output(&["unshare", "--net", "nft", "-f", "-"], RULES) {
        Ok(_) => Outcome::pass("nft makes rules like those of a hub in a network namespace"),
        Err(why) => Outcome::fail(
            format_args!("nft cannot make a hub's rules in a network namespace: {why}"),
            "use a kernel with nf_tables, nft_chain_nat, nft_redir, nft_masq, nft_log, nft_connlimit and nft_reject \
             (`modprobe` them, or have the container's host do it)",
        ),
    }
}

/// What lets hubs through where something of the host drops what it forwards.
const LET_THROUGH: &str = "iptables -I FORWARD -i vm0h+ -j ACCEPT; iptables -I FORWARD -o vm0h+ -m conntrack --ctstate \
RELATED,ESTABLISHED -j ACCEPT (with Docker in its chain DOCKER-USER instead of FORWARD; with ufw: ufw default allow routed)";

fn forwarding(_: &Subject<'_>) -> Outcome {
    if !rustix::process::geteuid().is_root() {
        return Outcome::warn(
            "whether the host's firewall forwards jobs' traffic only root sees",
            "look as root: sudo runner doctor",
        );
    }
    if !Tool::exists("nft") {
        return Outcome::warn(
            "without nft the host's rules cannot be looked at",
            "sudo runner setup",
        );
    }
    let drops = output(&["nft", "-j", "-t", "list", "ruleset"], "")
        .and_then(|text| dropping(&text).ok_or_else(|| "nft gave no JSON".to_owned()));
    let legacy = ["iptables-legacy", "-S", "FORWARD"];
    let legacy = Tool::exists("iptables-legacy").then(|| output(&legacy, ""));
    let legacy = legacy.and_then(Result::ok).filter(|rules| {
        rules.lines().any(|rule| rule == "-P FORWARD DROP") && !rules.contains(" vm0h")
    });
    let legacy = legacy.map(|_| "iptables-legacy: FORWARD".to_owned());
    match drops {
        Err(why) => Outcome::warn(
            format_args!("the host's rules cannot be read: {why}"),
            "look at them: sudo nft list ruleset",
        ),
        Ok(mut drops) => {
            drops.extend(legacy);
            if drops.is_empty() {
                return Outcome::pass("no firewall of the host drops what it forwards");
            }
            Outcome::warn(
                format_args!(
                    "{} drops what the host forwards (Docker and ufw set that), most likely also what jobs send: their \
                     connections would time out",
                    drops.join(", ")
                ),
                LET_THROUGH,
            )
        }
    }
}

/// Chains that drop by default what is forwarded and say nothing of hubs; runners' own tables left out.
fn dropping(ruleset: &str) -> Option<Vec<String>> {
    let ruleset: Value = serde_json::from_str(ruleset).ok()?;
    let objects = ruleset.get("nftables")?.as_array()?;
    let text = |object: &Value, key: &str| {
        let value = object.get(key).and_then(Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    let speaks_of_hubs = |table: &str| {
        let mut rules = objects.iter().filter_map(|object| object.get("rule"));
        rules.any(|rule| text(rule, "table") == table && rule.to_string().contains("\"vm0h"))
    };
    let chains = objects.iter().filter_map(|object| object.get("chain"));
    let found = chains.filter_map(|chain| {
        let table = text(chain, "table");
        let drops = text(chain, "hook") == "forward"
            && text(chain, "policy") == "drop"
            && !table.starts_with("vm0_")
            && !speaks_of_hubs(&table);
        drops.then(|| format!("{} {table} {}", text(chain, "family"), text(chain, "name")))
    });
    Some(found.collect())
}

fn python(_: &Subject<'_>) -> Outcome {
    let (major, minor) = install::OLDEST;
    match install::python_version() {
        None => Outcome::fail(
            "there is no /usr/bin/python3, which the proxy needs",
            "sudo runner setup",
        ),
        Some(found) if found < install::OLDEST => Outcome::fail(
            format_args!(
                "/usr/bin/python3 is {}.{}; the proxy needs {major}.{minor}",
                found.0, found.1
            ),
            "upgrade the host's system: Debian 12 or Ubuntu 24.04 or later",
        ),
        Some(_) if !install::python_is_ready() => Outcome::fail(
            "/usr/bin/python3 cannot make virtual environments",
            "sudo runner setup (it installs python3-venv)",
        ),
        Some((major, minor)) => Outcome::pass(format_args!(
            "/usr/bin/python3 is {major}.{minor} and makes virtual environments"
        )),
    }
}

fn open_home(subject: &Subject<'_>) -> Result<Option<Home>, Outcome> {
    if !subject.home.exists() {
        return Ok(None);
    }
    let home = subject.context.home();
    home.map(Some)
        .map_err(|error| Outcome::fail(&error, "use another home with --home DIR"))
}

fn proxy(subject: &Subject<'_>) -> Outcome {
    let installed = match open_home(subject) {
        Ok(home) => home.map(|home| install::installed(&home)),
        Err(outcome) => return outcome,
    };
    match installed {
        Some(Ok(Some(_))) => Outcome::pass("it is installed for this runner"),
        None | Some(Ok(None)) => Outcome::fail(
            "the proxy is not installed, or for a runner of another version",
            "sudo runner setup",
        ),
        Some(Err(error)) => Outcome::fail(&error, "look as root: sudo runner doctor"),
    }
}

/// A certificate that expires within this is told, seconds.
const SOON: &str = "2592000";

fn authority(subject: &Subject<'_>) -> Outcome {
    let loaded = match open_home(subject) {
        Ok(home) => home.map(|home| Authority::load(&home)),
        Err(outcome) => return outcome,
    };
    let authority = match loaded {
        Some(Ok(Some(authority))) => authority,
        None | Some(Ok(None)) => {
            return Outcome::fail(
                "the proxy's certificate authority has not been made",
                "sudo runner setup",
            );
        }
        Some(Err(error)) => return Outcome::fail(&error, "look as root: sudo runner doctor"),
    };
    expiry(authority.certificate())
}

fn expiry(certificate: &str) -> Outcome {
    let renew =
        "sudo runner setup --rotate-ca, then build each profile again and restart the runners";
    let check = ["openssl", "x509", "-noout", "-enddate", "-checkend"];
    let valid = |seconds: &'static str| {
        let command: Vec<&str> = check.into_iter().chain([seconds]).collect();
        output(&command, certificate)
    };
    match (valid(SOON), valid("0")) {
        (Ok(text), _) => {
            let end = text.lines().find_map(|line| line.strip_prefix("notAfter="));
            Outcome::pass(format_args!(
                "it is there, and valid until {}; whether images trust it the check `image` says",
                end.unwrap_or("some later day")
            ))
        }
        (Err(_), Ok(_)) => Outcome::warn("its certificate expires within 30 days", renew),
        (Err(_), Err(_)) => Outcome::fail(
            "its certificate has expired or cannot be read by openssl",
            renew,
        ),
    }
}

/// What configures the runners of the home, with the file's path; none if there is no home yet.
pub(super) fn configurations(subject: &Subject<'_>) -> Result<Vec<(PathBuf, Config)>, Outcome> {
    let Some(home) = open_home(subject)? else {
        return Ok(Vec::new());
    };
    let files = runners(&home).into_iter();
    files
        .map(|name| home.at(rel::runner_yaml(&name)))
        .filter(|file| file.exists())
        .map(|file| match config::load(&file) {
            Ok(config) => Ok((file, config)),
            Err(error) => Err(Outcome::warn(
                &error,
                format_args!(
                    "runner config --check {} says what to correct",
                    file.display()
                ),
            )),
        })
        .collect()
}

fn upstream_trust(subject: &Subject<'_>) -> Outcome {
    let configurations = match configurations(subject) {
        Ok(configurations) => configurations,
        Err(outcome) => return outcome,
    };
    if configurations.is_empty() {
        return Outcome::pass("no runner is configured yet");
    }
    for (file, config) in configurations {
        let shown = file.display();
        let trusted = config.network.ssl_verify_upstream_trusted_ca;
        if trusted.as_os_str().is_empty() {
            return Outcome::warn(
                format_args!(
                    "{shown}: network.ssl_verify_upstream_trusted_ca is empty, so the proxy believes mitmproxy's own list \
                     and no authority of this host: servers with a certificate of your own authority are answered \
                     502 Bad Gateway, \"certificate verify failed\""
                ),
                "set it to /etc/ssl/certs/ca-certificates.crt and restart the runner; an authority is added to that file \
                 by update-ca-certificates",
            );
        }
        if !trusted.is_file() {
            return Outcome::fail(
                format_args!(
                    "{shown}: network.ssl_verify_upstream_trusted_ca names {}, which is not there; without it every \
                     server would be answered 502 Bad Gateway, \"certificate verify failed\", so the runner does not start",
                    trusted.display()
                ),
                "install ca-certificates, or name a file of certificates (PEM) that is there",
            );
        }
    }
    Outcome::pass("the proxy believes the authorities that its configuration names")
}

fn runners(home: &Home) -> Vec<RunnerName> {
    let entries = home.dir().open_dir(rel::RUNNERS).and_then(|dir| dir.list());
    let entries = entries.unwrap_or_default().into_iter();
    entries
        .filter_map(|entry| entry.name.to_str()?.parse().ok())
        .collect()
}

/// Runs a program with this input; gives its output, or what it complained of.
pub(super) fn output(command: &[&str], input: &str) -> Result<String, String> {
    let (program, args) = command.split_first().ok_or("nothing to run")?;
    let run = || -> std::io::Result<std::process::Output> {
        let mut child = Command::new(program)
            .args(args)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read it says why in another way.
            let _ = stdin.write_all(input.as_bytes());
        }
        child.wait_with_output()
    };
    let output = run().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    let first = complaint.lines().next().unwrap_or_default();
    Err(match first {
        "" => format!("{program}: {}", output.status),
        first => crate::terminal::escape(first),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn a_chain_that_drops_is_found_unless_it_is_ours_or_lets_hubs_through() {
        let chain = |table: &str, policy: &str| {
            format!(
                r#"{{"chain":{{"family":"ip","table":"{table}","name":"FORWARD","handle":1,"type":"filter","hook":"forward","prio":0,"policy":"{policy}"}}}}"#
            )
        };
        let rule = r#"{"rule":{"family":"ip","table":"filter","chain":"DOCKER-USER","expr":[{"match":{"left":{"meta":{"key":"iifname"}},"right":"vm0h*"}},{"accept":null}]}}"#;
        let found = |objects: &[String]| {
            dropping(&format!(r#"{{"nftables":[{}]}}"#, objects.join(","))).unwrap()
        };
        assert_eq!(found(&[chain("filter", "drop")]), ["ip filter FORWARD"]);
        assert!(found(&[chain("filter", "accept"), chain("vm0_hub3", "drop")]).is_empty());
        assert!(found(&[chain("filter", "drop"), rule.to_owned()]).is_empty());
        assert_eq!(dropping("nonsense"), None);
    }

    #[test]
    fn a_certificates_end_is_told_before_it_comes() {
        let make = |days: &str| {
            let temp = tempfile::tempdir().unwrap();
            let key = temp.path().join("key");
            let made = Command::new("openssl")
                .args([
                    "req", "-x509", "-nodes", "-batch", "-newkey", "rsa:2048", "-subj", "/CN=x",
                ])
                .args(["-days", days, "-keyout"])
                .arg(&key)
                .stderr(Stdio::null())
                .output()
                .unwrap();
            String::from_utf8(made.stdout).unwrap()
        };
        assert_eq!(expiry(&make("3650")).status, Status::Pass);
        assert_eq!(expiry(&make("10")).status, Status::Warn);
        assert_eq!(expiry("nonsense").status, Status::Fail);
    }

    #[test]
    fn what_a_program_complains_of_is_told() {
        assert_eq!(output(&["cat"], "a\nb").unwrap(), "a\nb");
        let error = output(&["sh", "-c", "echo broken >&2; exit 3"], "").unwrap_err();
        assert_eq!(error, "broken");
        assert!(output(&["/no/such/program"], "").is_err());
    }
}
