//! Every request that was answered, every line that the service wrote about one, and every count of lines that it did not write.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;

/// Bytes of the service's other lines that are kept.
const MOST_KEPT: usize = 64 * 1024 * 1024;
/// Examples of what is wrong.
const MOST_EXAMPLES: usize = 20;

#[derive(Default)]
pub struct Ledger {
    books: Mutex<Books>,
    /// Where the other lines go.
    kept: Mutex<Option<(File, usize)>>,
}

#[derive(Default)]
struct Books {
    /// Answers whose lines were not read yet, or are in a count.
    answers: HashMap<u64, u16>,
    /// Lines whose answers did not come yet.
    lines: HashMap<u64, u16>,
    /// Requests that were sent and got no answer.
    silent: HashMap<u64, ()>,
    window: Window,
    totals: Totals,
}

/// What happened since somebody looked.
#[derive(Default)]
pub struct Window {
    pub requests: u64,
    pub refused: u64,
    pub failed: u64,
    /// Neither asked for trouble nor answered with 2xx.
    pub good_refused: u64,
    pub took: Vec<Duration>,
}

#[derive(Default, Clone)]
pub struct Totals {
    /// Sent to a service that took the connection.
    pub sent: u64,
    pub answered: u64,
    /// Answers that leave no line: probes that went well.
    pub unlogged: u64,
    pub refused: u64,
    pub silent: u64,
    pub not_connected: u64,
    pub lines: u64,
    pub lines_of_silent: u64,
    pub counted: u64,
    /// Of those: clients that had gone.
    pub counted_gone: u64,
    pub without_cause: u64,
    pub other_status: u64,
    pub not_json: u64,
    pub by_status: HashMap<u16, u64>,
    pub by_outcome: HashMap<String, u64>,
    pub reloads: u64,
    pub warnings: u64,
    pub examples: Vec<String>,
}

/// How the books close.
pub struct Balance {
    /// Answers with 2xx without a line.
    pub missing_2xx: u64,
    /// Refusals without a line; they have to be in the counts.
    pub not_shown: u64,
    /// Lines about requests that nobody sent.
    pub invented: u64,
    pub silent_without_line: u64,
    pub totals: Totals,
}

pub enum Answer {
    NotConnected,
    Silent,
    Status {
        status: u16,
        probe: bool,
        good: bool,
        took: Duration,
    },
}

impl Ledger {
    pub fn keep(&self, path: &Path) -> std::io::Result<()> {
        *self.kept.lock().unwrap() = Some((File::create(path)?, 0));
        Ok(())
    }

    pub fn note(&self, id: u64, answer: &Answer) {
        let books = &mut *self.books.lock().unwrap();
        let (totals, window) = (&mut books.totals, &mut books.window);
        match *answer {
            Answer::NotConnected => totals.not_connected += 1,
            Answer::Silent => {
                totals.sent += 1;
                totals.silent += 1;
                window.requests += 1;
                window.failed += 1;
                if books.lines.remove(&id).is_some() {
                    totals.lines_of_silent += 1;
                } else {
                    books.silent.insert(id, ());
                }
            }
            Answer::Status { status, probe, good, took } => {
                totals.sent += 1;
                totals.answered += 1;
                window.requests += 1;
                *totals.by_status.entry(status).or_default() += 1;
                let is_fine = status < 300;
                if good {
                    window.took.push(took);
                    window.good_refused += u64::from(!is_fine);
                }
                window.refused += u64::from(!is_fine);
                totals.refused += u64::from(!is_fine);
                if probe && is_fine {
                    totals.unlogged += 1;
                    return;
                }
                match books.lines.remove(&id) {
                    Some(told) if told != status => totals.differ(id, status, told),
                    Some(_) => {}
                    None => {
                        books.answers.insert(id, status);
                    }
                }
            }
        }
    }

    pub fn take_window(&self) -> Window {
        std::mem::take(&mut self.books.lock().unwrap().window)
    }

    pub fn totals(&self) -> Totals {
        self.books.lock().unwrap().totals.clone()
    }

    /// Reads what a service logs until its end.
    pub fn read(&self, pipe: impl Read) {
        for line in BufReader::with_capacity(256 * 1024, pipe).split(b'\n').map_while(Result::ok) {
            self.line(&line);
        }
    }

    fn line(&self, text: &[u8]) {
        let Ok(line) = serde_json::from_slice::<Value>(text) else {
            let mut books = self.books.lock().unwrap();
            books.totals.not_json += 1;
            books.totals.example(format!("not JSON: {}", String::from_utf8_lossy(text)));
            return;
        };
        if line["target"] != "request" {
            self.other(text, &line);
            return;
        }
        let books = &mut *self.books.lock().unwrap();
        let totals = &mut books.totals;
        if let Some(count) = line["suppressed"].as_u64() {
            totals.counted += count;
            totals.counted_gone += line["client_gone"].as_u64().unwrap_or(0);
            for (name, value) in line.as_object().into_iter().flatten().filter(|(name, _)| *name != "suppressed") {
                if let Some(count) = value.as_u64() {
                    *totals.by_outcome.entry(name.clone()).or_default() += count;
                }
            }
            return;
        }
        totals.lines += 1;
        let status = line["status"].as_u64().unwrap_or(0) as u16;
        let outcome = line["outcome"].as_str().unwrap_or_default();
        *totals.by_outcome.entry(outcome.to_owned()).or_default() += 1;
        let says_why = line["detail"].is_string() || line["path"].is_string() || line["message"].as_str().is_some_and(|m| m != "refused");
        if status >= 300 && (outcome.is_empty() || outcome == "ok" || !says_why) {
            totals.without_cause += 1;
            totals.example(format!("no cause: {}", String::from_utf8_lossy(text)));
        }
        let id = line["request_id"]
            .as_str()
            .and_then(|id| id.strip_prefix('s'))
            .and_then(|id| id.parse().ok());
        let Some(id) = id else {
            totals.example(format!("whose? {}", String::from_utf8_lossy(text)));
            books.lines.insert(u64::MAX - totals.lines, status);
            return;
        };
        if let Some(answered) = books.answers.remove(&id) {
            if answered != status {
                totals.differ(id, answered, status);
            }
        } else if books.silent.remove(&id).is_some() {
            totals.lines_of_silent += 1;
        } else {
            books.lines.insert(id, status);
        }
    }

    fn other(&self, text: &[u8], line: &Value) {
        let is_bad = line["level"] == "WARN" || line["level"] == "ERROR";
        {
            let mut books = self.books.lock().unwrap();
            let is_reload = line["message"].as_str().is_some_and(|m| m.starts_with("the keys were read again"));
            books.totals.reloads += u64::from(is_reload);
            books.totals.warnings += u64::from(is_bad);
        }
        if let Some((file, written)) = &mut *self.kept.lock().unwrap()
            && *written < MOST_KEPT
        {
            *written += text.len() + 1;
            let _ = file.write_all(text).and_then(|()| file.write_all(b"\n"));
        }
    }

    pub fn balance(&self) -> Balance {
        let books = self.books.lock().unwrap();
        let mut totals = books.totals.clone();
        let (fine, refused): (Vec<_>, Vec<_>) = books.answers.iter().partition(|(_, status)| **status < 300);
        for (id, status) in fine.iter().take(3) {
            totals.example(format!("no line: request s{id}, answered {status}"));
        }
        for (id, status) in books.lines.iter().take(3) {
            totals.example(format!("nobody's line: s{id}, status {status}"));
        }
        Balance {
            missing_2xx: fine.len() as u64,
            not_shown: refused.len() as u64,
            invented: books.lines.len() as u64,
            silent_without_line: books.silent.len() as u64,
            totals,
        }
    }
}

impl Totals {
    fn example(&mut self, what: String) {
        if self.examples.len() < MOST_EXAMPLES {
            self.examples.push(what);
        }
    }

    fn differ(&mut self, id: u64, answered: u16, told: u16) {
        self.other_status += 1;
        self.example(format!("request s{id} was answered {answered}, its line says {told}"));
    }
}

impl Balance {
    /// Whether each request has its line or is in a count, and each line and count has its request.
    pub fn is_even(&self) -> bool {
        let most = self.not_shown + self.silent_without_line;
        self.missing_2xx == 0
            && self.invented == 0
            && self.totals.other_status == 0
            && self.totals.not_json == 0
            && (self.not_shown..=most).contains(&self.totals.counted)
    }
}
