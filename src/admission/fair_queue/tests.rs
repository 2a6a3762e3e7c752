use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn asker(class: Class, group: u64, name: u64, client: u64) -> Asker {
    Asker {
        class,
        group,
        domain: name,
        name,
        client,
    }
}

/// Takes places for one group until it has to wait.
fn fill(queue: &mut FairQueue, class: Class, group: u64) -> u32 {
    let mut taken = 0;
    for name in 0.. {
        let asker = asker(class, group, group * 1000 + name, 0);
        if let Err(ticket) = queue.acquire(&asker) {
            queue.cancel(&asker, ticket);
            break;
        }
        taken += 1;
    }
    taken
}

fn queue(total: u32) -> FairQueue {
    FairQueue::new(Places::shared(total, true, [32, 32, 4]))
}

#[test]
fn no_class_finds_the_door_shut_by_another() {
    for (greedy, others) in [
        (Class::Stranger, [Class::Listed, Class::Verified]),
        (Class::Verified, [Class::Listed, Class::Stranger]),
        (Class::Listed, [Class::Verified, Class::Stranger]),
    ] {
        let mut queue = queue(512);
        for group in 0..1000 {
            fill(&mut queue, greedy, group);
        }
        for (n, other) in (0..).zip(others) {
            let kept = queue.places.shares[other as usize] / KEPT;
            for place in 0..u64::from(kept) {
                assert!(
                    queue.acquire(&asker(other, 5000 + 100 * n + place, 10_000 + place, 0)).is_ok(),
                    "{greedy:?} shuts {other:?} out"
                );
            }
        }
    }
}

#[test]
fn what_is_given_back_goes_to_the_class_below_its_share() {
    let mut queue = queue(64);
    let hogs: Vec<_> = (0..64).map(|n| asker(Class::Stranger, n, n, 0)).collect();
    let taken = hogs.iter().take_while(|hog| queue.acquire(hog).is_ok()).count();
    let listed = asker(Class::Listed, 900, 900, 0);
    let mut have = 0;
    while queue.acquire(&listed).is_ok() {
        have += 1;
    }
    let mut names = 901..;
    for hog in &hogs[..taken] {
        let name = names.next().unwrap_or_default();
        let _ = queue.acquire(&asker(Class::Listed, name, name, 0));
        queue.release(hog);
        assert!(queue.grant_next().is_some());
        have += 1;
        if have == 32 {
            return;
        }
    }
    panic!("the listed have {have} places of 64");
}

#[test]
fn twenty_groups_that_hang_leave_some_for_the_next() {
    for class in [Class::Verified, Class::Stranger] {
        let mut queue = queue(512);
        let held: Vec<_> = (0..20).map(|group| fill(&mut queue, class, group)).collect();
        let newcomer = fill(&mut queue, class, 99);
        assert!(newcomer >= 1, "{held:?} leave {newcomer}");
        assert!(queue.acquire(&asker(Class::Listed, 100, 100, 0)).is_ok());
    }
}

#[test]
fn one_name_has_its_own_bound() {
    for (class, most) in [(Class::Listed, 32), (Class::Stranger, 4)] {
        let mut queue = queue(512);
        let one = asker(class, 1, 1, 0);
        let taken = (0..100).take_while(|_| queue.acquire(&one).is_ok()).count();
        assert!(taken <= most && taken * 10 >= most * 8, "{taken} of {most}");
    }
}

/// The order in which those who wait go on, one place at a time.
fn order(queue: &mut FairQueue, holder: &Asker, tickets: &BTreeMap<Ticket, &'static str>) -> Vec<&'static str> {
    let mut order = Vec::new();
    let mut holder = *holder;
    for _ in 0..tickets.len() {
        queue.release(&holder);
        let ticket = queue.grant_next().expect("somebody waits");
        order.push(tickets[&ticket]);
        // The name of the next holder does not matter here: all are of one name and group.
        holder.client = 0;
    }
    order
}

#[test]
fn inside_one_homeserver_turns_go_round_by_client_and_the_newest_is_first() {
    let mut queue = FairQueue::new(Places {
        total: 1,
        shares: [1, 0, 0],
        per_name: [1; 3],
        group_part: 1,
    });
    let of = |client| asker(Class::Listed, 1, 1, client);
    assert!(queue.acquire(&of(0)).is_ok());
    let mut tickets = BTreeMap::new();
    for (client, what) in [(1, "junk 1"), (1, "junk 2"), (1, "junk 3"), (2, "honest")] {
        tickets.insert(queue.acquire(&of(client)).expect_err("waits"), what);
    }
    assert_eq!(order(&mut queue, &of(0), &tickets), ["junk 3", "honest", "junk 2", "junk 1"]);
    assert_eq!(queue.waiting(), 0);
}

#[test]
fn whoever_gives_up_leaves_nothing_behind() {
    let mut queue = queue(4);
    for class in Class::ALL {
        for n in 0..1000 {
            let asker = asker(class, n, n, n);
            match queue.acquire(&asker) {
                Ok(()) => queue.release(&asker),
                Err(ticket) => queue.cancel(&asker, ticket),
            }
        }
    }
    assert_eq!(queue.waiting(), 0);
    assert!(queue.groups.is_empty() && queue.names.is_empty() && queue.held == [0; 3]);
    assert!(queue.waiting.iter().all(|queue| queue.ring.is_empty() && queue.below.is_empty()));
}

proptest! {
    /// However they come and go: the places are never overdrawn, nobody who may go on is kept waiting, all go on in the end.
    #[test]
    fn nobody_is_forgotten(total in 16_u32..60, steps in proptest::collection::vec((0_usize..3, 0_u64..6, 0_u64..4, 0_u64..3, 0_u8..3), 1..200)) {
        let mut queue = FairQueue::new(Places::shared(total, true, [8, 8, 2]));
        let (mut holding, mut waiting) = (Vec::new(), BTreeMap::new());
        let settle = |queue: &mut FairQueue, holding: &mut Vec<Asker>, waiting: &mut BTreeMap<Ticket, Asker>| {
            while let Some(ticket) = queue.grant_next() {
                holding.push(waiting.remove(&ticket).expect("known, and only once"));
            }
        };
        for (class, group, name, client, what) in steps {
            if what == 0 && !holding.is_empty() {
                let asker = holding.swap_remove(usize::try_from(group).unwrap() % holding.len());
                queue.release(&asker);
            } else if what == 1 && !waiting.is_empty() {
                let ticket = *waiting.keys().next().unwrap();
                let asker = waiting.remove(&ticket).unwrap();
                queue.cancel(&asker, ticket);
            } else {
                let asker = asker(Class::ALL[class], group, group * 10 + name, client);
                match queue.acquire(&asker) {
                    Ok(()) => holding.push(asker),
                    Err(ticket) => { waiting.insert(ticket, asker); }
                }
            }
            settle(&mut queue, &mut holding, &mut waiting);
            prop_assert!(holding.len() <= total as usize);
            prop_assert_eq!(queue.waiting(), waiting.len());
        }
        while let Some(asker) = holding.pop() {
            queue.release(&asker);
            settle(&mut queue, &mut holding, &mut waiting);
        }
        prop_assert!(waiting.is_empty(), "{} wait for ever in {total} places", waiting.len());
    }
}
