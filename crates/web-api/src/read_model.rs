//! Lists of runs: a SQLite database of this replica's own, made anew from the bucket of runs whenever it starts.
//!
//! It lags behind by what the watch lags behind. Who must know reads the run itself.

use std::sync::{Mutex, PoisonError};

use api_types::client::{Run, RunPage, RunState};
use api_types::{GroupName, ProfileName, RunId, SessionId, UnixMillis};
use rusqlite::types::Value;
use rusqlite::{Connection, params_from_iter};

use crate::run::Entry;

/// Why there is no list.
#[derive(Debug, thiserror::Error)]
pub enum ReadModelError {
    /// SQLite.
    #[error("the list of runs cannot be read: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// What it holds.
    #[error("the list of runs is damaged: {0}")]
    Json(#[from] serde_json::Error),
    /// A cursor that was not ours.
    #[error("the cursor is not one that a list gave")]
    Cursor,
}

/// Which runs.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Of these groups; none: of no group at all.
    pub groups: Vec<GroupName>,
    /// In this state.
    pub state: Option<RunState>,
    /// Of this profile.
    pub profile: Option<ProfileName>,
    /// Of this session.
    pub session: Option<SessionId>,
    /// Whose title holds this, or whose id begins with it.
    pub search: Option<String>,
    /// Accepted at or after this.
    pub since: Option<UnixMillis>,
    /// Accepted before this.
    pub until: Option<UnixMillis>,
    /// After the last one of an earlier page.
    pub cursor: Option<String>,
    /// So many at most.
    pub limit: u32,
}

/// The database.
#[derive(Debug)]
pub struct ReadModel {
    connection: Mutex<Connection>,
}

const SCHEMA: &str = "
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    CREATE TABLE runs (
        run TEXT PRIMARY KEY, revision INTEGER NOT NULL, grp TEXT NOT NULL, state TEXT NOT NULL, profile TEXT NOT NULL,
        session TEXT, title TEXT NOT NULL, created INTEGER NOT NULL, ended INTEGER, body TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX by_group ON runs (grp, created DESC, run DESC);
    CREATE INDEX by_session ON runs (session, created DESC) WHERE session IS NOT NULL;
    CREATE INDEX by_end ON runs (ended) WHERE ended IS NOT NULL;
";

fn state_text(state: RunState) -> &'static str {
    match state {
        RunState::Queued => "queued",
        RunState::Running => "running",
        RunState::Done => "done",
    }
}

fn integer(millis: u64) -> i64 {
    i64::try_from(millis).unwrap_or(i64::MAX)
}

impl ReadModel {
    /// An empty one. SQLite keeps it in memory and moves what is too much into a file that has no name.
    pub fn open() -> Result<Self, ReadModelError> {
        let connection = Connection::open("")?;
        connection.execute_batch(SCHEMA)?;
        Ok(Self {
            connection: Mutex::new(connection),
        })
    }

    /// Takes note of entries, in one transaction.
    pub fn note(&self, entries: &[(Entry, u64)]) -> Result<(), ReadModelError> {
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let transaction = connection.transaction()?;
        {
            let mut statement = transaction.prepare(
                "INSERT INTO runs (run, revision, grp, state, profile, session, title, created, ended, body)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
                 ON CONFLICT (run) DO UPDATE SET revision = excluded.revision, state = excluded.state,
                     ended = excluded.ended, body = excluded.body
                 WHERE excluded.revision > runs.revision",
            )?;
            for (entry, revision) in entries {
                let view = entry.view();
                statement.execute((
                    entry.run.to_string(),
                    integer(*revision),
                    entry.group.as_str(),
                    state_text(view.state),
                    entry.profile.as_str(),
                    entry.session.as_ref().map(SessionId::as_str),
                    &entry.title,
                    integer(entry.created_at),
                    view.result.as_ref().map(|result| integer(result.at)),
                    serde_json::to_string(&view)?,
                ))?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// A run is no more.
    pub fn forget(&self, run: RunId) -> Result<(), ReadModelError> {
        let connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        connection.execute("DELETE FROM runs WHERE run = ?1", [run.to_string()])?;
        Ok(())
    }

    /// A finished run is no more. One that was made anew meanwhile stays.
    pub fn forget_finished(&self, run: RunId) -> Result<(), ReadModelError> {
        let connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        connection.execute(
            "DELETE FROM runs WHERE run = ?1 AND ended IS NOT NULL",
            [run.to_string()],
        )?;
        Ok(())
    }

    /// Runs, newest first.
    pub fn list(&self, filter: &Filter) -> Result<RunPage, ReadModelError> {
        let (mut clauses, mut values) = (Vec::<String>::new(), Vec::<Value>::new());
        let mut equal = |column: &str, text: Option<&str>| {
            if let Some(text) = text {
                clauses.push(format!("{column} = ?"));
                values.push(Value::Text(text.to_owned()));
            }
        };
        equal("state", filter.state.map(state_text));
        equal("profile", filter.profile.as_ref().map(ProfileName::as_str));
        equal("session", filter.session.as_ref().map(SessionId::as_str));
        let places = vec!["?"; filter.groups.len()].join(",");
        clauses.push(format!("grp IN ({places})"));
        values.extend(
            filter
                .groups
                .iter()
                .map(|g| Value::Text(g.as_str().to_owned())),
        );
        if let Some(search) = &filter.search {
            clauses.push(
                "(instr(lower(title), lower(?)) > 0 OR substr(run, 1, length(?)) = ?)".to_owned(),
            );
            values.extend(std::iter::repeat_n(Value::Text(search.clone()), 3));
        }
        if let Some(since) = filter.since {
            clauses.push("created >= ?".to_owned());
            values.push(Value::Integer(integer(since)));
        }
        if let Some(until) = filter.until {
            clauses.push("created < ?".to_owned());
            values.push(Value::Integer(integer(until)));
        }
        if let Some(cursor) = &filter.cursor {
            let (created, run) = parse_cursor(cursor).ok_or(ReadModelError::Cursor)?;
            clauses.push("(created, run) < (?, ?)".to_owned());
            values.push(Value::Integer(created));
            values.push(Value::Text(run.to_string()));
        }
        let limit = filter.limit.max(1);
        values.push(Value::Integer(i64::from(limit).saturating_add(1)));
        let sql = format!(
            "SELECT body FROM runs WHERE {} ORDER BY created DESC, run DESC LIMIT ?",
            clauses.join(" AND ")
        );
        let connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut statement = connection.prepare(&sql)?;
        let mut runs = Vec::new();
        for body in statement.query_map(params_from_iter(values), |row| row.get::<_, String>(0))? {
            runs.push(serde_json::from_str::<Run>(&body?)?);
        }
        let more = runs.len() > usize::try_from(limit).unwrap_or(usize::MAX);
        if more {
            runs.pop();
        }
        let next = runs
            .last()
            .filter(|_| more)
            .map(|run| format!("{}.{}", run.created_at, run.run_id));
        Ok(RunPage { runs, next })
    }

    /// Finished runs that ended before this, the oldest first, without the first `passed`.
    pub fn ended_before(
        &self,
        at: UnixMillis,
        passed: u32,
        limit: u32,
    ) -> Result<Vec<RunId>, ReadModelError> {
        let connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut statement = connection.prepare(
            "SELECT run FROM runs WHERE ended < ?1 ORDER BY ended, run LIMIT ?2 OFFSET ?3",
        )?;
        let rows =
            statement.query_map((integer(at), limit, passed), |row| row.get::<_, String>(0))?;
        let mut runs = Vec::new();
        for row in rows {
            runs.extend(row?.parse::<RunId>().ok());
        }
        Ok(runs)
    }
}

fn parse_cursor(text: &str) -> Option<(i64, RunId)> {
    let (created, run) = text.split_once('.')?;
    Some((created.parse().ok()?, run.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::fixture::{done, entry_of};

    fn of(group: &str) -> Filter {
        Filter {
            groups: vec![group.parse().unwrap()],
            limit: 100,
            ..Filter::default()
        }
    }

    #[test]
    fn pages_hold_every_run_once_newest_first() {
        let model = ReadModel::open().unwrap();
        let entries: Vec<_> = (0..25).map(|n| (entry_of("vm0/a", n / 3), n + 1)).collect();
        model.note(&entries).unwrap();
        model.note(&[(entry_of("vm0/b", 1), 99)]).unwrap();
        let (mut seen, mut cursor) = (Vec::new(), None);
        loop {
            let filter = Filter {
                cursor,
                limit: 7,
                ..of("vm0/a")
            };
            let page = model.list(&filter).unwrap();
            seen.extend(page.runs);
            cursor = page.next;
            if cursor.is_none() {
                break;
            }
        }
        assert_eq!(seen.len(), 25);
        assert!(seen.is_sorted_by(|a, b| (a.created_at, a.run_id) > (b.created_at, b.run_id)));
    }

    #[test]
    fn filters_narrow_and_no_group_means_no_run() {
        let model = ReadModel::open().unwrap();
        let e = entry_of("vm0/a", 5);
        model
            .note(&[(e.clone(), 1), (entry_of("vm0/a", 9), 2)])
            .unwrap();
        let search = |text: &str| {
            let filter = Filter {
                search: Some(text.to_owned()),
                ..of("vm0/a")
            };
            model.list(&filter).unwrap().runs.len()
        };
        assert_eq!(search("title 5"), 1);
        assert_eq!(search("100%"), 2);
        assert_eq!(search("%"), 2);
        assert_eq!(search("_"), 0);
        assert_eq!(search(&e.run.to_string()[..8]), 1);
        let none = Filter {
            limit: 10,
            ..Filter::default()
        };
        assert!(model.list(&none).unwrap().runs.is_empty());
        let since = Filter {
            since: Some(6),
            ..of("vm0/a")
        };
        assert_eq!(model.list(&since).unwrap().runs.len(), 1);
        let bad = Filter {
            cursor: Some("x' OR 1=1".to_owned()),
            ..of("vm0/a")
        };
        assert!(matches!(model.list(&bad), Err(ReadModelError::Cursor)));
    }

    #[test]
    fn older_news_change_nothing() {
        let model = ReadModel::open().unwrap();
        let queued = entry_of("vm0/a", 1);
        let done = done(&queued, 7);
        model.note(&[(done, 5), (queued.clone(), 4)]).unwrap();
        let page = model.list(&of("vm0/a")).unwrap();
        assert_eq!(page.runs[0].state, RunState::Done);
        assert_eq!(model.ended_before(8, 0, 10).unwrap(), vec![queued.run]);
        assert!(model.ended_before(8, 1, 10).unwrap().is_empty());
        assert!(model.ended_before(7, 0, 10).unwrap().is_empty());
        // Made anew, while the one before it is removed.
        model.note(&[(queued.clone(), 6)]).unwrap();
        model.forget_finished(queued.run).unwrap();
        assert_eq!(model.list(&of("vm0/a")).unwrap().runs.len(), 1);
    }
}
