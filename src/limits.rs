//! How much there is room for, made from the memory limit and the file descriptors (decisions P14, P15). Bounds in bytes hold
//! whatever strangers do; today's counts are the most.

use std::path::{Component, Path, PathBuf};

use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

/// Memory that is reckoned with where no limit is known. Never the host's: other programs use that.
const DEFAULT_MEMORY_BYTES: u64 = 512 * 1024 * 1024;
/// A connection with the request on it; 4 KiB of it are the kernel's.
const BYTES_PER_CONNECTION: u64 = 20 * 1024;
/// A connection out: TLS state and buffers.
const BYTES_PER_CONNECTION_OUT: u64 = 48 * 1024;
/// A delegated leave, or a token that is watched.
const BYTES_PER_RECORD: u64 = 600;

const MAX_CONNECTIONS: usize = 5500;
const MAX_IN_FLIGHT: usize = 4096;
const MAX_CONNECTIONS_OUT: usize = 512;
const MAX_BODY_BYTES: usize = 16 * 1024 * 1024;
const MAX_RECORDS: usize = 200_000;
const MIN_CONNECTIONS: usize = 16;

/// Numbers of everything that is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most connections of clients.
    pub connections: usize,
    /// Complete requests that wait for somebody else.
    pub in_flight: usize,
    /// Most connections to neighbours.
    pub connections_out: usize,
    /// Bytes of request bodies that are on their way; the SFU and our homeserver have a quarter of that besides.
    pub body_bytes: usize,
    /// Most delegated leaves.
    pub jobs: usize,
    /// Most tokens that are watched.
    pub tokens: usize,
}

/// Resources of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Files that it may open; `None` is any number.
    pub descriptors: Option<u64>,
    /// Memory limit in bytes; `None` where there is none, or none that can be read.
    pub memory: Option<u64>,
}

impl Limits {
    /// As many as fit into `resources`.
    #[must_use]
    pub fn of(resources: Resources) -> Self {
        let memory = resources.memory.unwrap_or(DEFAULT_MEMORY_BYTES);
        let descriptors = resources.descriptors.map_or(usize::MAX, size);
        let records = size(memory / 3 / BYTES_PER_RECORD);
        // One half of the descriptors is for the way in, a quarter for the way out, the rest for files and for DNS.
        let connections = size(memory / 4 / BYTES_PER_CONNECTION)
            .min(descriptors / 2)
            .clamp(MIN_CONNECTIONS, MAX_CONNECTIONS);
        let jobs = (records - records / 3).min(MAX_RECORDS);
        Self {
            connections,
            in_flight: (connections * 3 / 4).min(MAX_IN_FLIGHT),
            connections_out: size(memory / 4 / BYTES_PER_CONNECTION_OUT)
                .min(descriptors / 4)
                .clamp(MIN_CONNECTIONS / 2, MAX_CONNECTIONS_OUT),
            body_bytes: size(memory / 8).min(MAX_BODY_BYTES),
            jobs,
            tokens: (records - jobs).min(MAX_RECORDS),
        }
    }
}

impl Resources {
    /// Raises the soft limit on open files to the hard one, as Go's runtime does, and looks up the memory limit. Says what
    /// was reached.
    #[must_use]
    pub fn of_this_process() -> Self {
        let read = |path: &Path| std::fs::read_to_string(path).ok();
        let found = Self {
            descriptors: raise_descriptors(),
            memory: memory_limit(read),
        };
        let limits = Limits::of(found);
        tracing::info!(name: "limits",
            descriptors = found.descriptors,
            memory_mib = found.memory.map(|bytes| bytes >> 20),
            connections = limits.connections,
            requests_in_flight = limits.in_flight,
            "limits follow from the files that may be open (ulimit -n, LimitNOFILE) and from the memory limit"
        );
        found
    }
}

/// By `prlimit64`: service managers that filter system calls let that one pass, and bar `setrlimit`.
fn raise_descriptors() -> Option<u64> {
    let now = getrlimit(Resource::Nofile);
    if now.current == now.maximum {
        return now.current;
    }
    let raised = Rlimit {
        current: now.maximum,
        maximum: now.maximum,
    };
    match prlimit(None, Resource::Nofile, raised) {
        Ok(_) => raised.current,
        Err(error) => {
            tracing::debug!(error = error.to_string(), "the limit on open files stays as it is");
            now.current
        }
    }
}

/// The least limit of our cgroup and of those above it, as far as they can be seen from here. `read` gives a file's text.
fn memory_limit(read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let groups = read(Path::new("/proc/self/cgroup"))?;
    let mounts = read(Path::new("/proc/self/mountinfo"))?;
    let limits = mounts.lines().filter_map(|line| {
        let mount = Mount::parse(line)?;
        let ours = groups.lines().find_map(|line| mount.our_group(line))?;
        // Where a namespace hides the way to our group, the mount is our group.
        let below = Path::new(ours).strip_prefix(mount.root).unwrap_or_else(|_| Path::new(""));
        let visible = below.components().all(|part| matches!(part, Component::Normal(_)));
        let group = if visible { mount.point.join(below) } else { mount.point.clone() };
        let groups = group.ancestors().take_while(|group| group.starts_with(&mount.point));
        groups.filter_map(|group| limit(&read(&group.join(mount.file))?)).min()
    });
    limits.min()
}

/// A mounted hierarchy of cgroups that may limit memory.
struct Mount<'a> {
    root: &'a str,
    point: PathBuf,
    file: &'static str,
}

impl<'a> Mount<'a> {
    /// Parses a line of `/proc/self/mountinfo`.
    fn parse(line: &'a str) -> Option<Self> {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, point) = (place.next()?, place.next()?);
        let mut kind = kind.split(' ');
        let file = match kind.next()? {
            "cgroup2" => "memory.max",
            "cgroup" if kind.nth(1)?.split(',').any(|option| option == "memory") => "memory.limit_in_bytes",
            _ => return None,
        };
        Some(Self {
            root,
            // The only escape that such a path may have.
            point: point.replace("\\040", " ").into(),
            file,
        })
    }

    /// Our group in this hierarchy, where `line` of `/proc/self/cgroup` is about it.
    fn our_group<'b>(&self, line: &'b str) -> Option<&'b str> {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let about = if self.file == "memory.max" {
            controllers.is_empty()
        } else {
            controllers.split(',').any(|controller| controller == "memory")
        };
        about.then_some(path)
    }
}

/// `max`, and version 1's number close to 2^63, are no limits.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|bytes| *bytes < 1 << 60)
}

fn size(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn of(descriptors: u64, mib: Option<u64>) -> Limits {
        Limits::of(Resources {
            descriptors: Some(descriptors),
            memory: mib.map(|mib| mib * MIB),
        })
    }

    #[test]
    fn plenty_gives_todays_counts() {
        for limits in [
            of(20_000, None),
            of(1 << 20, Some(1 << 20)),
            Limits::of(Resources {
                descriptors: None,
                memory: None,
            }),
        ] {
            assert_eq!((limits.connections, limits.in_flight, limits.connections_out), (5500, 4096, 512));
            assert_eq!(limits.body_bytes, 16 << 20);
            assert!(limits.jobs > 190_000, "{limits:?}");
        }
    }

    #[test]
    fn little_memory_gives_less() {
        let limits = of(20_000, Some(64));
        assert_eq!((limits.connections, limits.in_flight), (819, 614));
        assert_eq!((limits.connections_out, limits.body_bytes), (341, 8 << 20));
        let limits = of(20_000, Some(128));
        assert_eq!((limits.connections, limits.in_flight, limits.body_bytes), (1638, 1228, 16 << 20));
        for mib in [32, 64, 128, 256, 512, 4096] {
            let limits = of(1 << 20, Some(mib));
            let all = limits.connections as u64 * BYTES_PER_CONNECTION
                + limits.connections_out as u64 * BYTES_PER_CONNECTION_OUT
                + limits.body_bytes as u64 * 21 / 16
                + (limits.jobs + limits.tokens) as u64 * BYTES_PER_RECORD;
            assert!(all < mib * MIB, "{mib} MiB: {limits:?}");
        }
    }

    #[test]
    fn few_descriptors_give_less() {
        let limits = of(1024, None);
        assert_eq!((limits.connections, limits.in_flight, limits.connections_out), (512, 384, 256));
        assert_eq!(of(8, Some(1)).connections, 16);
    }

    /// `files` are read, and nothing else is there.
    fn found(files: &[(&str, &str)]) -> Option<u64> {
        memory_limit(|path| {
            files
                .iter()
                .find(|(name, _)| Path::new(name) == path)
                .map(|(_, text)| (*text).to_owned())
        })
    }

    #[test]
    fn the_least_limit_of_nested_groups_counts() {
        let v2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let files = [
            ("/proc/self/cgroup", "0::/system.slice/jwt.service/inner\n"),
            ("/proc/self/mountinfo", v2),
            ("/sys/fs/cgroup/system.slice/jwt.service/inner/memory.max", "max\n"),
            ("/sys/fs/cgroup/system.slice/jwt.service/memory.max", "268435456\n"),
            ("/sys/fs/cgroup/system.slice/memory.max", "134217728\n"),
        ];
        assert_eq!(found(&files), Some(128 * MIB));
        assert_eq!(found(&files[..4]), Some(256 * MIB));
        assert_eq!(found(&files[..3]), None);
    }

    #[test]
    fn version_1_and_both_at_once_are_understood() {
        let v1 = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                  36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                  35 31 0:32 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n\
                  41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let files = [
            ("/proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n"),
            ("/proc/self/mountinfo", v1),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("/sys/fs/cgroup/memory/docker/memory.limit_in_bytes", "9223372036854771712\n"),
            ("/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "67108864\n"),
        ];
        assert_eq!(found(&files), Some(64 * MIB));
        assert_eq!(found(&files[..4]), None);
    }

    #[test]
    fn a_container_that_sees_only_its_own_group_finds_it() {
        // Mounted from below the group of the process, and in a namespace that hides what is above.
        let mounts = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n\
                      29 23 0:26 /../.. /sys/fs/cgroup/v2 ro - cgroup2 cgroup rw\n";
        let files = [
            ("/proc/self/cgroup", "4:memory:/docker/abc/inner\n0::/../other\n"),
            ("/proc/self/mountinfo", mounts),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "67108864\n"),
            ("/sys/fs/cgroup/v2/memory.max", "33554432\n"),
        ];
        assert_eq!(found(&files), Some(32 * MIB));
        assert_eq!(found(&files[..3]), Some(64 * MIB));
        assert_eq!(found(&[]), None);
    }
}
