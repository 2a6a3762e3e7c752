//! What goes wrong, in turn.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use siege::places::scrambled;
use tokio::time::sleep;

use crate::neighbours::{Neighbours, Who, signal_to};
use crate::service::{Service, Stage};
use crate::town::Sfu;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    Killed(Who),
    Frozen(Who),
    Slowed(Who),
    Restarted(Who),
    FailOver,
    HangUp,
    NewKey,
    /// The next instance beside the last, which then stops.
    Rolling,
    /// Stopped, and started at the same place.
    Stopped,
}

use Fault::{FailOver, Frozen, HangUp, Killed, NewKey, Restarted, Rolling, Slowed, Stopped};
use Who::{ClientApi, Dns, Homeserver, Redis, Verified};

/// All of them; the instances change close together, so that the last one is watched for long.
const ALL: [Fault; 29] = [
    Frozen(ClientApi),
    Killed(Redis),
    Rolling,
    NewKey,
    Stopped,
    Killed(Who::Sfu),
    Frozen(Homeserver),
    FailOver,
    Slowed(Homeserver),
    HangUp,
    Frozen(Who::Sfu),
    Killed(Dns),
    Slowed(Redis),
    Killed(Homeserver),
    Restarted(ClientApi),
    Frozen(Redis),
    Slowed(Who::Sfu),
    Restarted(Who::Sfu),
    Frozen(Dns),
    Killed(ClientApi),
    Restarted(Redis),
    Frozen(Verified),
    Slowed(ClientApi),
    Killed(Verified),
    Restarted(Homeserver),
    Slowed(Dns),
    Restarted(Dns),
    Slowed(Verified),
    Restarted(Verified),
];
/// What ends the restarts of leaves of 18 s must be over before their last quarter.
const MOST_OF_CLIENT_API: Duration = Duration::from_secs(4);

impl Fault {
    pub fn number(n: usize) -> Self {
        ALL[n % ALL.len()]
    }

    pub const fn count() -> usize {
        ALL.len()
    }

    pub fn name(self) -> String {
        match self {
            Killed(who) => format!("{} killed", who.name()),
            Frozen(who) => format!("{} frozen", who.name()),
            Slowed(who) => format!("{} slowed", who.name()),
            Restarted(who) => format!("{} restarted", who.name()),
            FailOver => "Redis fails over".into(),
            HangUp => "SIGHUP".into(),
            NewKey => "another key".into(),
            Rolling => "rolling restart".into(),
            Stopped => "stopped and started".into(),
        }
    }
}

/// Whoever something can happen to.
pub struct Actors {
    pub neighbours: Neighbours,
    pub service: Option<Service>,
}

/// Makes it happen, and waits for its end.
pub async fn happen(fault: Fault, most: Duration, stage: &Stage, actors: &mut Actors) -> Result<(), String> {
    let Actors { neighbours, service } = actors;
    let limit = |who: Who| if who == ClientApi { most.min(MOST_OF_CLIENT_API) } else { most };
    match fault {
        Killed(who) | Restarted(who) => {
            let (signal, down) = match fault {
                Killed(_) => (Signal::KILL, limit(who).min(Duration::from_secs(10))),
                _ => (Signal::TERM, Duration::ZERO),
            };
            if who == Who::Sfu {
                stage.town.sfu.send_modify(|sfu| {
                    *sfu = Sfu {
                        is_up: false,
                        starts: sfu.starts + 1,
                    };
                });
            }
            neighbours.end(who, signal);
            if who == Who::Sfu {
                stage.town.world.forget_all_rooms();
            }
            sleep(down).await;
            neighbours.begin(who).await?;
            if who == Who::Sfu {
                stage.town.sfu.send_modify(|sfu| sfu.is_up = true);
            }
        }
        Frozen(who) => {
            if who == Who::Sfu {
                stage.town.sfu.send_modify(|sfu| sfu.is_up = false);
            }
            neighbours.signal(who, Signal::STOP);
            sleep(limit(who)).await;
            neighbours.signal(who, Signal::CONT);
            if who == Who::Sfu {
                stage.town.sfu.send_modify(|sfu| sfu.is_up = true);
            }
        }
        Slowed(who) => {
            neighbours.slow(who, true);
            sleep(most).await;
            neighbours.slow(who, false);
        }
        FailOver => neighbours.fail_over(most.min(Duration::from_secs(3))).await?,
        HangUp => hang_up(stage, service).await?,
        NewKey => new_key(stage, service).await?,
        Rolling => {
            let last = service.take().ok_or("no service")?;
            let places = stage.places;
            let address = match last.is.address == places.service() {
                true => places.other_service(),
                false => places.service(),
            };
            *service = Some(stage.start(address, last.is.number + 1).await?);
            sleep(Duration::from_secs(1)).await;
            last.stop().await?;
        }
        Stopped => {
            let last = service.take().ok_or("no service")?;
            let (address, number) = (last.is.address, last.is.number + 1);
            last.stop().await?;
            *service = Some(stage.start(address, number).await?);
        }
    }
    Ok(())
}

async fn hang_up(stage: &Stage, service: &Option<Service>) -> Result<(), String> {
    let before = stage.town.ledger.totals().reloads;
    let pid = service.as_ref().map(|s| s.is.pid).ok_or("no service")?;
    signal_to(pid, Signal::HUP);
    let end = Instant::now() + Duration::from_secs(5);
    while stage.town.ledger.totals().reloads == before {
        if Instant::now() > end {
            return Err("SIGHUP left no line within 5 s".into());
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Tokens are signed with the new key at once; webhooks of the old one are taken until the SFU has it, too.
async fn new_key(stage: &Stage, service: &Option<Service>) -> Result<(), String> {
    let town = &stage.town;
    let n = town.world.unique();
    let (key, secret) = (
        format!("key{n}"),
        format!("{:016x}{:016x}{:016x}", scrambled(n), scrambled(n + 1), scrambled(n + 2)),
    );
    let path = stage.keys();
    let beside = path.with_extension("new");
    let written = std::fs::write(&beside, format!("{key}: {secret}\n"));
    written.and_then(|()| std::fs::rename(&beside, &path)).map_err(|e| e.to_string())?;
    hang_up(stage, service).await?;
    let end = Instant::now() + Duration::from_secs(10);
    while *town.issuer.lock().unwrap() != key {
        if Instant::now() > end {
            return Err(format!("no token is signed with {key} within 10 s"));
        }
        sleep(Duration::from_millis(20)).await;
    }
    sleep(Duration::from_secs(2)).await;
    *town.key.lock().unwrap() = (key, secret);
    Ok(())
}
