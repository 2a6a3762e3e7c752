//! A DNS server (UDP and TCP) with a scripted zone, which remembers every question.
//!
//! The service asks it when started with [`Dns::serving`]. What the zone does not hold does not exist.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use hickory_resolver::proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_resolver::proto::rr::rdata::{CNAME, SOA, SRV};
use hickory_resolver::proto::rr::{Name, RData, Record};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::AbortHandle;

pub(crate) use hickory_resolver::proto::rr::RecordType as Kind;

use super::service::Setup;
use super::{runtime, unique_loopback};

/// What to say to a question.
#[derive(Clone, Debug)]
pub(crate) enum Say {
    /// These records; none of them means that the name exists and has no such record.
    Records(Vec<RData>),
    /// NXDOMAIN.
    NoName,
    /// SERVFAIL.
    Broken,
    /// Nothing, ever.
    Silence,
    /// Over UDP an empty answer marked as cut, over TCP these records.
    Cut(Vec<RData>),
}

impl Say {
    /// A and AAAA records, by family.
    pub(crate) fn at(address: IpAddr) -> Self {
        Self::Records(vec![data(address)])
    }
}

/// A question as it arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    /// In lower case, without the last dot.
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) tcp: bool,
}

#[derive(Default)]
struct State {
    /// Each question takes the next answer, the last one stays.
    zone: Mutex<HashMap<(String, Kind), Vec<Say>>>,
    asked: Mutex<Vec<Question>>,
    ttl: AtomicU32,
}

/// The server. Dropping it closes its sockets.
pub(crate) struct Dns {
    address: SocketAddr,
    state: Arc<State>,
    tasks: [AbortHandle; 2],
}

impl Dns {
    pub(crate) fn start() -> Self {
        Self::at(SocketAddr::new(unique_loopback().into(), 0))
    }

    pub(crate) fn at(address: SocketAddr) -> Self {
        let state = Arc::new(State::default());
        state.ttl.store(300, Relaxed);
        let (udp, tcp) = runtime().block_on(async {
            let udp = UdpSocket::bind(address).await.expect("a UDP port");
            let tcp = TcpListener::bind(udp.local_addr().expect("address"))
                .await
                .expect("the same TCP port");
            (udp, tcp)
        });
        let address = udp.local_addr().expect("address");
        let tasks = [
            runtime().spawn(over_udp(state.clone(), udp)).abort_handle(),
            runtime().spawn(over_tcp(state.clone(), tcp)).abort_handle(),
        ];
        Self { address, state, tasks }
    }

    /// A service that asks this server.
    pub(crate) fn serving(&self, setup: Setup) -> Setup {
        setup.env("LIVEKIT_DNS_SERVERS", &self.address.to_string())
    }

    /// Life of all records from now on, in seconds.
    pub(crate) fn ttl(&self, seconds: u32) {
        self.state.ttl.store(seconds, Relaxed);
    }

    /// What to answer, in turn; the last answer stays. `*.name` stands for every name below it that is not in the zone.
    pub(crate) fn script(&self, name: &str, kind: Kind, answers: impl Into<Vec<Say>>) {
        self.state.zone.lock().unwrap().insert((name.to_lowercase(), kind), answers.into());
    }

    /// The addresses of a name, of both families.
    pub(crate) fn address(&self, name: &str, addresses: &[IpAddr]) {
        let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = addresses.iter().partition(|a| a.is_ipv4());
        for (kind, addresses) in [(Kind::A, v4), (Kind::AAAA, v6)] {
            if !addresses.is_empty() {
                self.script(name, kind, [Say::Records(addresses.into_iter().map(data).collect())]);
            }
        }
    }

    /// Records of priority, weight, port and target; the target `.` is the root.
    pub(crate) fn srv(&self, service: &str, targets: &[(u16, u16, u16, &str)]) {
        self.script(
            service,
            Kind::SRV,
            [Say::Records(
                targets
                    .iter()
                    .map(|&(priority, weight, port, target)| RData::SRV(SRV::new(priority, weight, port, absolute(target))))
                    .collect(),
            )],
        );
    }

    pub(crate) fn cname(&self, name: &str, target: &str) {
        self.script(name, Kind::CNAME, [Say::Records(vec![RData::CNAME(CNAME(absolute(target)))])]);
    }

    pub(crate) fn questions(&self) -> Vec<Question> {
        self.state.asked.lock().unwrap().clone()
    }

    /// How often this was asked.
    pub(crate) fn asked(&self, name: &str, kind: Kind) -> usize {
        let asked = self.state.asked.lock().unwrap();
        asked.iter().filter(|q| q.name == name && q.kind == kind).count()
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

fn data(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(v4) => RData::A(v4.into()),
        IpAddr::V6(v6) => RData::AAAA(v6.into()),
    }
}

fn absolute(name: &str) -> Name {
    let mut name = Name::from_ascii(name).expect("a DNS name");
    name.set_fqdn(true);
    name
}

impl State {
    fn say(&self, name: &str, kind: Kind) -> Say {
        let mut zone = self.zone.lock().unwrap();
        if let Some(said) = next(&mut zone, name, kind) {
            return said;
        }
        let below = format!(".{name}");
        if zone.keys().any(|(n, _)| n == name || (n.ends_with(&below) && !n.starts_with('*'))) {
            return Say::Records(vec![]);
        }
        let mut parent = name;
        while let Some((_, rest)) = parent.split_once('.') {
            parent = rest;
            let wildcard = format!("*.{parent}");
            if let Some(said) = next(&mut zone, &wildcard, kind) {
                return said;
            }
            if zone.keys().any(|(n, _)| *n == wildcard) {
                return Say::Records(vec![]);
            }
        }
        Say::NoName
    }

    fn answer(&self, bytes: &[u8], tcp: bool) -> Option<Vec<u8>> {
        let asked = Message::from_vec(bytes).ok()?;
        let query = asked.queries.first()?.clone();
        let name = query.name().to_ascii().trim_end_matches('.').to_lowercase();
        let kind = query.query_type();
        self.asked.lock().unwrap().push(Question {
            name: name.clone(),
            kind,
            tcp,
        });
        let mut answer = Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
        answer.metadata.recursion_desired = true;
        answer.metadata.recursion_available = true;
        let said = self.say(&name, kind);
        match said {
            Say::Silence => return None,
            Say::Broken => answer.metadata.response_code = ResponseCode::ServFail,
            Say::NoName => {
                answer.metadata.response_code = ResponseCode::NXDomain;
                self.add_soa(&mut answer);
            }
            Say::Cut(_) if !tcp => answer.metadata.truncation = true,
            Say::Cut(records) | Say::Records(records) => self.add(&mut answer, &query, records),
        }
        answer.add_query(query);
        Some(answer.to_vec().expect("an answer that fits"))
    }

    /// The records, or the alias of the name with the records of what it stands for.
    fn add(&self, answer: &mut Message, query: &Query, records: Vec<RData>) {
        let ttl = self.ttl.load(Relaxed);
        let mut owner = query.name().clone();
        let mut records = records;
        for _ in 0..4 {
            if !records.is_empty() || query.query_type() == Kind::CNAME {
                break;
            }
            let plain = owner.to_ascii().trim_end_matches('.').to_lowercase();
            let Say::Records(alias) = self.say(&plain, Kind::CNAME) else {
                break;
            };
            let Some(RData::CNAME(CNAME(target))) = alias.first().cloned() else {
                break;
            };
            answer.add_answer(Record::from_rdata(owner, ttl, RData::CNAME(CNAME(target.clone()))));
            let plain = target.to_ascii().trim_end_matches('.').to_lowercase();
            owner = target;
            if let Say::Records(found) = self.say(&plain, query.query_type()) {
                records = found;
            }
        }
        if records.is_empty() {
            self.add_soa(answer);
        }
        answer.add_answers(records.into_iter().map(|data| Record::from_rdata(owner.clone(), ttl, data)));
    }

    /// Says how long a "no" holds (RFC 2308).
    fn add_soa(&self, answer: &mut Message) {
        let ttl = self.ttl.load(Relaxed);
        let name = absolute("example.org");
        let soa = SOA::new(name.clone(), name.clone(), 1, 3600, 600, 86400, ttl);
        answer.add_authority(Record::from_rdata(name, ttl, RData::SOA(soa)));
    }
}

fn next(zone: &mut HashMap<(String, Kind), Vec<Say>>, name: &str, kind: Kind) -> Option<Say> {
    let answers = zone.get_mut(&(name.to_owned(), kind))?;
    if answers.len() > 1 {
        Some(answers.remove(0))
    } else {
        answers.first().cloned()
    }
}

async fn over_udp(state: Arc<State>, socket: UdpSocket) {
    let mut buffer = [0; 4096];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut buffer).await
            && let Some(answer) = state.answer(&buffer[..length], false)
        {
            let _ = socket.send_to(&answer, from).await;
        }
    }
}

async fn over_tcp(state: Arc<State>, listener: TcpListener) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            let state = state.clone();
            tokio::spawn(async move {
                let _ = talk(&state, stream).await;
            });
        }
    }
}

async fn talk(state: &State, mut stream: TcpStream) -> std::io::Result<()> {
    loop {
        let length = stream.read_u16().await?;
        let mut question = vec![0; length.into()];
        stream.read_exact(&mut question).await?;
        if let Some(answer) = state.answer(&question, true) {
            stream.write_u16(answer.len() as u16).await?;
            stream.write_all(&answer).await?;
        }
    }
}
