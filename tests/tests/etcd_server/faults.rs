//! Members die, hang and come back; answers are lost.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mirror::ids::{Guid, Term};
use mirror::witness::{Claim, WitnessAccess, WitnessError};
use rustix::process::Signal;
use tests::etcd::{Cluster, claim};

const GUEST: Guid = Guid::from_u128(1);

/// What a busy machine may add to a bound.
const SLACK: Duration = Duration::from_secs(1);

fn granted(term: u64) -> Claim {
    Claim::Granted(Term(term))
}

#[test]
fn one_member_of_three_may_die_whichever_it_is() {
    let mut cluster = Cluster::start(3);
    let witness = cluster.witness();
    let mut term = 0;
    for member in 0..3 {
        assert_eq!(claim(&*witness, GUEST, Term(term), "a"), granted(term + 1));
        cluster.kill(member);
        assert_eq!(claim(&*witness, GUEST, Term(term + 1), "a"), granted(term + 2));
        cluster.restart(member);
        term += 2;
    }
}

#[test]
fn without_a_majority_nobody_is_granted_anything_until_it_is_back() {
    let mut cluster = Cluster::start(3);
    let witness = cluster.witness();
    assert_eq!(witness.claim(GUEST, Term(0), "a").unwrap(), granted(1));
    let bound = Duration::from_millis(cluster.access().timeout_ms.into());

    cluster.kill(0);
    cluster.kill(1);
    // Also when the member that is left has noticed.
    let mut errors = Vec::new();
    while !matches!(errors.last(), Some(WitnessError::NoQuorum { .. })) {
        let asked = Instant::now();
        errors.push(witness.claim(GUEST, Term(1), "a").unwrap_err());
        assert!(asked.elapsed() < bound + SLACK, "{:?}: {}", asked.elapsed(), errors[errors.len() - 1]);
        assert!(errors.len() < 100, "{errors:?}");
    }
    let said = errors[errors.len() - 1].to_string();
    for words in ["no leader", "refused", &cluster.member(2).to_string()[5..15], "majority"] {
        assert!(said.contains(words), "{said}");
    }

    cluster.kill(2);
    let error = witness.claim(GUEST, Term(1), "a").unwrap_err();
    assert!(matches!(&error, WitnessError::Unreachable { tried, .. } if tried.0.len() == 3), "{error}");

    (0..3).for_each(|member| cluster.restart(member));
    // What "a" was never told may have been written down by the member that was its leader, and count now; then it is "a"'s.
    let answers = ["b", "a"].map(|claimant| claim(&*witness, GUEST, Term(1), claimant));
    let lost_to = |owner: &str| Claim::Refused { term: Term(2), owner: owner.into() };
    let outcomes = [[granted(2), lost_to("b")], [lost_to("a"), granted(2)]];
    assert!(outcomes.contains(&answers), "{answers:?}");
}

#[test]
fn member_that_hangs_costs_its_share_of_the_time_once() {
    let cluster = Cluster::start(3);
    let bound = Duration::from_millis(cluster.access().timeout_ms.into());
    let mut term = 0;
    for member in 0..3 {
        // The one that hangs is asked first.
        let witness = cluster.members_from(member).open(cluster.access()).unwrap();
        assert_eq!(claim(&*witness, GUEST, Term(term), "a"), granted(term + 1));
        cluster.signal(member, Signal::STOP);

        let error_or_claim = {
            let asked = Instant::now();
            let answer = witness.claim(GUEST, Term(term + 1), "a");
            assert!(asked.elapsed() < bound + SLACK, "{:?}", asked.elapsed());
            answer
        };
        // If it was the leader, the others need a moment to find a new one.
        if let Ok(answer) = error_or_claim {
            assert_eq!(answer, granted(term + 2));
        }
        assert_eq!(claim(&*witness, GUEST, Term(term + 1), "a"), granted(term + 2));
        // From now on another one is asked first.
        let asked = Instant::now();
        assert_eq!(claim(&*witness, GUEST, Term(term + 2), "a"), granted(term + 3));
        assert!(asked.elapsed() < bound / 3, "{:?}", asked.elapsed());

        cluster.signal(member, Signal::CONT);
        term += 3;
    }
}

/// Passes what it gets on to `member`, and its answers back unless they are to be lost.
fn proxy(member: &str, loses: &'static AtomicBool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let member = member.to_owned();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let upstream = TcpStream::connect(&member).unwrap();
            let (mut asks, mut forward) = (stream.try_clone().unwrap(), upstream.try_clone().unwrap());
            thread::spawn(move || drop(std::io::copy(&mut asks, &mut forward)));
            let (mut answers, mut back) = (upstream, stream);
            thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(count @ 1..) = answers.read(&mut bytes) {
                    if loses.load(Ordering::Acquire) {
                        break;
                    }
                    let _ = back.write_all(&bytes[..count]);
                }
                let _ = back.shutdown(Shutdown::Both);
            });
        }
    });
    address
}

#[test]
fn claim_whose_answer_is_lost_is_granted_on_asking_again_to_its_owner_only() {
    static LOSES: AtomicBool = AtomicBool::new(false);
    let cluster = Cluster::start(3);
    let address = cluster.member(0).to_string();
    let member = address.trim_start_matches("etcd:").trim_end_matches("/understudy");
    let proxied =
        format!("etcd:{}", proxy(member, &LOSES)).parse::<mirror::witness::WitnessAddress>().unwrap();
    let witness = proxied.open(&WitnessAccess::default()).unwrap();
    assert_eq!(witness.claim(GUEST, Term(0), "a").unwrap(), granted(1));

    LOSES.store(true, Ordering::Release);
    let error = witness.claim(GUEST, Term(1), "a").unwrap_err();
    assert!(matches!(error, WitnessError::Unreachable { .. }), "{error}");
    // It was recorded.
    let record = cluster.witness().read(GUEST).unwrap().unwrap();
    assert!(record.term == Term(2) && record.owner == "a", "{record:?}");
    LOSES.store(false, Ordering::Release);

    let refused = Claim::Refused { term: Term(2), owner: "a".into() };
    assert_eq!(cluster.witness().claim(GUEST, Term(1), "b").unwrap(), refused);
    assert_eq!(claim(&*witness, GUEST, Term(1), "a"), granted(2));
    assert_eq!(claim(&*witness, GUEST, Term(2), "a"), granted(3));
}
