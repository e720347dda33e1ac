//! Whom a process runs as and what its environment begins with, from the root's own files.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use guest_control::UserSpec;
use guest_control::server::OsError;
use rustix::fs::AtFlags;
use rustix::io::Errno;

use crate::environment::assignment;
use crate::root::Root;

/// An account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups and the primary one.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// What the root's /etc says, read again only when it has changed: reading and parsing it costs half a millisecond under
/// emulation, asking whether it has changed a twentieth of that.
#[derive(Debug)]
pub(crate) struct Etc {
    dir: OwnedFd,
    known: Mutex<Option<(Stamps, Arc<Contents>)>>,
}

/// The parsed files.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    root: Option<Account>,
    user: Option<Account>,
    /// Variables of /etc/environment.
    pub(crate) environment: Vec<(String, String)>,
}

/// The files that matter.
const FILES: [&str; 3] = ["passwd", "group", "environment"];

/// Inode, size, and change time of each; zeros for one that is not there.
type Stamps = [(u64, i64, i64, u64); FILES.len()];

impl Etc {
    pub(crate) fn open() -> Result<Self, OsError> {
        Ok(Self {
            dir: crate::boot::open_dir("/etc")?,
            known: Mutex::new(None),
        })
    }

    /// The present contents.
    pub(crate) fn read(&self, root: &Root) -> Arc<Contents> {
        let stamps = FILES.map(|name| self.stamp(name));
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, contents)) = &*known
            && *of == stamps
        {
            return Arc::clone(contents);
        }
        let [passwd, group, environment] =
            FILES.map(|name| root.read_small(&format!("/etc/{name}")).unwrap_or_default());
        let contents = Arc::new(Contents {
            root: parse(&passwd, &group, "root"),
            user: parse(&passwd, &group, "user"),
            environment: environment.lines().filter_map(assignment).collect(),
        });
        *known = Some((stamps, Arc::clone(&contents)));
        contents
    }

    fn stamp(&self, name: &str) -> (u64, i64, i64, u64) {
        rustix::fs::statat(&self.dir, name, AtFlags::empty()).map_or((0, 0, 0, 0), |stat| {
            (stat.st_ino, stat.st_size, stat.st_ctime, stat.st_ctime_nsec)
        })
    }
}

impl Contents {
    /// The account a process is to run as.
    pub(crate) fn account(&self, user: &UserSpec) -> Result<&Account, OsError> {
        let (name, account) = match user {
            UserSpec::Root => ("root", &self.root),
            UserSpec::User => ("user", &self.user),
        };
        account.as_ref().ok_or_else(|| {
            OsError::new(
                format_args!("looking up the account {name:?} in the image's /etc/passwd"),
                Errno::NOENT,
            )
        })
    }
}

fn parse(passwd: &str, group: &str, name: &str) -> Option<Account> {
    let mut fields = passwd
        .lines()
        .find(|line| line.split(':').next() == Some(name))?
        .split(':')
        .skip(2);
    let uid = fields.next()?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1)?.to_owned();
    let shell = fields.next().unwrap_or_default().to_owned();
    let mut groups = vec![gid];
    groups.extend(group.lines().filter_map(|line| member_of(line, name)));
    groups.dedup();
    Some(Account {
        name: name.to_owned(),
        uid,
        gid,
        groups,
        home,
        shell,
    })
}

/// The group's id if the line of /etc/group lists the account.
fn member_of(line: &str, name: &str) -> Option<u32> {
    let mut fields = line.split(':').skip(2);
    let gid = fields.next()?.parse().ok()?;
    fields
        .next()?
        .split(',')
        .any(|member| member == name)
        .then_some(gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:,,,:/home/user:/bin/bash\nbroken:x:1\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:user,other\nuser:x:1000:\nusers:x:100:other\n";

    #[test]
    fn finds_ids_home_and_groups() {
        let account = parse(PASSWD, GROUP, "user").unwrap();
        assert_eq!((account.uid, account.gid), (1000, 1000));
        assert_eq!(account.groups, [1000, 27]);
        assert_eq!(account.home, "/home/user");
        assert_eq!(account.shell, "/bin/bash");
    }

    #[test]
    fn refuses_what_is_not_there_or_not_whole() {
        assert_eq!(parse(PASSWD, GROUP, "use"), None);
        assert_eq!(parse(PASSWD, GROUP, "broken"), None);
    }
}
