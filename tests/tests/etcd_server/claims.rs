//! Who asks a healthy cluster gets what the rule says.

use std::sync::Barrier;
use std::thread;

use mirror::ids::{Guid, Term};
use mirror::witness::{Claim, Record, WitnessAccess, WitnessAddress, WitnessError};
use tests::etcd::Cluster;

const GUEST: Guid = Guid::from_u128(1);
const OTHER: Guid = Guid::from_u128(2);

fn granted(term: u64) -> Claim {
    Claim::Granted(Term(term))
}

#[test]
fn only_who_names_the_newest_term_gets_the_next() {
    let cluster = Cluster::start(3);
    let (first, second) = (cluster.witness(), cluster.witness());
    assert_eq!(first.read(GUEST).unwrap(), None);

    assert_eq!(first.claim(GUEST, Term(0), "a").unwrap(), granted(1));
    let refused = Claim::Refused { term: Term(1), owner: "a".into() };
    assert_eq!(second.claim(GUEST, Term(0), "b").unwrap(), refused);
    assert_eq!(second.claim(GUEST, Term(1), "b").unwrap(), granted(2));

    // What the first one remembers is out of date, which must not decide.
    let refused = Claim::Refused { term: Term(2), owner: "b".into() };
    assert_eq!(first.claim(GUEST, Term(1), "a").unwrap(), refused);
    assert_eq!(first.claim(GUEST, Term(0), "a").unwrap(), refused);
    let Record { guid, term, owner, .. } = first.read(GUEST).unwrap().unwrap();
    assert_eq!((guid, term, &*owner), (GUEST, Term(2), "b"));

    // Another guest's record is another record.
    assert_eq!(first.read(OTHER).unwrap(), None);
    assert_eq!(first.claim(OTHER, Term(0), "c").unwrap(), granted(1));
    assert_eq!(first.claim(GUEST, Term(2), "a").unwrap(), granted(3));
}

#[test]
fn of_many_claimants_of_one_term_exactly_one_wins_200_times() {
    const CLAIMANTS: usize = 4;
    const TERMS: u64 = 200;
    let cluster = Cluster::start(3);
    let barrier = Barrier::new(CLAIMANTS);

    let claims: Vec<Vec<Claim>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..CLAIMANTS)
            .map(|number| {
                let address = cluster.members_from(number % 3);
                let barrier = &barrier;
                scope.spawn(move || {
                    let witness = address.open(&WitnessAccess::default()).unwrap();
                    let owner = format!("side {number}");
                    let claim = |term| {
                        barrier.wait();
                        witness.claim(GUEST, Term(term), &owner).unwrap()
                    };
                    (0..TERMS).map(claim).collect()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });

    for (number, term) in (1..=TERMS).enumerate() {
        let winners: Vec<_> = (0..CLAIMANTS).filter(|&side| claims[side][number] == granted(term)).collect();
        let [winner] = winners[..] else { panic!("term {term} was granted to {winners:?}") };
        let refused = Claim::Refused { term: Term(term), owner: format!("side {winner}") };
        for (side, claims) in claims.iter().enumerate().filter(|(side, _)| *side != winner) {
            assert_eq!(claims[number], refused, "side {side}");
        }
    }
}

#[test]
fn revision_grows_even_if_the_record_is_removed_and_terms_begin_anew() {
    let cluster = Cluster::start(1);
    let witness = cluster.witness();
    let mut last = 0;
    let mut grows = |term| {
        assert_eq!(witness.claim(GUEST, Term(term), "a").unwrap(), granted(term + 1));
        let record = witness.read(GUEST).unwrap().unwrap();
        assert!(record.term == Term(term + 1) && record.revision > last, "{last} before {record:?}");
        last = record.revision;
    };
    grows(0);
    grows(1);

    cluster.etcdctl(&["del", &format!("/understudy/{GUEST}")]);

    // Nobody wins by that, before somebody begins anew.
    let refused = Claim::Refused { term: Term(0), owner: String::new() };
    assert_eq!(witness.claim(GUEST, Term(2), "a").unwrap(), refused);
    grows(0);
}

#[test]
fn record_that_is_damaged_or_of_another_guest_is_an_error_and_is_kept() {
    let cluster = Cluster::start(1);
    let prefixed = format!("{}/some/where", cluster.address());
    let prefixed: WitnessAddress = prefixed.replace("/understudy", "").parse().unwrap();
    let witness = prefixed.open(&WitnessAccess::default()).unwrap();
    let key = format!("/some/where/{GUEST}");
    assert_eq!(witness.claim(GUEST, Term(0), "a").unwrap(), granted(1));

    cluster.etcdctl(&["put", &key, "{\"guid\":"]);
    for error in [witness.claim(GUEST, Term(1), "a").unwrap_err(), witness.read(GUEST).unwrap_err()] {
        assert!(matches!(&error, WitnessError::Damaged { witness, .. } if witness.contains(&key)), "{error}");
    }
    assert_eq!(cluster.etcdctl(&["get", "--print-value-only", &key]), "{\"guid\":\n");

    let theirs = format!(r#"{{"guid": "{OTHER}", "term": 1, "owner": "a"}}"#);
    cluster.etcdctl(&["put", &key, &theirs]);
    for error in [witness.claim(GUEST, Term(1), "a").unwrap_err(), witness.read(GUEST).unwrap_err()] {
        assert!(matches!(error, WitnessError::OtherGuest { theirs: OTHER, ours: GUEST, .. }), "{error}");
    }
    assert_eq!(cluster.etcdctl(&["get", "--print-value-only", &key]), theirs + "\n");
}

#[test]
fn members_of_two_clusters_are_not_one_witness() {
    let (mut one, two) = (Cluster::start(1), Cluster::start(1));
    let both = format!("{},{}", one.address().to_string().replace("/understudy", ""), {
        let two = two.address().to_string();
        two.trim_start_matches("etcd:").to_owned()
    });
    let witness = both.parse::<WitnessAddress>().unwrap().open(&WitnessAccess::default()).unwrap();
    assert_eq!(witness.claim(GUEST, Term(0), "a").unwrap(), granted(1));

    one.kill(0);

    let error = witness.claim(GUEST, Term(0), "b").unwrap_err();
    assert!(matches!(error, WitnessError::OtherCluster { .. }), "{error}");
}
