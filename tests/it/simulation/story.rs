//! What happens in a simulated world, all of it drawn from the seed before the world begins.

use super::world::{Spell, Trouble};
use lk_jwt_service::internals::backoff::Jitter;
use lk_jwt_service::internals::livekit::DisconnectReason;

/// Chance, by seed.
pub(super) struct Chance(Jitter);

impl Chance {
    pub(super) const fn new(seed: u64) -> Self {
        Self(Jitter::new(seed))
    }

    pub(super) fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.0.up_to(most - least)
    }

    pub(super) fn one_in(&mut self, count: u64) -> bool {
        self.0.up_to(count - 1) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.0.up_to(of.len() as u64 - 1)).unwrap()]
    }
}

/// One who may be in a call: always in the same room, with the same device.
#[derive(Clone, Debug)]
pub(super) struct Profile {
    pub(super) room: String,
    pub(super) user: usize,
    pub(super) homeserver: usize,
    pub(super) delay_ms: u64,
    /// Goes on after a 404 of the SFU, as the Python SDK does and a browser does not.
    pub(super) stubborn: bool,
    /// Calls about its events carry the as_token.
    pub(super) as_user: bool,
}

/// How homeservers limit calls about delayed events.
#[derive(Clone, Copy, Debug)]
pub(super) enum Limiter {
    None,
    Address { burst: f64, per_second: f64 },
    User { burst: f64, per_second: f64 },
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Happening {
    /// Comes, and delegates so many milliseconds before (or, negative, after) entering.
    Join {
        who: usize,
        early: i64,
        ice: u64,
    },
    /// Says goodbye, and ends its membership itself or not.
    Leave {
        who: usize,
        reason: DisconnectReason,
        itself: bool,
    },
    /// Its network is gone: the SFU notices so much later.
    Vanish {
        who: usize,
        noticed: u64,
    },
    /// Is closed and opened again: a new session with a new event.
    Reload {
        who: usize,
        goodbye: bool,
        gap: u64,
    },
    /// The connection is made anew: a new session with the same event.
    Resume {
        who: usize,
        reason: DisconnectReason,
        gap: u64,
    },
    /// Delegates while inside or without ever coming; the request was held for so long.
    Delegate {
        who: usize,
        same: bool,
        held: u64,
    },
    /// Tries to join, and fails.
    Abort {
        who: usize,
        reason: DisconnectReason,
        after: u64,
    },
    /// Removed from the Matrix room, and from the call by this service.
    Kick {
        who: usize,
    },
    /// A webhook of the past is sent once more, with the same token or another one.
    Again {
        who: usize,
        same_token: bool,
    },
    /// Somebody deletes the room; the SFU tells of it or not.
    DeleteRoom {
        who: usize,
        told: bool,
    },
    /// The SFU forgets everything and is back so much later. A goodbye may be told.
    SfuRestart {
        down: u64,
        told: bool,
    },
    /// kill -9.
    Kill {
        down: u64,
    },
    /// SIGTERM.
    Stop {
        down: u64,
    },
    /// SIGSTOP, or with its clock standing still, too: a suspended host.
    Freeze {
        length: u64,
        suspended: bool,
    },
    /// The wall clock is set.
    ClockSet(i64),
    /// The homeserver denies an event once that it has.
    FalseNo {
        homeserver: usize,
    },
    Trouble(Trouble, u64),
    /// Comes, or comes anew, so much later, and has delegated to another instance on the same store, which looks after the event for so
    /// long.
    JoinElsewhere {
        who: usize,
        early: u64,
        ice: u64,
        watched: u64,
    },
    /// Another instance removes the record of somebody.
    RemovedElsewhere {
        who: usize,
    },
    /// Something else writes over the record of somebody.
    Damaged {
        who: usize,
        with: &'static str,
    },
}

/// A world and what happens in it.
pub(super) struct Story {
    pub(super) seed: u64,
    pub(super) people: Vec<Profile>,
    pub(super) limiters: Vec<Limiter>,
    /// How far ahead the clocks of the SFU's nodes are.
    pub(super) nodes: Vec<i64>,
    pub(super) sfu_latency: (u64, u64),
    pub(super) homeserver_latency: (u64, u64),
    pub(super) sweep_ms: u64,
    /// Rooms are swept once a webhook has come, too.
    pub(super) sweeps: bool,
    /// The SFU is asked for all rooms (L13).
    pub(super) watches_rooms: bool,
    /// Other instances use the store, too, so that it is read again (L11).
    pub(super) shares_store: bool,
    pub(super) happenings: Vec<(u64, Happening)>,
}

/// People in the largest story.
const MAX_USERS: usize = 20;

const REASONS: [DisconnectReason; 17] = [
    DisconnectReason::ClientInitiated,
    DisconnectReason::ClientInitiated,
    DisconnectReason::ClientInitiated,
    DisconnectReason::ConnectionTimeout,
    DisconnectReason::SignalClose,
    DisconnectReason::ParticipantRemoved,
    DisconnectReason::RoomClosed,
    DisconnectReason::UserRejected,
    DisconnectReason::UserUnavailable,
    DisconnectReason::DuplicateIdentity,
    DisconnectReason::Migration,
    DisconnectReason::StateMismatch,
    DisconnectReason::ServerShutdown,
    DisconnectReason::JoinFailure,
    DisconnectReason::MediaFailure,
    DisconnectReason::AgentError,
    DisconnectReason::Unknown,
];

impl Story {
    pub(super) fn of(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let chance = &mut chance;
        // What the operator chose, and how many there are at most: drawn apart, so that stories of the usual house stay what they were.
        let house = Chance::new(seed ^ 0x40_05e).between(0, 15);
        let homeservers = usize::try_from(chance.between(1, 2)).unwrap();
        let limiters: Vec<_> = (0..homeservers)
            .map(|_| match chance.between(0, 7) {
                0 => Limiter::Address {
                    burst: 5.0,
                    per_second: 1.0,
                },
                1 => Limiter::User {
                    burst: 5.0,
                    per_second: 1.0,
                },
                _ => Limiter::None,
            })
            .collect();
        let count = if house == 3 {
            MAX_USERS
        } else {
            chance.pick(&[1, 2, 3, 4, 5, 6, 8])
        };
        let rooms = chance.between(1, 3);
        let people: Vec<_> = (0..count)
            .map(|n| {
                let homeserver = n % homeservers;
                let delay_ms = match limiters[homeserver] {
                    Limiter::None => chance.pick(&[
                        2_000, 5_000, 8_000, 18_000, 18_000, 18_000, 18_000, 30_000, 90_000, 300_000, 3_600_000,
                    ]),
                    Limiter::Address { .. } | Limiter::User { .. } => chance.pick(&[18_000, 18_000, 30_000, 90_000]),
                };
                Profile {
                    room: format!("room{}", chance.between(1, rooms)),
                    // One user with two devices, once in a while.
                    user: if chance.one_in(6) { n.saturating_sub(homeservers) } else { n },
                    homeserver,
                    delay_ms,
                    stubborn: chance.one_in(3),
                    as_user: house == 2 && homeserver == 0,
                }
            })
            .collect();
        let nodes = match chance.between(0, 3) {
            0 => vec![chance.pick(&[-5_000, -2_000, 3_000, 5_000]), chance.pick(&[-4_000, 0, 4_500])],
            1 => vec![chance.pick(&[-3_600_000, -700, 250, 86_400_000])],
            _ => vec![0],
        };
        let sfu_latency = chance.pick(&[(0, 0), (1, 8), (1, 8), (20, 150), (100, 300)]);
        let homeserver_latency = chance.pick(&[(0, 0), (5, 60), (5, 60), (50, 400)]);
        let sweeps = house != 0;
        let sweep_ms = chance.pick(&[30_000, 30_000, 30_000, 5_000, 1_000]);
        let sweep_ms = if sweeps { sweep_ms } else { 30_000 };
        // Few kinds of trouble in each world, so that the strict bounds have something to say in most.
        let kinds: Vec<u64> = (0..chance.pick(&[0, 1, 1, 1, 2, 2, 3])).map(|_| chance.between(0, 5)).collect();
        let mut at = 0;
        let mut happenings = Vec::new();
        for _ in 0..chance.between(8, 45) {
            at += match chance.between(0, 9) {
                0..=3 => chance.between(1, 1_500),
                4..=7 => chance.between(1_000, 20_000),
                _ => chance.between(20_000, 100_000),
            };
            let happening = if !kinds.is_empty() && chance.one_in(3) {
                let kind = chance.pick(&kinds);
                disaster(kind, homeservers, count, chance)
            } else {
                ordinary(chance.between(0, count as u64 - 1), chance)
            };
            happenings.push((at, happening));
        }
        let shares_store = matches!(house, 4..=7);
        if shares_store {
            let mut apart = Chance::new(seed ^ 0xe15e);
            for _ in 0..apart.between(1, 8) {
                let at = apart.between(0, at);
                let who = apart.between(0, count as u64 - 1);
                happenings.push((at, elsewhere(who, &mut apart)));
            }
        }
        Self {
            seed,
            people,
            limiters,
            nodes,
            sfu_latency,
            homeserver_latency,
            sweep_ms,
            sweeps,
            watches_rooms: house != 1,
            shares_store,
            happenings,
        }
    }

    /// When the last happening is over.
    pub(super) fn end(&self) -> u64 {
        self.happenings
            .iter()
            .map(|&(at, happening)| at + length(happening))
            .max()
            .unwrap_or(0)
    }
}

fn length(happening: Happening) -> u64 {
    match happening {
        Happening::Trouble(_, length) | Happening::Freeze { length, .. } => length,
        Happening::SfuRestart { down, .. } | Happening::Kill { down } => down,
        Happening::Stop { down } => down + 10_000,
        Happening::JoinElsewhere { watched, .. } => watched,
        Happening::Join { .. }
        | Happening::Leave { .. }
        | Happening::Vanish { .. }
        | Happening::Reload { .. }
        | Happening::Resume { .. }
        | Happening::Delegate { .. }
        | Happening::Abort { .. }
        | Happening::Kick { .. }
        | Happening::Again { .. }
        | Happening::DeleteRoom { .. }
        | Happening::ClockSet(_)
        | Happening::FalseNo { .. }
        | Happening::RemovedElsewhere { .. }
        | Happening::Damaged { .. } => 0,
    }
}

fn ordinary(who: u64, chance: &mut Chance) -> Happening {
    let who = usize::try_from(who).unwrap();
    let reason = chance.pick(&REASONS);
    match chance.between(0, 19) {
        0..=8 => Happening::Join {
            who,
            early: chance.pick(&[2_000, 300, 300, 60, -40, -400, -3_000, 70_000]),
            ice: chance.pick(&[40, 200, 200, 300, 1_500, 9_000, 25_000]),
        },
        9..=11 => Happening::Leave {
            who,
            reason,
            itself: chance.one_in(3),
        },
        12 => Happening::Vanish {
            who,
            noticed: chance.between(5_000, 25_000),
        },
        13..=14 => Happening::Reload {
            who,
            goodbye: chance.one_in(2),
            gap: chance.pick(&[150, 600, 1_200, 3_000, 8_000]),
        },
        15..=16 => Happening::Resume {
            who,
            reason,
            gap: chance.pick(&[0, 30, 100, 300, 440, 1_300]),
        },
        17 => Happening::Delegate {
            who,
            same: chance.one_in(2),
            held: chance.pick(&[0, 0, 300, 2_500, 9_000]),
        },
        18 => Happening::Abort {
            who,
            reason: chance.pick(&[DisconnectReason::JoinFailure, DisconnectReason::SignalClose]),
            after: chance.between(50, 25_000),
        },
        _ => match chance.between(0, 2) {
            0 => Happening::Kick { who },
            1 => Happening::DeleteRoom {
                who,
                told: chance.one_in(2),
            },
            _ => Happening::Again {
                who,
                same_token: chance.one_in(2),
            },
        },
    }
}

fn disaster(kind: u64, homeservers: usize, count: usize, chance: &mut Chance) -> Happening {
    let homeserver = usize::try_from(chance.between(0, homeservers as u64 - 1)).unwrap();
    let length = chance.pick(&[300, 1_000, 2_500, 4_000, 6_000, 12_000, 25_000]);
    let long = chance.between(10_000, 120_000);
    match kind {
        0 if chance.one_in(4) => Happening::Again {
            who: usize::try_from(chance.between(0, count as u64 - 1)).unwrap(),
            same_token: chance.one_in(2),
        },
        0 => Happening::Trouble(
            chance.pick(&[
                Trouble::WebhooksOff,
                Trouble::WebhooksLossy,
                Trouble::WebhooksLate,
                Trouble::WebhooksTwice,
            ]),
            long,
        ),
        1 if chance.one_in(2) => Happening::SfuRestart {
            down: chance.pick(&[50, 400, 1_000, 3_000, 12_000, 20_000, 45_000, 900_000]),
            told: chance.one_in(4),
        },
        1 => {
            let trouble = chance.pick(&[
                Trouble::SfuHangs,
                Trouble::SfuErrors,
                Trouble::SfuHalfDead,
                Trouble::SfuRefusesLists,
                Trouble::SfuLossy,
                Trouble::SfuSlow,
            ]);
            Happening::Trouble(trouble, if chance.one_in(3) { long } else { length })
        }
        2 if chance.one_in(6) => Happening::FalseNo { homeserver },
        2 => {
            let trouble = chance.pick(&[
                Trouble::HomeserverDown(homeserver),
                Trouble::HomeserverPage(homeserver),
                Trouble::HomeserverHint(homeserver),
                Trouble::HomeserverHangs(homeserver),
                Trouble::HomeserverSlow(homeserver),
            ]);
            let long = trouble == Trouble::HomeserverSlow(homeserver) || chance.one_in(6);
            Happening::Trouble(trouble, if long { chance.between(20_000, 90_000) } else { length })
        }
        3 if chance.one_in(2) => Happening::Kill { down: length },
        3 => Happening::Trouble(chance.pick(&[Trouble::StoreAway, Trouble::StoreEmpty]), length),
        4 => match chance.between(0, 3) {
            0 => Happening::Kill { down: length },
            1 => Happening::Stop { down: length.min(4_000) },
            _ => Happening::Freeze {
                length: chance.pick(&[1_000, 2_900, 4_000, 9_000, 12_000, 30_000]),
                suspended: chance.one_in(2),
            },
        },
        _ if chance.one_in(3) => Happening::Freeze { length, suspended: true },
        _ => Happening::ClockSet(chance.pick(&[-3_600_000, -20_000, -2_000, 2_500, 10_000, 3_600_000])),
    }
}

/// What other instances, and other programs, do to the store.
fn elsewhere(who: u64, chance: &mut Chance) -> Happening {
    let who = usize::try_from(who).unwrap();
    match chance.between(0, 5) {
        0..=3 => Happening::JoinElsewhere {
            who,
            early: chance.pick(&[60, 300, 2_000, 20_000]),
            ice: chance.pick(&[40, 200, 300, 1_500]),
            watched: chance.pick(&[0, 5_000, 20_000, 70_000, 300_000]),
        },
        4 => Happening::RemovedElsewhere { who },
        _ => Happening::Damaged {
            who,
            with: chance.pick(&[
                "",
                "[]",
                "{\"Params\":{\"DelayId\":7}}",
                "{\"Params\":{\"DelayId\":\"e0",
                "{\"RestartedAt\":\"soon\"}",
            ]),
        },
    }
}

/// How long of a span was covered by spells of some kind.
pub(super) fn covered(spells: &[Spell], which: impl Fn(Trouble) -> bool, from: u64, until: u64) -> u64 {
    let of = spells.iter().filter(|spell| which(spell.what));
    of.map(|spell| spell.until.min(until).saturating_sub(spell.from.max(from))).sum()
}
