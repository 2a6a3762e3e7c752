//! A control group of the test's own, with a memory limit: what is measured is what would be killed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{nothing_may_be_left_out, process::say, unique};

/// It is removed when it is dropped, after the processes in it.
pub(crate) struct Cgroup {
    directory: PathBuf,
    v2: bool,
    entered_by: String,
}

impl Cgroup {
    /// With this limit; `None`, said once, where none can be made.
    pub(crate) fn with_mib(mib: u64) -> Option<Self> {
        let made = Self::make(mib << 20);
        if made.is_none() {
            assert!(!nothing_may_be_left_out(), "no control group with a memory limit can be made here");
            say("left out: what needs a control group with a memory limit");
        }
        made
    }

    fn make(bytes: u64) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
        let all = mounts.lines().filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            Some((PathBuf::from(words.next()?), words.next()?.to_owned(), words.next()?.to_owned()))
        });
        let (mut first, mut second) = (None, None);
        for (point, kind, options) in all {
            if kind == "cgroup" && options.split(',').any(|option| option == "memory") {
                first = Some((point, false));
            } else if kind == "cgroup2" {
                let _ = std::fs::write(point.join("cgroup.subtree_control"), "+memory");
                second = Some((point, true));
            }
        }
        let (point, v2) = first.or(second)?;
        let directory = point.join(format!("lk-tests-{}-{}", std::process::id(), unique()));
        std::fs::create_dir(&directory).ok()?;
        let group = Self {
            entered_by: format!("echo $$ > {}/cgroup.procs && exec \"$@\"", directory.display()),
            directory,
            v2,
        };
        let limit = if v2 { "memory.max" } else { "memory.limit_in_bytes" };
        std::fs::write(group.directory.join(limit), bytes.to_string()).ok()?;
        Some(group)
    }

    /// A command that runs its arguments in the group.
    pub(crate) fn wrapper(&self) -> [&str; 4] {
        ["/bin/sh", "-c", &self.entered_by, "sh"]
    }

    fn read(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.directory.join(file)).ok()
    }

    fn number(&self, file: &str) -> u64 {
        self.read(file).and_then(|text| text.trim().parse().ok()).unwrap_or_default()
    }

    /// Memory of the group in KiB, that of its sockets included, without files that could be dropped.
    pub(crate) fn used_kib(&self) -> u64 {
        let stat = self.read("memory.stat").unwrap_or_default();
        let files = ["total_inactive_file", "inactive_file"]
            .into_iter()
            .find_map(|name| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok()));
        let used = if self.v2 {
            self.number("memory.current")
        } else {
            self.number("memory.usage_in_bytes") + self.number("memory.kmem.tcp.usage_in_bytes")
        };
        used.saturating_sub(files.unwrap_or_default()) / 1024
    }

    /// Processes that were killed for want of memory.
    pub(crate) fn killed(&self) -> u64 {
        let events = self.read(if self.v2 { "memory.events" } else { "memory.oom_control" });
        let events = events.unwrap_or_default();
        let killed = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        killed.and_then(|count| count.trim().parse().ok()).unwrap_or_default()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Once the last process in it is gone.
        for _ in 0..500 {
            if std::fs::remove_dir(&self.directory).is_ok() || !Path::new(&self.directory).exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
