//! What the protocol shared by guests and host promises.

use proptest::prelude::*;
use resources::protocol::{
    Address, BadParameter, Content, Counter, ExpectedCounter, Key, Line, PAGE_WORDS, Page, Params, Pattern,
    check_page, fill_page, generation_of,
};

const CONTENTS: [Content; 4] = [Content::Zero, Content::Const, Content::Text, Content::Random];

fn page_of(cpu: u32, index: u64, generation: u32, content: Content) -> Page {
    let mut page = [0; PAGE_WORDS];
    fill_page(&mut page, cpu, index, generation, content);
    page
}

fn any_line() -> impl Strategy<Value = Line> {
    let cpu = 0..32u32;
    prop_oneof![
        (cpu.clone(), any::<u32>(), any::<u64>()).prop_map(|(cpu, cpus, pages)| Line::Ready {
            cpu,
            cpus,
            pages
        }),
        (cpu.clone(), any::<u64>(), any::<u64>()).prop_map(|(cpu, n, sum)| Line::Count { cpu, n, sum }),
        (cpu.clone(), any::<[u64; 4]>()).prop_map(|(cpu, [pass, pages, wrong, written])| Line::Verify {
            cpu,
            pass,
            pages,
            wrong,
            written
        }),
        (cpu, any::<u64>(), any::<[u32; 2]>()).prop_map(|(cpu, page, [want, found])| Line::Wrong {
            cpu,
            page,
            want,
            found
        }),
        any::<u8>().prop_map(|code| Line::Exit { code }),
        Just(Line::Error { key: Key::DirtySet }),
        (any::<u8>(), any::<[u64; 3]>()).prop_map(|(vector, [rip, err, cr2])| Line::Panic {
            vector,
            rip,
            err,
            cr2
        }),
    ]
}

proptest! {
    #[test]
    fn a_written_line_is_read_back_the_same(line in any_line()) {
        let encoded = line.encode();
        let text = std::str::from_utf8(encoded.as_bytes()).unwrap();
        prop_assert!(text.is_ascii() && text.ends_with('\n'));
        prop_assert_eq!(Line::parse(text), Some(line));
        prop_assert_eq!(Line::parse(text.trim_end()), Some(line));
    }

    #[test]
    fn a_count_line_that_was_cut_is_refused(n in any::<u64>(), sum in any::<u64>(), cut in 1..40usize) {
        let encoded = Line::Count { cpu: 0, n, sum }.encode();
        let text = std::str::from_utf8(encoded.as_bytes()).unwrap().trim_end();
        let kept = text.len().saturating_sub(cut);
        prop_assert_eq!(Line::parse(&text[..kept]), None);
    }

    #[test]
    fn no_text_makes_the_parsers_panic(text in "(ready|count|verify|wrong|exit|error|panic)?[ -~]{0,80}") {
        let _ = Line::parse(&text);
        let _ = Params::parse(&text);
    }

    #[test]
    fn a_page_mixed_of_two_generations_is_found_at_any_seam(
        cpu in 0..32u32,
        index in 0..1_000_000u64,
        first in 1..1_000_000u32,
        distance in 1..60_000u32,
        seam in 1..PAGE_WORDS,
    ) {
        for content in CONTENTS {
            let old = page_of(cpu, index, first, content);
            let new = page_of(cpu, index, first + distance, content);
            let mut mixed = old;
            mixed[seam..].copy_from_slice(&new[seam..]);
            if mixed == old {
                // Only zero content is the same from some word on.
                prop_assert_eq!(content, Content::Zero);
                continue;
            }
            prop_assert!(!check_page(&mixed, cpu, index, first, content), "{content:?} {seam}");
            prop_assert!(!check_page(&mixed, cpu, index, first + distance, content), "{content:?} {seam}");
        }
    }
}

#[test]
fn lines_look_as_documented() {
    let samples = [
        "ready cpu=0 cpus=2 pages=49152",
        "count cpu=0 n=123 sum=0123456789abcdef",
        "verify cpu=0 pass=4 pages=24576 wrong=0 written=123456",
        "wrong cpu=0 page=17 want=5 found=4",
        "exit code=0",
        "error key=dirty.set",
        "panic vector=14 rip=0000000000100000 err=0000000000000002 cr2=00000000deadbeef",
    ];
    for sample in samples {
        let line = Line::parse(sample).unwrap_or_else(|| panic!("not understood: {sample}"));
        assert_eq!(line.encode().as_bytes(), format!("{sample}\n").as_bytes());
    }
}

#[test]
fn a_line_that_no_guest_writes_is_refused() {
    let samples = [
        "",
        "count",
        "count ",
        "count cpu=0 n=+1 sum=0123456789abcdef",
        "count cpu=0 n=01 sum=0123456789abcdef",
        "count cpu=0 n=1 sum=123456789abcdef",
        "count cpu=0 n=1 sum=0123456789ABCDEF",
        "count cpu=32 n=1 sum=0123456789abcdef",
        "count cpu=0 n=1 sum=0123456789abcdef ",
        "count cpu=0 n=1 sum=0123456789abcdef x=1",
        "count n=1 cpu=0 sum=0123456789abcdef",
        "exit code=256",
        "wrong cpu=0 page=1 want=4294967296 found=1",
    ];
    for sample in samples {
        assert_eq!(Line::parse(sample), None, "accepted: {sample:?}");
    }
}

#[test]
fn a_page_of_each_content_passes_its_own_check_and_no_other() {
    for content in CONTENTS {
        let page = page_of(3, 77, 5, content);
        assert!(check_page(&page, 3, 77, 5, content));
        assert_eq!(generation_of(&page), 5);
        assert!(!check_page(&page, 3, 77, 6, content), "{content:?}: other generation");
        assert!(!check_page(&page, 3, 78, 5, content), "{content:?}: other page");
        assert!(!check_page(&page, 2, 77, 5, content), "{content:?}: other cpu");
    }
}

#[test]
fn a_single_flipped_bit_is_found_wherever_it_is() {
    for content in CONTENTS {
        let mut page = page_of(0, 1, 1, content);
        for word in 0..PAGE_WORDS {
            page[word] ^= 1 << (word % 64);
            assert!(!check_page(&page, 0, 1, 1, content), "{content:?} word {word}");
            page[word] ^= 1 << (word % 64);
        }
        assert!(check_page(&page, 0, 1, 1, content));
    }
}

#[test]
fn every_word_of_a_page_changes_with_the_generation() {
    for content in [Content::Const, Content::Text, Content::Random] {
        for generation in 1..300 {
            let (old, new) = (page_of(1, 9, generation, content), page_of(1, 9, generation + 1, content));
            let same = (0..PAGE_WORDS).filter(|word| old[*word] == new[*word]).count();
            assert_eq!(same, 0, "{content:?} generation {generation}");
        }
    }
}

#[test]
fn text_is_printable() {
    let page = page_of(0, 4, 9, Content::Text);
    let body: Vec<u8> = page[2..].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert!(body.iter().all(|byte| byte.is_ascii_graphic() || matches!(byte, b' ' | b'\n')));
}

#[test]
fn the_cheap_sum_equals_the_sum_over_the_whole_state() {
    let mut counter = Counter::blank();
    counter.reset(2, 42);
    let mut expected = ExpectedCounter::new(2, 42);
    for step in 1..=10_000 {
        let n = counter.advance();
        assert_eq!((n, counter.sum()), expected.advance(), "at step {step}");
        assert_eq!(n, step);
    }
}

#[test]
fn counters_of_other_cpus_and_seeds_give_other_sums() {
    let first = |cpu, seed| ExpectedCounter::new(cpu, seed).advance().1;
    assert_ne!(first(0, 0), first(1, 0));
    assert_ne!(first(0, 0), first(0, 1));
}

#[test]
fn parameters_not_given_have_their_defaults() {
    assert_eq!(Params::parse("console=ttyS0 quiet reboot=k").unwrap(), Params::default());
    let params = Params::default();
    assert!(params.count && !params.dirty && !params.verify);
    assert_eq!((params.cpus, params.count_rate, params.dirty_rate), (1, 50, 1000));
}

#[test]
fn each_parameter_is_read() {
    let params = Params::parse(
        "workload=dirty,verify cpus=4 count.rate=7 count.limit=9 dirty.rate=20000 dirty.set=64 \
         dirty.pattern=hotcold dirty.content=text seed=11 \
         net.ip=10.0.0.2/24 net.port=80 net.spin=0",
    )
    .unwrap();
    let expected = Params {
        count: false,
        dirty: true,
        verify: true,
        cpus: 4,
        count_rate: 7,
        count_limit: Some(9),
        dirty_rate: 20000,
        dirty_set_mib: Some(64),
        pattern: Pattern::HotCold,
        content: Content::Text,
        seed: 11,
        net_ip: Some(Address { bytes: [10, 0, 0, 2], prefix: 24 }),
        net_port: 80,
        net_spin_us: 0,
    };
    assert_eq!(params, expected);
}

#[test]
fn a_value_that_cannot_be_honoured_is_named() {
    let cases = [
        ("workload=count,sleep", Key::Workload),
        ("workload=", Key::Workload),
        ("cpus=0", Key::Cpus),
        ("cpus=33", Key::Cpus),
        ("cpus=-1", Key::Cpus),
        ("count.rate=0", Key::CountRate),
        ("dirty.rate=+5", Key::DirtyRate),
        ("dirty.set=99999999999999999999", Key::DirtySet),
        ("dirty.pattern=spiral", Key::DirtyPattern),
        ("seed=", Key::Seed),
        ("net.ip=10.0.0.2", Key::NetIp),
        ("net.ip=10.0.0/8", Key::NetIp),
        ("net.ip=10.0.0.2.3/8", Key::NetIp),
        ("net.ip=10.0.0.256/8", Key::NetIp),
        ("net.ip=10.0.0.2/33", Key::NetIp),
        ("net.port=65536", Key::NetPort),
        ("net.spin=1000001", Key::NetSpin),
    ];
    for (command_line, key) in cases {
        assert_eq!(Params::parse(command_line), Err(BadParameter(key)), "{command_line}");
    }
}
