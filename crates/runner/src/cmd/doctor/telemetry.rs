//! The check of what is told to others: traces for a collector.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use super::network::configurations;
use super::{Check, Outcome, Subject};
use crate::config::Collector;

/// All of them.
pub(super) const ALL: &[Check] = &[Check {
    name: "trace collector",
    run: collector,
}];

/// Limit on connecting to one address of it.
const LIMIT: Duration = Duration::from_secs(2);

fn collector(subject: &Subject<'_>) -> Outcome {
    let configurations = match configurations(subject) {
        Ok(configurations) => configurations,
        Err(outcome) => return outcome,
    };
    let mut reached = 0;
    for (file, config) in configurations {
        let telemetry = config.telemetry;
        let Some(collector) = telemetry.otlp_endpoint else {
            continue;
        };
        let shown = file.display();
        if let Some(headers) = telemetry.headers_file
            // Who may not look says nothing.
            && matches!(headers.try_exists(), Ok(false))
        {
            return Outcome::fail(
                format_args!(
                    "{shown}: telemetry.headers_file names {}, which is not there, so the runner does not start",
                    headers.display()
                ),
                "make it, mode 0600, with a `Name: value` a line; or set it to null",
            );
        }
        if let Err(why) = reach(&collector) {
            return Outcome::warn(
                format_args!(
                    "{shown}: the collector at {} cannot be reached: {why}; jobs run, their traces are dropped",
                    collector.url()
                ),
                "start the collector, or set telemetry.otlp_endpoint to where it listens",
            );
        }
        reached += 1;
    }
    match reached {
        0 => Outcome::pass("no runner.yaml asks for traces"),
        _ => Outcome::pass("the collector that takes traces can be reached"),
    }
}

fn reach(collector: &Collector) -> Result<(), String> {
    let url = collector.url();
    // IPv6 addresses stand in brackets in a URL, and not in what is resolved.
    let host = url.host_str().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = url.port_or_known_default().unwrap_or(4318);
    let addresses = (host, port)
        .to_socket_addrs()
        .map_err(|error| error.to_string())?;
    let mut why = "its name has no address".to_owned();
    for address in addresses {
        match TcpStream::connect_timeout(&address, LIMIT) {
            Ok(_) => return Ok(()),
            Err(error) => why = error.to_string(),
        }
    }
    Err(why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_collector_that_listens_is_reached_and_one_that_does_not_is_told_why() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let collector = Collector::try_from(url).unwrap();
        reach(&collector).unwrap();
        drop(listener);
        assert!(reach(&collector).unwrap_err().contains("refused"));
        let localhost = TcpListener::bind("[::1]:0");
        if let Ok(listener) = localhost {
            let port = listener.local_addr().unwrap().port();
            reach(&format!("http://[::1]:{port}").try_into().unwrap()).unwrap();
        }
    }
}
