//! Writes the log by a thread of its own, so that whoever reads stderr can neither stop nor slow down the service.
//!
//! Written here rather than taken from `tracing-appender`: its queue is bounded in lines of any length, its counter of dropped
//! lines is told to nobody, and it brings `time` and `crossbeam-channel`.

use std::ffi::CStr;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::line::push_time;
use crate::config::LogFormat;

/// Bytes of all lines that wait or are being written.
const MAX_WAITING_BYTES: usize = 1024 * 1024;
/// The longest line in bytes.
const MAX_LINE_BYTES: usize = 16 * 1024;
/// Stands at the end of a line that was too long.
const CUT: &str = "… (cut)\n";
/// Bytes of a line in JSON that was too long. Two bytes for each is the most that quoting them takes.
const BEGINNING_BYTES: usize = MAX_LINE_BYTES / 4;
/// The queue grows by at most so many bytes at once.
const GROWTH_BYTES: usize = 256 * 1024;
/// Bytes written at once, or one line: what a pipe takes as a whole, so that other writers cannot cut a line in two.
const WRITE_BYTES: usize = 4096;
/// Lines that came quietly wait for company, up to so many bytes.
const BATCH_BYTES: usize = 128 * 1024;
/// How long the thread waits for company after it has written: its turns cost a busy service more than the writing.
const LINGER: Duration = Duration::from_millis(10);
/// Room for the allocator's work, which falls to any thread: without optimisation 64 KiB are too few. What is not used takes no memory.
const STACK_BYTES: usize = 256 * 1024;
const IDLE_NAME: &CStr = c"log";
const BUSY_NAME: &CStr = c"log-busy";
/// Bytes of memory that a busy queue keeps.
const BUSY_BYTES: usize = 2 * BATCH_BYTES;
/// Bytes of memory that an idle queue keeps.
const IDLE_BYTES: usize = 16 * 1024;
/// Before another try where stderr takes nothing and does not block.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// The handle. All clones write to one place.
#[derive(Clone)]
pub(super) struct LogWriter(Arc<Shared>);

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Signal that there is something to write.
    filled: Condvar,
    /// Signal that everything is written.
    emptied: Condvar,
    /// The thread sleeps until it is woken. Written under the lock of the queue.
    asleep: AtomicBool,
}

#[derive(Default)]
struct Queue {
    /// Lines that wait, each whole.
    waiting: Vec<u8>,
    /// Bytes that the thread took and has not written yet.
    under_way: usize,
    /// Lines since the last one that found room.
    dropped: u64,
}

impl LogWriter {
    /// Starts the thread, which ends with the process.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn start(out: impl Write + Send + 'static) -> io::Result<Self> {
        let writer = Self(Arc::default());
        let shared = writer.0.clone();
        thread::Builder::new()
            .name("log".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || shared.run(out))?;
        Ok(writer)
    }

    /// Takes one line with its end, or drops it and counts. Never waits for the reader.
    pub(super) fn push(&self, line: &[u8], format: LogFormat) {
        self.put(line, format);
        self.wake();
    }

    /// Queues a line without waking the thread, unless many lines wait. [`Self::wake_sleeper`] has to be called soon.
    pub(super) fn push_quietly(&self, line: &[u8], format: LogFormat) {
        // Once: each call is one to the system, and the thread may not have had its turn yet.
        if self.put(line, format) {
            self.wake();
        }
    }

    /// Wakes the thread.
    fn wake(&self) {
        self.0.filled.notify_one();
    }

    /// Wakes the thread, unless it looks by itself soon.
    pub(super) fn wake_sleeper(&self) {
        if self.0.asleep.load(Relaxed) {
            self.wake();
        }
    }

    /// Whether there are many lines now, and were not before.
    fn put(&self, line: &[u8], format: LogFormat) -> bool {
        let cut = (line.len() > MAX_LINE_BYTES).then(|| cut(line, format));
        let line = cut.as_deref().map_or(line, str::as_bytes);
        let mut queue = self.0.queue.lock();
        let notice = match queue.dropped {
            0 => String::new(),
            dropped => notice(dropped, format),
        };
        if queue.waiting.len() + queue.under_way + notice.len() + line.len() > MAX_WAITING_BYTES {
            queue.dropped += 1;
            return false;
        }
        queue.dropped = 0;
        let (before, needed) = (queue.waiting.len(), notice.len() + line.len());
        if queue.waiting.capacity() - before < needed {
            queue.waiting.reserve_exact(before.min(GROWTH_BYTES).max(needed));
        }
        queue.waiting.extend_from_slice(notice.as_bytes());
        queue.waiting.extend_from_slice(line);
        before <= BATCH_BYTES && before + needed > BATCH_BYTES
    }

    /// Waits until everything is written, `within` at most.
    pub(super) fn flush(&self, within: Duration) {
        self.wake();
        let mut queue = self.0.queue.lock();
        // Whether it was in time makes no difference to the end of the process.
        let _ = self
            .0
            .emptied
            .wait_while_for(&mut queue, |queue| !queue.waiting.is_empty() || queue.under_way > 0, within);
    }
}

impl Shared {
    fn run(&self, mut out: impl Write) {
        let mut batch: Vec<u8> = Vec::new();
        loop {
            let mut queue = self.queue.lock();
            queue.under_way = 0;
            if queue.waiting.is_empty() {
                self.emptied.notify_all();
            }
            if queue.waiting.len() < BATCH_BYTES {
                // What comes in the next moment is written together, and nobody has to wake anybody for it.
                self.filled.wait_for(&mut queue, LINGER);
            }
            if queue.waiting.is_empty() {
                queue.waiting.shrink_to(IDLE_BYTES);
                batch.shrink_to(IDLE_BYTES);
                call_thread(IDLE_NAME);
                self.asleep.store(true, Relaxed);
                self.filled.wait_while(&mut queue, |queue| queue.waiting.is_empty());
                self.asleep.store(false, Relaxed);
                call_thread(BUSY_NAME);
            }
            batch.shrink_to(BUSY_BYTES);
            std::mem::swap(&mut batch, &mut queue.waiting);
            queue.under_way = batch.len();
            drop(queue);
            let mut rest = batch.as_slice();
            while !rest.is_empty() {
                let (lines, later) = rest.split_at(whole_lines(rest));
                write(&mut out, lines);
                rest = later;
                self.queue.lock().under_way = rest.len();
            }
            batch.clear();
        }
    }
}

/// The thread's name tells whether anything may be left to be written.
fn call_thread(name: &CStr) {
    // A name is of no use but to be seen.
    let _ = rustix::thread::set_name(name);
}

/// The length of the lines that are written at once: one at least.
fn whole_lines(bytes: &[u8]) -> usize {
    let end = |at: usize| at + 1;
    let last = bytes.iter().take(WRITE_BYTES).rposition(|&byte| byte == b'\n');
    let first = || bytes.iter().position(|&byte| byte == b'\n');
    last.or_else(first).map_or(bytes.len(), end)
}

/// Writes the bytes; those that cannot be written are lost, since there is nobody to tell.
fn write(out: &mut impl Write, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match out.write(bytes) {
            Ok(0) => return,
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY_PAUSE),
            Err(_) => return,
        }
    }
}

/// The line before the first one that finds room again.
fn notice(dropped: u64, format: LogFormat) -> String {
    let message = format!("{dropped} log lines were dropped: the reader of stderr is too slow");
    own_line("log_lines_dropped", &message, None, format)
}

fn cut(line: &[u8], format: LogFormat) -> String {
    let beginning = |bytes: usize| String::from_utf8_lossy(line.get(..bytes).unwrap_or(line));
    match format {
        LogFormat::Text => beginning(MAX_LINE_BYTES - CUT.len()).trim_end_matches('\u{fffd}').to_owned() + CUT,
        LogFormat::Json => own_line(
            "log_line_cut",
            "a log line was too long and is cut",
            Some(&beginning(BEGINNING_BYTES)),
            format,
        ),
    }
}

/// A line that the log says about itself, in the form of the others.
fn own_line(event: &str, message: &str, beginning: Option<&str>, format: LogFormat) -> String {
    let mut time = String::new();
    push_time(&mut time);
    let target = module_path!();
    match format {
        LogFormat::Text => format!("{time}  WARN {target}: {message} event={event}\n"),
        LogFormat::Json => {
            let mut line = serde_json::json!({"timestamp": time, "level": "WARN", "message": message, "target": target, "event": event});
            if let Some(beginning) = beginning {
                line["beginning"] = beginning.into();
            }
            format!("{line}\n")
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "measures what a slow reader costs")]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    /// Takes so many writes as it is told to.
    struct Slow {
        permits: mpsc::Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.permits.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
            assert!(bytes.ends_with(b"\n"), "half a line");
            self.written.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn slow() -> (LogWriter, mpsc::Sender<()>, Arc<Mutex<Vec<u8>>>) {
        let (sender, permits) = mpsc::channel();
        let written = Arc::default();
        let out = Slow {
            permits,
            written: Arc::clone(&written),
        };
        (LogWriter::start(out).unwrap(), sender, written)
    }

    fn text(written: &Mutex<Vec<u8>>) -> String {
        String::from_utf8(written.lock().clone()).unwrap()
    }

    fn bytes(writer: &LogWriter) -> (usize, usize) {
        let queue = writer.0.queue.lock();
        (queue.waiting.len() + queue.under_way, queue.waiting.capacity())
    }

    #[test]
    fn what_finds_no_room_is_dropped_and_counted_and_nobody_waits() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let (writer, permits, written) = slow();
            let began = Instant::now();
            let lines = 20_000;
            for n in 0..lines {
                writer.push(format!("{n:0>99}\n").as_bytes(), format);
            }
            assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
            let (kept, capacity) = bytes(&writer);
            assert!(
                kept <= MAX_WAITING_BYTES && capacity <= MAX_WAITING_BYTES + GROWTH_BYTES,
                "{kept} {capacity}"
            );
            for _ in 0..10_000 {
                permits.send(()).unwrap();
            }
            writer.flush(Duration::from_secs(20));
            let kept = text(&written).lines().count();
            assert_eq!(kept, MAX_WAITING_BYTES / 100);
            writer.push(b"after\n", format);
            writer.push(b"later\n", format);
            writer.flush(Duration::from_secs(20));
            let text = text(&written);
            let [notice, after, later] = text.lines().skip(kept).collect::<Vec<_>>()[..] else {
                panic!("{text}")
            };
            let words = format!("{} log lines were dropped: the reader of stderr is too slow", lines - kept);
            assert!(notice.contains(&words), "{notice}");
            if format == LogFormat::Json {
                let notice: serde_json::Value = serde_json::from_str(notice).unwrap();
                assert_eq!((&notice["message"], &notice["event"]), (&words.into(), &"log_lines_dropped".into()));
            } else {
                assert!(notice.ends_with(&format!("{words} event=log_lines_dropped")), "{notice}");
            }
            assert_eq!((after, later), ("after", "later"));
            assert!(bytes(&writer).1 <= MAX_WAITING_BYTES);
        }
    }

    #[test]
    fn the_end_does_not_wait_for_ever() {
        let (writer, _permits, written) = slow();
        writer.push(b"never read\n", LogFormat::Text);
        let began = Instant::now();
        writer.flush(Duration::from_millis(50));
        assert!(began.elapsed() < Duration::from_secs(5));
        assert_eq!(text(&written), "");
    }

    #[test]
    fn a_reader_who_went_away_stops_nothing() {
        let (writer, permits, _) = slow();
        drop(permits);
        for _ in 0..100_000 {
            writer.push(&[b'x'; 100], LogFormat::Text);
        }
        writer.flush(Duration::from_secs(20));
        assert_eq!(bytes(&writer).0, 0);
    }

    #[test]
    fn a_long_line_is_cut() {
        let (writer, permits, written) = slow();
        permits.send(()).unwrap();
        writer.push(format!("{}\n", "ä\"".repeat(100_000)).as_bytes(), LogFormat::Text);
        writer.flush(Duration::from_secs(20));
        let line = text(&written);
        assert!(
            line.len() <= MAX_LINE_BYTES && line.ends_with(CUT) && !line.contains('\u{fffd}'),
            "{}",
            line.len()
        );
        permits.send(()).unwrap();
        written.lock().clear();
        let long = serde_json::json!({"message": "\"\\".repeat(100_000)}).to_string() + "\n";
        writer.push(long.as_bytes(), LogFormat::Json);
        writer.flush(Duration::from_secs(20));
        let line = text(&written);
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert!(line.len() <= MAX_LINE_BYTES && long.starts_with(object["beginning"].as_str().unwrap()));
        assert_eq!(object["event"], "log_line_cut");
    }
}
