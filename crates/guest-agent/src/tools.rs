//! Web tools that never come back.

use std::time::{Duration, Instant};

use crate::events::ToolCall;

/// Tools known to hang for ever on a dead connection. Others may take as long as they like.
const WATCHED: [&str; 2] = ["WebSearch", "WebFetch"];

/// Calls watched at once; more than any real assistant makes in parallel.
const MAX_WATCHED: usize = 256;

/// The watched calls that have not returned yet, oldest first.
#[derive(Default)]
pub(crate) struct PendingTools {
    calls: Vec<Pending>,
}

struct Pending {
    id: String,
    name: &'static str,
    since: Instant,
}

impl PendingTools {
    pub(crate) fn called(&mut self, call: &ToolCall<'_>, now: Instant) {
        let name = WATCHED.into_iter().find(|name| call.name == *name);
        let known = self.calls.iter().any(|pending| pending.id == call.id);
        if let Some(name) = name
            && !known
            && self.calls.len() < MAX_WATCHED
        {
            self.calls.push(Pending {
                id: call.id.clone().into_owned(),
                name,
                since: now,
            });
        }
    }

    pub(crate) fn returned(&mut self, id: &str) {
        self.calls.retain(|pending| pending.id != id);
    }

    /// When the oldest call will have taken `limit`, and its tool.
    pub(crate) fn deadline(&self, limit: Duration) -> Option<(Instant, &'static str)> {
        let oldest = self.calls.first()?;
        Some((oldest.since.checked_add(limit)?, oldest.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call<'a>(id: &'a str, name: &'a str) -> ToolCall<'a> {
        ToolCall {
            id: id.into(),
            name: name.into(),
        }
    }

    #[test]
    fn only_web_tools_are_watched_and_only_until_they_return() {
        let limit = Duration::from_secs(1);
        let now = Instant::now();
        let later = now + limit;
        let mut tools = PendingTools::default();
        tools.called(&call("b", "Bash"), now);
        assert_eq!(tools.deadline(limit), None);
        tools.called(&call("f", "WebFetch"), now);
        tools.called(&call("s", "WebSearch"), later);
        tools.called(&call("f", "WebFetch"), later);
        assert_eq!(tools.deadline(limit), Some((now + limit, "WebFetch")));
        tools.returned("f");
        assert_eq!(tools.deadline(limit), Some((later + limit, "WebSearch")));
        tools.returned("unknown");
        tools.returned("s");
        assert_eq!(tools.deadline(limit), None);
    }
}
