//! Redis as the scripts leave it, in Rust. `scripts` shows that it is the same.

use std::collections::{BTreeMap, BTreeSet};

use lk_jwt_service::internals::fleet::{Answer, Counts, Entry, NodeId, Position, Watch};
use lk_jwt_service::internals::store::{Handed, JobRecord, Message, News};

/// Two delegations nearer than this: the later call wins.
const NEAR_MS: i64 = 250;

#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    pub(super) now_ms: i64,
    pub(super) nodes: BTreeMap<NodeId, Entry>,
    pub(super) watch: Option<Watch>,
    pub(super) jobs: BTreeMap<String, String>,
    pub(super) messages: Vec<Message>,
    pub(super) full: BTreeSet<String>,
}

impl Model {
    pub(super) fn beat(&mut self, node: NodeId, entry: &Entry, own: Option<Watch>, trim: Position, remove: &[NodeId]) -> Answer {
        for id in remove {
            self.nodes.remove(id);
        }
        self.nodes.insert(node, entry.clone());
        let messages = self.messages.len() as u64;
        // Not behind what this server has never had: after a failover new messages may have lower ids.
        if own.is_some() && own == self.watch && self.messages.iter().any(|message| message.at == trim) {
            self.messages.retain(|message| message.at >= trim);
        }
        Answer {
            redis_ms: self.now_ms,
            watch: self.watch,
            counts: Counts {
                records: self.jobs.len() as u64,
                messages,
            },
            entries: self.nodes.iter().map(|(id, entry)| (*id, entry.clone())).collect(),
        }
    }

    pub(super) fn change(&mut self, seen: Option<Watch>, wanted: Watch) -> Option<Watch> {
        if self.watch == seen {
            self.watch = Some(wanted);
        }
        self.watch
    }

    pub(super) fn put(&mut self, own: Watch, record: &JobRecord<'_>) {
        if self.watch == Some(own) {
            self.jobs.insert(record.field(), record.value());
        }
    }

    pub(super) fn remove(&mut self, own: Watch, field: &str) {
        if self.watch == Some(own) {
            self.jobs.remove(field);
        }
    }

    /// `None` where the record is another user's; the message's place is the server's to choose.
    pub(super) fn delegate(&mut self, record: &JobRecord<'_>, names: &[String]) -> Option<bool> {
        let field = record.field();
        let stored = self.jobs.get(&field).cloned();
        let read = stored
            .as_ref()
            .map(|value| JobRecord::read(field.as_bytes(), value.as_bytes()).expect("a record"));
        let merged = record.in_order_with(read.as_ref(), Some(self.now_ms), NEAR_MS)?;
        if stored.is_none() && names.iter().any(|name| self.full.contains(name)) {
            return Some(false);
        }
        let value = merged.value();
        self.jobs.insert(field, value);
        Some(true)
    }

    /// A message, numbered as Redis does.
    pub(super) fn tell(&mut self, news: News) -> Position {
        let millis = self.now_ms.unsigned_abs();
        let at = match self.messages.last() {
            Some(last) if last.at.millis >= millis => last.at.next(),
            Some(_) | None => Position { millis, number: 0 },
        };
        self.messages.push(Message { at, news });
        at
    }

    pub(super) fn bound(&mut self, own: Watch, full: &[String]) {
        if self.watch == Some(own) {
            self.full = full.iter().cloned().collect();
        }
    }
}

/// The model's word for an outcome of the script.
pub(super) fn outcome(handed: Handed) -> Option<bool> {
    match handed {
        Handed::Done(_) => Some(true),
        Handed::Full => Some(false),
        Handed::Foreign => None,
    }
}
