//! The cgroup that the service runs in, and the end of all that was started, whatever ends the siege itself.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal};
use rustix::thread::CpuSet;

/// Descriptors, soft and hard.
const FILES: (u64, u64) = (1024, 20_000);
/// Instead of the number of a core.
const ANY: &str = "any";

pub struct Cage {
    path: PathBuf,
    version: u8,
    /// Its end is seen by the watchdog.
    _watchdog: Child,
}

impl Cage {
    /// With this limit in bytes; `folder` goes with it, and the siege itself after `longest`.
    pub fn new(limit: u64, folder: &Path, longest: Duration) -> Result<Self, String> {
        let name = format!("siege-{}", std::process::id());
        let (parent, version) = if Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists() {
            (Path::new("/sys/fs/cgroup/memory"), 1)
        } else {
            (Path::new("/sys/fs/cgroup"), 2)
        };
        let path = parent.join(name);
        let file = if version == 1 { "memory.limit_in_bytes" } else { "memory.max" };
        if version == 2 {
            // It may be so already, or be refused; then the next step says it.
            let _ = std::fs::write(parent.join("cgroup.subtree_control"), "+memory");
        }
        std::fs::create_dir(&path).map_err(|e| format!("cannot make the cgroup {}: {e}", path.display()))?;
        let watchdog = Command::new(std::env::current_exe().map_err(|e| e.to_string())?)
            .arg("--watch")
            .arg(&path)
            .arg(folder)
            .arg(longest.as_secs().to_string())
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|e| format!("cannot start the watchdog: {e}"))?;
        let cage = Self {
            path,
            version,
            _watchdog: watchdog,
        };
        std::fs::write(cage.path.join(file), limit.to_string()).map_err(|e| format!("the memory of a cgroup cannot be limited: {e}"))?;
        // Nor may it swap; the kernel may know nothing of that.
        let (swap, value) = if version == 1 {
            ("memory.memsw.limit_in_bytes", limit.to_string())
        } else {
            ("memory.swap.max", "0".to_owned())
        };
        let _ = std::fs::write(cage.path.join(swap), value);
        // Version 1 counts the buffers of sockets by themselves, and only if they are limited.
        let _ = std::fs::write(cage.path.join("memory.kmem.tcp.limit_in_bytes"), limit.to_string());
        Ok(cage)
    }

    /// The command that runs `binary` inside, on one core or on any.
    pub fn command(&self, binary: &str, cpu: Option<usize>, nice: i32) -> Result<Command, String> {
        let mut command = Command::new(std::env::current_exe().map_err(|e| e.to_string())?);
        command
            .arg("--enter")
            .arg(self.path.join("cgroup.procs"))
            .args([
                cpu.map_or(ANY.to_owned(), |cpu| cpu.to_string()),
                nice.to_string(),
                binary.to_owned(),
            ])
            .env_clear();
        Ok(command)
    }

    fn number(&self, file: &str) -> Option<u64> {
        std::fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()
    }

    fn count(&self, file: &str, key: &str) -> Option<u64> {
        let text = std::fs::read_to_string(self.path.join(file)).ok()?;
        let value = text.lines().filter_map(|line| line.split_once(' ')).find(|(k, _)| *k == key);
        value?.1.trim().parse().ok()
    }

    pub fn usage(&self) -> u64 {
        let file = if self.version == 1 {
            "memory.usage_in_bytes"
        } else {
            "memory.current"
        };
        self.number(file).unwrap_or(0)
    }

    /// The most that was ever used, as the kernel saw it, where it says so; buffers of sockets included.
    pub fn peak(&self) -> Option<u64> {
        let peak = self.number(if self.version == 1 {
            "memory.max_usage_in_bytes"
        } else {
            "memory.peak"
        })?;
        Some(peak + self.peak_of_sockets())
    }

    /// What version 1 counts by itself.
    pub fn peak_of_sockets(&self) -> u64 {
        self.number("memory.kmem.tcp.max_usage_in_bytes").unwrap_or(0)
    }

    /// Charges that met the limit.
    pub fn failed_charges(&self) -> u64 {
        let count = if self.version == 1 {
            self.number("memory.failcnt")
        } else {
            self.count("memory.events", "max")
        };
        count.unwrap_or(0)
    }

    pub fn kills(&self) -> u64 {
        let file = if self.version == 1 { "memory.oom_control" } else { "memory.events" };
        self.count(file, "oom_kill").unwrap_or(0)
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        clear(&self.path);
    }
}

/// Ends whoever is inside, and removes it.
fn clear(path: &Path) {
    let end = Instant::now() + Duration::from_secs(5);
    while path.exists() && Instant::now() < end {
        let inside = std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
        for pid in inside.lines().filter_map(|l| l.parse().ok()).filter_map(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        if std::fs::remove_dir(path).is_err() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Waits for the end of the siege, brings it about where it does not come, and cleans up.
pub fn watch(arguments: &[String]) {
    let [path, folder, longest] = arguments else {
        return;
    };
    let (ended, ends) = mpsc::channel();
    std::thread::spawn(move || {
        let mut rest = Vec::new();
        let _ = std::io::stdin().read_to_end(&mut rest);
        let _ = ended.send(());
    });
    let longest = Duration::from_secs(longest.parse().unwrap_or(0));
    if ends.recv_timeout(longest).is_err()
        && let Some(siege) = rustix::process::getppid()
    {
        eprintln!("siege: it does not come to its end, and is killed");
        let _ = rustix::process::kill_process(siege, Signal::KILL);
    }
    clear(Path::new(path));
    let _ = std::fs::remove_dir_all(folder);
}

/// Becomes the service, or its Redis: inside of the cgroup, on one core, with the descriptors that a distribution gives.
pub fn enter(arguments: &[String]) -> String {
    let [procs, cpu, nice, binary, rest @ ..] = arguments else {
        return "wrong arguments".into();
    };
    let prepared = || -> Result<(), String> {
        std::fs::write(procs, "0").map_err(|e| format!("{procs}: {e}"))?;
        let limit = Rlimit {
            current: Some(FILES.0),
            maximum: Some(FILES.1),
        };
        rustix::process::setrlimit(Resource::Nofile, limit).map_err(|e| format!("descriptors: {e}"))?;
        if cpu != ANY {
            pin(cpu.parse().map_err(|_| "no number of a CPU")?)?;
        }
        rustix::process::setsid().map_err(|e| format!("session: {e}"))?;
        prefer(nice.parse().map_err(|_| "no priority")?)?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| e.to_string())
    };
    match prepared() {
        Ok(()) => Command::new(binary).args(rest).exec().to_string(),
        Err(error) => error,
    }
}

/// Sets the priority of this process; where the kernel shares out time by session, that of the session, too.
pub fn prefer(nice: i32) -> Result<(), String> {
    if nice != 0 {
        rustix::process::setpriority_process(None, nice).map_err(|e| format!("priority: {e}"))?;
        let _ = std::fs::write("/proc/self/autogroup", nice.to_string());
    }
    Ok(())
}

/// Keeps this thread, and those that it starts, on one core.
pub fn pin(cpu: usize) -> Result<(), String> {
    let mut set = CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).map_err(|e| format!("cannot be pinned to core {cpu}: {e}"))
}
