//! The DNS server of everybody: it plays along with every wildcard, and is silent about some.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::sleep;

use crate::places::{self, Places, VICTIM_PORTS, VICTIMS, number};

const A: u16 = 1;
const SRV: u16 = 33;
const TTL: u32 = 300;

#[derive(Default)]
pub struct Asked {
    pub answered: AtomicU64,
    pub silent: AtomicU64,
}

enum Say {
    Silence,
    NoName,
    Addresses(Vec<Ipv4Addr>),
    /// Ports and targets.
    Services(Vec<(u16, String)>),
    Nothing,
}

/// Answers over UDP come `late_ms` later.
pub async fn serve(places: Places, asked: Arc<Asked>, late_ms: Arc<AtomicU64>) -> std::io::Result<()> {
    let udp = Arc::new(UdpSocket::bind(places.dns()).await?);
    let tcp = TcpListener::bind(places.dns()).await?;
    let over_tcp = asked.clone();
    tokio::spawn(async move {
        loop {
            if let Ok((stream, _)) = tcp.accept().await {
                tokio::spawn(talk(places, stream, over_tcp.clone()));
            }
        }
    });
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            if let Ok((length, from)) = udp.recv_from(&mut buffer).await
                && let Some(answer) = answer(places, &buffer[..length], &asked)
            {
                let (udp, late) = (udp.clone(), Duration::from_millis(late_ms.load(Relaxed)));
                tokio::spawn(async move {
                    sleep(late).await;
                    let _ = udp.try_send_to(&answer, from);
                });
            }
        }
    });
    Ok(())
}

async fn talk(places: Places, mut stream: TcpStream, asked: Arc<Asked>) -> std::io::Result<()> {
    loop {
        let length = stream.read_u16().await?;
        let mut question = vec![0; length.into()];
        stream.read_exact(&mut question).await?;
        if let Some(answer) = answer(places, &question, &asked) {
            stream.write_u16(answer.len() as u16).await?;
            stream.write_all(&answer).await?;
        }
    }
}

fn say(places: Places, name: &str, kind: u16) -> Say {
    let plain = name.strip_prefix("_matrix-fed._tcp.");
    let old = name.strip_prefix("_matrix._tcp.");
    let labels: Vec<&str> = plain.or(old).unwrap_or(name).split('.').collect();
    let n = number(labels[0]).unwrap_or(0);
    let [.., below, "siege"] = labels[..] else {
        return Say::NoName;
    };
    if below == "silent" {
        return Say::Silence;
    }
    if plain.is_some() && matches!(below, "fan" | "fanr") && kind == SRV {
        let target = |(i, port): (usize, &u16)| (*port, format!("t{i}.victim.siege"));
        return Say::Services(VICTIM_PORTS.iter().enumerate().map(target).collect());
    }
    if plain.is_some() || old.is_some() {
        return Say::NoName;
    }
    let at = match below {
        "home" if name == places::LISTED => vec![places.listed()],
        "away" if name == places::VERIFIED => vec![places.verified()],
        "tarpit" => vec![places.tarpit(n)],
        "evil" => vec![places.spelled(n)],
        "slow" => vec![places.slow(n)],
        "bomb" => vec![places.bomb(n)],
        "info" => vec![places.informer(n)],
        "fan" | "victim" => vec![places.victim(0)],
        "fanr" => vec![places.redirector()],
        "fana" => (0..VICTIMS).map(|i| places.victim(i)).collect(),
        domain => match (domain.strip_prefix("fresh"), domain.strip_prefix('d')) {
            (Some(k), _) => k.parse().map(|k| places.fresh(k)).into_iter().collect(),
            (_, Some(k)) => k.parse().map(|k| places.domain(k)).into_iter().collect(),
            (None, None) => vec![],
        },
    };
    match (at.is_empty(), kind) {
        (true, _) => Say::NoName,
        (false, A) => Say::Addresses(at),
        (false, _) => Say::Nothing,
    }
}

fn answer(places: Places, question: &[u8], asked: &Asked) -> Option<Vec<u8>> {
    let mut at = 12;
    let (mut name, mut last) = (String::new(), at);
    loop {
        let length = usize::from(*question.get(at)?);
        if length == 0 {
            break;
        }
        last = at;
        let label = std::str::from_utf8(question.get(at + 1..at + 1 + length)?).ok()?;
        if !name.is_empty() {
            name.push('.');
        }
        name.push_str(&label.to_ascii_lowercase());
        at += 1 + length;
    }
    let kind = u16::from_be_bytes(question.get(at + 1..at + 3)?.try_into().ok()?);
    let said = say(places, &name, kind);
    if matches!(said, Say::Silence) {
        asked.silent.fetch_add(1, Relaxed);
        return None;
    }
    asked.answered.fetch_add(1, Relaxed);
    let (mut count, mut records) = (0u16, Vec::new());
    let mut record = |kind: u16, data: &[u8]| {
        count += 1;
        records.extend([0xc0, 12]);
        records.extend(kind.to_be_bytes());
        records.extend([0, 1]);
        records.extend(TTL.to_be_bytes());
        records.extend((data.len() as u16).to_be_bytes());
        records.extend(data);
    };
    match &said {
        Say::Addresses(all) => all.iter().for_each(|ip| record(A, &ip.octets())),
        Say::Services(all) => {
            for (port, target) in all {
                let mut data = vec![0, 10, 0, 10];
                data.extend(port.to_be_bytes());
                for label in target.split('.') {
                    data.push(label.len() as u8);
                    data.extend(label.bytes());
                }
                data.push(0);
                record(SRV, &data);
            }
        }
        Say::Silence | Say::NoName | Say::Nothing => {}
    }
    let refused = if matches!(said, Say::NoName) { 3 } else { 0 };
    let mut answer = question[..2].to_vec();
    answer.extend([0x81, 0x80 | refused, 0, 1]);
    answer.extend(count.to_be_bytes());
    answer.extend(u16::from(count == 0).to_be_bytes());
    answer.extend([0, 0]);
    answer.extend(&question[12..at + 5]);
    answer.extend(records);
    if count == 0 {
        // How long a "no" holds (RFC 2308), in the name of the last label.
        answer.extend([0xc0, last as u8, 0, 6, 0, 1]);
        answer.extend(TTL.to_be_bytes());
        answer.extend([0, 22, 0, 0]);
        [1, 3600, 600, 86400, TTL].iter().for_each(|n: &u32| answer.extend(n.to_be_bytes()));
    }
    Some(answer)
}
