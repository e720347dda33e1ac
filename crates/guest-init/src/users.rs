//! Whom a process runs as, from the image's own account files.

use guest_control::UserSpec;
use guest_control::server::OsError;
use rustix::io::Errno;

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

impl Account {
    /// Looks the account up in the agent's root.
    pub(crate) fn find(root: &Root, user: &UserSpec) -> Result<Self, OsError> {
        let name = match user {
            UserSpec::Root => "root",
            UserSpec::User => "user",
        };
        let passwd = root.read_small("/etc/passwd")?;
        let group = root.read_small("/etc/group").unwrap_or_default();
        parse(&passwd, &group, name).ok_or_else(|| {
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
