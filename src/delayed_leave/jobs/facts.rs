//! Which jobs a fact is for, and what it says to each of them.

use super::{Answered, JobId, Jobs, Looked, Outputs, Row, Webhook, WebhookKind};
use crate::delayed_leave::machine::{Answer, Event, Input, Participant, Verdict};
use crate::delayed_leave::rooms::{News, RoomId, RoomRow};
use crate::livekit::Reach;
use crate::time::Time;
use std::{collections::BTreeMap, iter, sync::Arc};

impl Jobs {
    // --- facts about one participant or one room ---

    pub(super) fn webhook(&mut self, webhook: &Webhook<'_>, now: Time, out: &mut Outputs) {
        self.webhooks_work = true;
        self.watch.heard(now);
        let Some(room) = self.rooms.find(webhook.room) else { return };
        if webhook.room_sid.is_empty() {
            // An old server, or a damaged event: it still tells of the participant.
        } else if webhook.kind == WebhookKind::RoomFinished {
            let news = self.rooms.finished(room, webhook.room_sid, now);
            return self.spread(room, news, now, now, out);
        } else {
            let somebody = !webhook.identity.is_empty() && !matches!(webhook.kind, WebhookKind::Left(_) | WebhookKind::Aborted(_));
            let news = self
                .rooms
                .told(room, webhook.room_sid, somebody, self.watch.trouble(), webhook.happened, now);
            self.spread(room, news, now, now, out);
        }
        let Some(job) = self.find(webhook.room, webhook.identity) else {
            return;
        };
        let room_sid = (!webhook.room_sid.is_empty()).then(|| self.rooms.intern(room, webhook.room_sid));
        let event = Event {
            id: (!webhook.id.is_empty()).then(|| hash(webhook.id)),
            sid: webhook.sid,
            joined_at_ms: webhook.joined_at_ms,
            happened: webhook.happened,
            room_sid: room_sid.as_ref(),
        };
        let input = match webhook.kind {
            WebhookKind::Joined => Input::Joined(event),
            WebhookKind::Left(reason) => Input::Left(event, reason),
            WebhookKind::Aborted(reason) => Input::Aborted(event, reason),
            WebhookKind::RoomStarted | WebhookKind::RoomFinished | WebhookKind::Track | WebhookKind::Other => return,
        };
        self.step(job, input, now, out);
    }

    pub(super) fn looked_up(&mut self, id: JobId, asked: Time, looked: Looked<'_>, now: Time, out: &mut Outputs) {
        let (reach, answer) = match looked {
            Looked::Present(row) => (Reach::Answered, Answer::Present(participant(&row))),
            Looked::Absent => (Reach::Answered, Answer::Absent),
            Looked::Unclear => (Reach::Answered, Answer::Unclear),
            Looked::TimedOut => (Reach::TimedOut, Answer::Unclear),
            Looked::Unreachable => (Reach::Unreachable, Answer::Unclear),
        };
        self.watch.called(reach, now);
        let Some(room) = self.table.get(id).map(|job| job.room) else {
            return;
        };
        if matches!(answer, Answer::Present(_)) {
            self.rooms.sighted(room, asked);
        }
        self.rooms.sweep_ended(room);
        let room_sid = self.rooms.sid(room).cloned();
        self.step(
            id,
            Input::LookedUp {
                asked,
                answer,
                room_sid: room_sid.as_ref(),
            },
            now,
            out,
        );
        self.plan_sweep(room, now);
    }

    pub(super) fn listed(&mut self, room: RoomId, asked: Time, answer: Answered<&[Row<'_>]>, now: Time, out: &mut Outputs) {
        self.watch.called(answer.reach(), now);
        self.rooms.sweep_ended(room);
        match answer {
            Answered::Yes(rows) => self.read_list(room, asked, rows, now, out),
            // A room so large is asked for one by one.
            Answered::TooMuch => {
                for id in self.in_room(room) {
                    self.step(id, Input::Ask, now, out);
                }
            }
            Answered::Refused | Answered::Unclear | Answered::TimedOut | Answered::Unreachable => {}
        }
        self.plan_sweep(room, now);
    }

    fn read_list(&mut self, room: RoomId, asked: Time, rows: &[Row<'_>], now: Time, out: &mut Outputs) {
        if !rows.is_empty() {
            self.rooms.sighted(room, asked);
        }
        let room_sid = self.rooms.sid(room).cloned();
        // Members are in the order of their identities; a large room has too many rows for a map to be made of them.
        let mut rows: Vec<_> = rows.iter().collect();
        rows.sort_by_key(|row| row.identity);
        let mut rows = rows.into_iter().peekable();
        for slot in self.rooms.members(room).to_vec() {
            let Some((id, job)) = self.table.in_slot(slot) else { continue };
            let identity = job.identity();
            while rows.next_if(|row| row.identity < identity).is_some() {}
            let input = match iter::from_fn(|| rows.next_if(|row| row.identity == identity)).last() {
                Some(row) => Input::Listed {
                    asked,
                    participant: participant(row),
                    room_sid: room_sid.as_ref(),
                },
                None if job.machine.delegated() <= asked => Input::Ask,
                None => continue,
            };
            self.step(id, input, now, out);
        }
    }

    pub(super) fn rooms_listed(&mut self, names: &[Arc<str>], asked: Time, answer: Answered<&[RoomRow<'_>]>, now: Time, out: &mut Outputs) {
        self.watch.called(answer.reach(), now);
        let rows: BTreeMap<&str, &RoomRow<'_>> = match answer {
            Answered::Yes(rows) => rows.iter().map(|row| (row.name, row)).collect(),
            Answered::Refused | Answered::TooMuch | Answered::Unclear | Answered::TimedOut | Answered::Unreachable => BTreeMap::new(),
        };
        for name in names {
            let Some(room) = self.rooms.find(name) else { continue };
            match answer {
                Answered::Yes(_) => {
                    let trouble = self.watch.trouble();
                    let news = self.rooms.listed(room, rows.get(&**name).map(|row| **row), asked, trouble, now);
                    self.spread(room, news, asked, now, out);
                }
                Answered::Refused => {
                    self.rooms.refused(room);
                    for id in self.in_room(room) {
                        self.step(
                            id,
                            Input::Room {
                                asked,
                                verdict: Verdict::Stands,
                            },
                            now,
                            out,
                        );
                    }
                }
                Answered::TooMuch | Answered::Unclear | Answered::TimedOut | Answered::Unreachable => {
                    self.rooms.unlisted(room, now, &mut self.jitter);
                }
            }
            self.sync_room(room);
        }
    }

    pub(super) fn room_created(&mut self, room: RoomId, answer: Answered<RoomRow<'_>>, now: Time, out: &mut Outputs) {
        self.watch.called(answer.reach(), now);
        let row = match answer {
            Answered::Yes(row) => Some(row),
            Answered::Refused | Answered::TooMuch | Answered::Unclear | Answered::TimedOut | Answered::Unreachable => None,
        };
        let news = self.rooms.created(room, row, self.watch.trouble(), now, &mut self.jitter);
        self.spread(room, news, now, now, out);
        self.sync_room(room);
    }

    /// Tells the jobs in a room what news of it means for each of them.
    pub(super) fn spread(&mut self, room: RoomId, news: News, asked: Time, now: Time, out: &mut Outputs) {
        if news == News::None && asked == now {
            return self.sync_room(room);
        }
        for id in self.in_room(room) {
            let Some(job) = self.table.get(id) else { continue };
            let session = job.machine.session();
            let input = match news {
                News::Empty if job.machine.is_swept() && !job.machine.is_unplaced() => Input::Ask,
                News::None | News::Empty if !job.machine.is_unplaced() => continue,
                News::None | News::Empty | News::Judged => {
                    let verdict = self
                        .rooms
                        .verdict(room, session.room_sid(), session.last_sighted(), self.watch.trouble());
                    // Without the watch nobody creates lost rooms again, and nothing is known of them but that they are not there.
                    let verdict = if verdict == Verdict::Lost && !self.watch.is_on() {
                        Verdict::Ended
                    } else {
                        verdict
                    };
                    Input::Room { asked, verdict }
                }
            };
            self.step(id, input, now, out);
        }
        self.sync_room(room);
    }

    pub(super) fn tell_all(&mut self, input: Input<'_>, now: Time, out: &mut Outputs) {
        for id in self.table.ids().collect::<Vec<_>>() {
            self.step(id, input, now, out);
        }
    }

    pub(super) fn in_room(&self, room: RoomId) -> Vec<JobId> {
        self.rooms
            .members(room)
            .iter()
            .filter_map(|&slot| self.table.in_slot(slot))
            .map(|(id, _)| id)
            .collect()
    }
}

fn participant<'a>(row: &Row<'a>) -> Participant<'a> {
    Participant {
        sid: row.sid,
        joined_at_ms: row.joined_at_ms,
        active: row.active,
    }
}

/// FNV-1a: ids are the SFU's own, and a few per job are remembered.
fn hash(id: &str) -> u64 {
    id.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
