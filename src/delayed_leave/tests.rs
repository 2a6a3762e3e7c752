use super::*;
use crate::presence::Participant;

/// A hundred thousand of them are to fit into a small container: what a leave and its participant take, and what finds them.
#[test]
fn a_leave_with_its_participant_takes_600_bytes() {
    let leave = size_of::<Option<Job>>();
    let participant = size_of::<Option<Participant>>();
    // A generation and a free number each; their places in the timers, which hold twice as many at most; the tables, which are at
    // worst half full, with a byte for each place.
    let slots = 2 * 2 * size_of::<u32>();
    let timers = 2 * (size_of::<(Time, LeaveId)>() + 24);
    let tables = 2 * (size_of::<(ParticipantId, LeaveId)>() + 1 + size_of::<(u64, u32)>() + 1) + size_of::<ParticipantId>() * 2;
    let all = leave + participant + slots + timers + tables;
    eprintln!("leave {leave}, participant {participant}, slots {slots}, timers {timers}, tables {tables}: {all}");
    assert!(leave + participant <= 408 && all <= 600, "{leave} + {participant}, {all}");
}

#[test]
fn names_are_taken_apart_again() {
    let mut leaves = Leaves::new(Bounds::default(), 1);
    for (slot, (delay_id, user)) in [("d", "u"), ("", ""), ("é", "@ü:x"), ("😀", &*"u".repeat(300))]
        .into_iter()
        .enumerate()
    {
        let handover = Handover {
            user,
            homeserver: "x",
            delay_id,
            delay: Delay::MAX,
            arrived: Time::START,
            listed: true,
            as_user: false,
        };
        let participant = ParticipantId::numbered(u32::try_from(slot).unwrap());
        let Delegated::New(id) = leaves.delegate(participant, &handover, false, false, Time::START) else {
            panic!("{delay_id} {user}");
        };
        let job = leaves.get(id).unwrap();
        assert_eq!((job.delay_id(), job.user()), (delay_id, user));
    }
}
