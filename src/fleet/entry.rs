//! The entries of nodes, and the watcher, as they stand in Redis. Keys that nobody knows are ignored, so that more can be added.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest entry that is read.
pub const MAX_ENTRY_BYTES: usize = 2048;
const MAX_HOST_BYTES: usize = 255;

/// Id of a node: 64 random bits, new at each start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

/// A node that watches, and its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    /// Node that watches.
    pub node: NodeId,
    /// Number that grows with each change.
    pub epoch: u64,
}

/// Id of a message in the stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Milliseconds of Redis's clock.
    pub millis: u64,
    /// Number within the millisecond.
    pub number: u64,
}

/// State of a node, as it says itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// The node may watch.
    Up,
    /// The node has just started, or waits for nodes with another fingerprint to end.
    Waiting,
    /// The node is stopping.
    Leaving,
}

/// The entry of a node: all that it says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Goes up while the node works.
    pub counter: u64,
    /// State of the node.
    pub state: NodeState,
    /// The node has read the records and works on them.
    #[serde(default)]
    pub watching: bool,
    /// When the node started, by Redis's clock; 0 until its first beat was answered.
    pub since_ms: i64,
    /// Version of what nodes say to each other.
    pub protocol: u32,
    /// The SFU and the homeserver that the node serves.
    pub fingerprint: u64,
    /// Shortest delay of the leaves that it watches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortest_ms: Option<u32>,
    /// Whether the SFU answers it.
    #[serde(default)]
    pub sfu: bool,
    /// Homeserver with most of the leaves that does not answer the node; empty where it does.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub lacks: Box<str>,
    /// Homeserver that the watcher lacks and that answers the node; empty where there is none.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub reaches: Box<str>,
    /// Message up to which it has dealt with all.
    #[serde(default, with = "as_text")]
    pub dealt: Position,
    /// Name of the host.
    #[serde(default)]
    pub host: Box<str>,
}

impl Entry {
    /// The entry as it is stored.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Numbers, switches and short texts always serialise.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads an entry; `None` where it is none.
    #[must_use]
    pub fn read(json: &[u8]) -> Option<Self> {
        let entry: Self = serde_json::from_slice(json.get(..MAX_ENTRY_BYTES.min(json.len()))?).ok()?;
        (entry.host.len() <= MAX_HOST_BYTES).then_some(entry)
    }
}

impl Position {
    /// Before every message.
    pub const FIRST: Self = Self { millis: 0, number: 0 };

    /// The least id that is greater.
    #[must_use]
    pub const fn next(self) -> Self {
        match self.number.checked_add(1) {
            Some(number) => Self {
                millis: self.millis,
                number,
            },
            None => Self {
                millis: self.millis.saturating_add(1),
                number: 0,
            },
        }
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for NodeId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let is_id = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_id.then(|| u64::from_str_radix(text, 16).ok()).flatten().map(Self).ok_or(())
    }
}

impl fmt::Display for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.node, self.epoch)
    }
}

impl FromStr for Watch {
    type Err = ();

    /// Reads what was written in just this form: any other text could be compared with nothing that is known here.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (node, epoch) = text.split_once(' ').ok_or(())?;
        let watch = Self {
            node: node.parse()?,
            epoch: epoch.parse().map_err(|_| ())?,
        };
        let is_own_form = (1..=Self::MAX_EPOCH).contains(&watch.epoch) && watch.to_string() == text;
        is_own_form.then_some(watch).ok_or(())
    }
}

impl Watch {
    /// The last epoch: fifteen digits, as the script has it that writes over what is no watch.
    const MAX_EPOCH: u64 = 999_999_999_999_999;
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.millis, self.number)
    }
}

impl FromStr for Position {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (millis, number) = text.split_once('-').ok_or(())?;
        Ok(Self {
            millis: millis.parse().map_err(|_| ())?,
            number: number.parse().map_err(|_| ())?,
        })
    }
}

mod as_text {
    use serde::{Deserialize as _, Deserializer, Serializer};

    use super::Position;

    pub(super) fn serialize<S: Serializer>(position: &Position, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(position)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Position, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(|()| serde::de::Error::custom("no id of a message"))
    }
}
