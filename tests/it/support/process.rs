//! Real neighbours: programs that `tests/tools/install.sh` installs, in processes that end with this one.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{LazyLock, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use super::client::{Call, Connection};
use super::{nothing_may_be_left_out, unique};

/// A start takes a few seconds; the rest is for a machine that is busy with other things.
pub(crate) const START: Duration = Duration::from_secs(90);

/// Whether tests against real neighbours run. Where they do not, stderr says so once, past the test harness.
pub(crate) fn real_neighbours() -> bool {
    static SAID: Once = Once::new();
    if !nothing_may_be_left_out() {
        SAID.call_once(|| {
            say("left out: the tests against real neighbours (Synapse, livekit-server, Redis, proxies); ./tests/run runs them");
        });
        return false;
    }
    true
}

/// To stderr at once, also when the test passes.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A file that `tests/tools/install.sh` made.
#[track_caller]
pub(crate) fn tool(name: &str) -> PathBuf {
    let tools = std::env::var_os("LK_TOOLS").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools"), PathBuf::from);
    let file = tools.join(name);
    assert!(file.exists(), "{name} is missing below target/tools: ./tests/run installs it");
    file
}

/// A program of the system.
#[track_caller]
pub(crate) fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let mut files = places.map(|place| place.join(name));
    files.find(|file| file.is_file()).unwrap_or_else(|| {
        panic!("{name} is missing: ./tests/run installs it from Debian's packages");
    })
}

/// One of the scripts of `tests/tools`, in the environment that has what they need.
pub(crate) fn script(name: &str) -> Command {
    let mut command = Command::new(tool("py/bin/python"));
    command
        .arg("-B")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools").join(name));
    command
}

/// A new directory below `target`. Those of earlier runs are removed.
pub(crate) fn directory(name: &str) -> PathBuf {
    static SWEPT: Once = Once::new();
    let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("real");
    SWEPT.call_once(|| {
        for left in std::fs::read_dir(&all).into_iter().flatten().flatten() {
            let name = left.file_name();
            if !Path::new("/proc").join(&name).exists() {
                let _ = std::fs::remove_dir_all(left.path());
            }
        }
    });
    let directory = all.join(std::process::id().to_string()).join(format!("{name}-{}", unique()));
    std::fs::create_dir_all(&directory).expect("a directory below target");
    directory
}

/// A port of 127.0.0.1 that nothing uses, below the range that the system gives to outgoing connections.
pub(crate) fn free_port() -> u16 {
    static TAKEN: Mutex<Vec<u16>> = Mutex::new(Vec::new());
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    let free =
        |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok() && UdpSocket::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    let port = (0..1000)
        .map(|_| rand::random_range(20_000..32_000))
        .find(|port| !taken.contains(port) && free(port))
        .expect("a free port");
    taken.push(port);
    port
}

/// Whether a `GET` there is answered with 200.
pub(crate) fn answers(address: SocketAddr, path: &str) -> bool {
    let Ok(mut connection) = Connection::open(address) else {
        return false;
    };
    connection.send(&Call::new("GET", path).header("Connection", "close").bytes(address));
    connection.answer().is_some_and(|answer| answer.status == 200)
}

/// A running program, in a process group of its own. When it is dropped the whole group is killed; when this process
/// ends without dropping it, killed ones and statics included, the kernel kills the program.
pub(crate) struct Process {
    name: String,
    child: Mutex<Child>,
    log: PathBuf,
    input: Mutex<Option<ChildStdin>>,
    lines: Mutex<Receiver<String>>,
}

impl Process {
    /// Starts it with its output in a file of `directory`.
    #[track_caller]
    pub(crate) fn start(name: &str, command: &Command, directory: &Path) -> Self {
        Self::spawn(name, command, directory, false)
    }

    /// Starts it with a pipe to its standard input, and one from its standard output.
    #[track_caller]
    pub(crate) fn start_piped(name: &str, command: &Command, directory: &Path) -> Self {
        Self::spawn(name, command, directory, true)
    }

    #[track_caller]
    fn spawn(name: &str, command: &Command, directory: &Path, piped: bool) -> Self {
        let log = directory.join(format!("{name}-{}.log", unique()));
        let file = std::fs::File::create(&log).expect("a log file");
        let mut guarded = Command::new(program("setpriv"));
        guarded
            .args(["--pdeathsig", "KILL"])
            .arg(command.get_program())
            .args(command.get_args());
        // The neighbours are on this machine: no proxy of the environment, and none of its settings for LiveKit.
        for (variable, _) in std::env::vars_os() {
            let variable = variable.to_string_lossy().into_owned();
            if variable.starts_with("LIVEKIT_") || variable.to_ascii_lowercase().ends_with("_proxy") {
                guarded.env_remove(variable);
            }
        }
        for (variable, value) in command.get_envs() {
            match value {
                Some(value) => guarded.env(variable, value),
                None => guarded.env_remove(variable),
            };
        }
        guarded
            .current_dir(directory)
            .process_group(0)
            .stderr(file.try_clone().expect("a file"));
        if piped {
            guarded.stdin(Stdio::piped()).stdout(Stdio::piped());
        } else {
            guarded.stdin(Stdio::null()).stdout(file);
        }
        let mut child = spawn_in_keeper(guarded).unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        let (sender, lines) = mpsc::channel();
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || {
                let mut said = BufReader::new(output).lines().map_while(Result::ok);
                said.try_for_each(|line| sender.send(line))
            });
        }
        Self {
            name: name.into(),
            input: Mutex::new(child.stdin.take()),
            child: Mutex::new(child),
            log,
            lines: Mutex::new(lines),
        }
    }

    /// Polls until `ready`; fails early when it ended by itself.
    #[track_caller]
    pub(crate) fn wait_ready(&self, ready: impl Fn() -> bool) {
        let end = Instant::now() + START;
        while !ready() {
            if let Some(status) = self.child.lock().unwrap().try_wait().expect("wait") {
                panic!("{} ended by itself ({status}):\n{}", self.name, self.tail(40));
            }
            assert!(
                Instant::now() < end,
                "{} is not ready within {START:?}:\n{}",
                self.name,
                self.tail(40)
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The next line of its standard output; `None` when it ended.
    #[track_caller]
    pub(crate) fn line(&self, within: Duration) -> Option<String> {
        match self.lines.lock().unwrap().recv_timeout(within) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("{} said nothing within {within:?}:\n{}", self.name, self.tail(40)),
        }
    }

    /// The next line of its standard output, if one comes soon; an error when it ended.
    pub(crate) fn poll(&self, within: Duration) -> Result<Option<String>, mpsc::RecvError> {
        match self.lines.lock().unwrap().recv_timeout(within) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(mpsc::RecvError),
        }
    }

    /// One line to its standard input; false when it does not listen any more.
    pub(crate) fn tell(&self, line: &str) -> bool {
        let mut input = self.input.lock().unwrap();
        input.as_mut().is_some_and(|input| writeln!(input, "{line}").is_ok())
    }

    /// All that it wrote to its log.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    pub(crate) fn tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<_> = log.lines().collect();
        let shown = all.iter().skip(all.len().saturating_sub(lines));
        shown.map(|line| format!("  {}\n", line.get(..400).unwrap_or(line))).collect()
    }

    /// To the whole group, by name (`STOP`, …).
    #[track_caller]
    pub(crate) fn signal(&self, name: &str) {
        let group = self.pid();
        let status = Command::new("/bin/sh").args(["-c", &format!("kill -{name} -{group}")]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name} -{group}");
    }

    /// Its number.
    pub(crate) fn pid(&self) -> u32 {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).id()
    }

    /// An abrupt end.
    pub(crate) fn kill(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if child.try_wait().is_ok_and(|ended| ended.is_some()) {
            return;
        }
        let _ = Command::new("/bin/sh")
            .args(["-c", &format!("kill -KILL -{}", child.id())])
            .status();
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            say(&format!("the end of the log of {}:\n{}", self.name, self.tail(25)));
        }
    }
}

/// The kernel ends such a child with the *thread* that started it, so one that never ends starts them all.
fn spawn_in_keeper(command: Command) -> std::io::Result<Child> {
    type Order = (Command, Sender<std::io::Result<Child>>);
    static KEEPER: LazyLock<Sender<Order>> = LazyLock::new(|| {
        let (sender, orders) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in orders {
                let _ = answer.send(command.spawn());
            }
        });
        sender
    });
    let (answer, child) = mpsc::channel();
    KEEPER.send((command, answer)).map_err(|_| std::io::ErrorKind::Other)?;
    child.recv().map_err(|_| std::io::ErrorKind::Other)?
}
