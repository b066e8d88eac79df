//! Tests on real taps, each in a network namespace of its own.

mod tap {
    use std::time::Duration;

    use virtio_bindings::virtio_net::{
        VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ,
    };

    use super::super::*;
    use crate::metadata::tests::{Client, config as service, metadata};
    use crate::metadata::{DEFAULT_ADDRESS, MetadataVersion};
    use crate::rate_limiter::TokenBucketConfig;
    use crate::virtio::driver::Driver;
    use crate::virtio::driver::tap::{Outside, alone};

    const RECEIVE: usize = 0;
    const SEND: usize = 1;
    const CONTROL: usize = 2;
    const MAC: Mac = Mac([2, 0, 0, 0, 0, 7]);

    fn config(tap: &str) -> NetConfig {
        NetConfig {
            id: "eth0".into(),
            tap: tap.into(),
            mac: MAC,
            mtu: Some(1400),
            queue_pairs: 1,
            receive_limits: None,
            send_limits: None,
        }
    }

    const LONG: Duration = Duration::from_secs(10);
    const SHORT: Duration = Duration::from_millis(50);

    /// A frame of a kind that is left to experiments.
    fn frame(number: u8, len: usize) -> Vec<u8> {
        let mut frame = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 9], &[0x88, 0xb5]].concat();
        frame.resize(len, number);
        frame
    }

    fn with_header(frame: &[u8]) -> Vec<u8> {
        [&[0; HEADER as usize][..], frame].concat()
    }

    /// A card at its driver, the world outside, and buffers for frames.
    fn start(tap: &str, without: u64) -> (Driver, Outside) {
        let card = Net::create(&config(tap)).unwrap();
        let outside = Outside::on(tap);
        (Driver::start(Box::new(card), without), outside)
    }

    /// Lets the card look at its tap until it has used `count` buffers.
    fn await_frames(driver: &mut Driver, count: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        let until = Instant::now() + LONG;
        while used.len() < count && Instant::now() < until {
            driver.mmio.slot().ready(0);
            used.extend(driver.used(RECEIVE));
        }
        used
    }

    #[test]
    fn frames_go_out_as_they_are() {
        alone(|| {
            let (mut driver, outside) = start("card", 0);
            let sent = frame(1, 100);
            let request = driver.add(SEND, &[&with_header(&sent)[..50], &with_header(&sent)[50..]], &[]);
            driver.begin_watch();
            driver.ring(SEND);
            driver.check_changes_are_marked();
            assert_eq!(outside.receive(1, LONG), [sent]);
            assert_eq!(driver.used(SEND), [(request.head, 0)]);
        });
    }

    #[test]
    fn frames_are_counted_with_their_bytes_and_losses() {
        alone(|| {
            let (mut driver, outside) = start("card", 0);
            let DeviceCounters::Net(counters) = driver.mmio.slot().counters().clone() else { panic!() };
            driver.add(SEND, &[&with_header(&frame(1, 100))], &[]);
            // Shorter than a header.
            driver.add(SEND, &[&[0; 4]], &[]);
            driver.ring(SEND);
            driver.add(RECEIVE, &[], &[4096]);
            driver.ring(RECEIVE);
            outside.send(&frame(7, 200));
            await_frames(&mut driver, 1);
            assert_eq!((counters.sent.get(), counters.sent_bytes.get(), counters.errors.get()), (1, 112, 1));
            assert_eq!((counters.received.get(), counters.received_bytes.get()), (1, 212));
        });
    }

    #[test]
    fn frames_come_in_and_what_they_fill_is_marked_dirty() {
        alone(|| {
            let (mut driver, outside) = start("card", 0);
            let buffers: Vec<_> = (0..3).map(|_| driver.add(RECEIVE, &[], &[4096])).collect();
            driver.ring(RECEIVE);
            driver.begin_watch();
            outside.send(&frame(7, 200));
            let used = await_frames(&mut driver, 1);
            assert!(driver.check_changes_are_marked() >= 2, "the buffer and the used ring");
            assert_eq!(used, [(buffers[0].head, 212)]);
            let got = driver.read(buffers[0].writable[0].0, 212);
            assert_eq!(got[10..12], [1, 0], "it fills one buffer");
            assert_eq!(got[12..], frame(7, 200));
            assert_eq!(driver.take_interrupt(), 1);
        });
    }

    #[test]
    fn long_frame_fills_several_buffers_and_the_rest_wait_for_the_next() {
        alone(|| {
            let (mut driver, outside) = start("card", 0);
            let buffers: Vec<_> = (0..10).map(|_| driver.add(RECEIVE, &[], &[256])).collect();
            driver.ring(RECEIVE);
            outside.send(&frame(1, 1000));
            outside.send(&frame(2, 60));
            let used = await_frames(&mut driver, 5);
            let heads: Vec<_> = buffers.iter().map(|buffer| buffer.head).collect();
            assert_eq!(used.iter().map(|&(head, _)| head).collect::<Vec<_>>(), heads[..5]);
            assert_eq!(used.iter().map(|&(_, len)| len).collect::<Vec<_>>(), [256, 256, 256, 244, 72]);
            assert_eq!(driver.read(buffers[0].writable[0].0 + 10, 2), [4, 0]);
            let bytes: Vec<u8> = buffers[..4]
                .iter()
                .zip(&used)
                .flat_map(|(buffer, &(_, len))| driver.read(buffer.writable[0].0, len as usize))
                .collect();
            assert_eq!(bytes[12..], frame(1, 1000));
            assert_eq!(driver.read(buffers[4].writable[0].0, 72)[12..], frame(2, 60));
        });
    }

    #[test]
    fn frames_wait_in_the_tap_until_the_guest_gives_buffers() {
        alone(|| {
            let (mut driver, outside) = start("card", 0);
            outside.send(&frame(3, 60));
            driver.mmio.slot().ready(0);
            assert!(driver.used(RECEIVE).is_empty());
            driver.add(RECEIVE, &[], &[2048]);
            driver.ring(RECEIVE);
            assert_eq!(await_frames(&mut driver, 1).len(), 1);
        });
    }

    #[test]
    fn held_frames_leave_at_their_commit_and_in_order() {
        alone(|| {
            let (mut driver, outside) = start("card", 0);
            driver.mmio.slot().set_output(OutputPolicy::Hold);
            let send = |driver: &mut Driver, number| {
                driver.add(SEND, &[&with_header(&frame(number, 60))], &[]);
                driver.ring(SEND);
            };
            send(&mut driver, 1);
            send(&mut driver, 2);
            assert!(driver.mmio.slot().output_waits());
            driver.mmio.save(&mut crate::virtio::VirtioState::default());
            send(&mut driver, 3);
            assert!(outside.receive(1, SHORT).is_empty(), "nothing is committed");
            assert!(driver.used(SEND).is_empty());
            driver.mmio.slot().release_output();
            driver.mmio.slot().attend();
            assert_eq!(outside.receive(3, SHORT), [frame(1, 60), frame(2, 60)]);
            assert_eq!(driver.used(SEND).len(), 2);
            driver.mmio.slot().set_output(OutputPolicy::Pass);
            driver.mmio.slot().attend();
            assert_eq!(outside.receive(1, LONG), [frame(3, 60)]);
        });
    }

    #[test]
    fn successor_sends_what_was_in_flight_receives_on_and_announces_itself() {
        alone(|| {
            let (mut driver, _) = start("old", 0);
            driver.mmio.slot().set_output(OutputPolicy::Hold);
            let sent = driver.add(SEND, &[&with_header(&frame(5, 60))], &[]);
            driver.ring(SEND);
            // So many that some are taken from the queue before they are used.
            let buffers: Vec<_> = (0..50).map(|_| driver.add(RECEIVE, &[], &[1024])).collect();
            driver.ring(RECEIVE);
            driver.mmio.slot().ready(0);

            let card = Net::create(&config("new")).unwrap();
            let outside = Outside::on("new");
            outside.send(&frame(9, 60));
            let mut next = driver.fail_over(Box::new(card));
            let frames = outside.receive(2, LONG);
            assert!(frames.contains(&frame(5, 60)));
            let announcement =
                frames.iter().find(|frame| frame[12..14] == [0x80, 0x35]).expect("an announcement");
            assert_eq!(announcement[6..12], MAC.0);
            assert_eq!(next.used(SEND), [(sent.head, 0)]);
            assert!(next.used(RECEIVE).is_empty(), "what the tap held before is stale");
            outside.send(&frame(6, 60));
            assert_eq!(await_frames(&mut next, 1), [(buffers[0].head, 72)]);
            // And the driver is asked to announce its addresses.
            assert_eq!(next.config(6, 2), [3, 0]);
            assert_ne!(next.take_interrupt() & 2, 0);
            let request = next.add(CONTROL, &[&[VIRTIO_NET_CTRL_ANNOUNCE as u8, 0]], &[1]);
            next.ring(CONTROL);
            assert_eq!(next.used(CONTROL), [(request.head, 1)]);
            assert_eq!(next.read(request.writable[0].0, 1), [0]);
            assert_eq!(next.config(6, 2), [1, 0]);
        });
    }

    #[test]
    fn successor_of_a_card_whose_driver_spoils_a_frame_in_flight_needs_a_reset() {
        alone(|| {
            let (mut driver, _) = start("old", 0);
            driver.mmio.slot().set_output(OutputPolicy::Hold);
            let sent = driver.add(SEND, &[&with_header(&frame(5, 60))], &[]);
            driver.ring(SEND);
            let descriptor = driver.layout(SEND).table + 16 * u64::from(sent.head);
            driver.write(descriptor, &u64::MAX.to_le_bytes());
            let mut next = driver.fail_over(Box::new(Net::create(&config("new")).unwrap()));
            assert!(next.needs_reset());
            next.negotiate(u64::MAX);
            next.add(SEND, &[&with_header(&frame(6, 60))], &[]);
            next.ring(SEND);
            assert_eq!(next.used(SEND).len(), 1);
        });
    }

    #[test]
    fn frozen_card_neither_sends_nor_receives() {
        alone(|| {
            let (mut driver, outside) = start("card", 0);
            driver.mmio.slot().set_output(OutputPolicy::Freeze);
            driver.add(RECEIVE, &[], &[2048]);
            driver.add(SEND, &[&with_header(&frame(5, 60))], &[]);
            driver.ring(SEND);
            outside.send(&frame(6, 60));
            driver.ring(RECEIVE);
            driver.mmio.slot().ready(0);
            assert!(outside.receive(1, SHORT).is_empty());
            assert!(driver.used(RECEIVE).is_empty());
        });
    }

    #[test]
    fn control_requests_that_nobody_knows_are_refused() {
        alone(|| {
            let (mut driver, _) = start("card", 1 << VIRTIO_NET_F_GUEST_ANNOUNCE);
            for command in [&[0xff, 0][..], &[VIRTIO_NET_CTRL_MQ as u8, 0, 2, 0], &[1], &[]] {
                let request = driver.add(CONTROL, &[command], &[1]);
                driver.ring(CONTROL);
                assert_eq!(driver.used(CONTROL).len(), 1);
                assert_eq!(driver.read(request.writable[0].0, 1), [1], "{command:?}");
            }
            driver.add(CONTROL, &[&[3, 0]], &[]);
            driver.ring(CONTROL);
            assert!(driver.needs_reset(), "no room for an answer");
        });
    }

    #[test]
    fn several_queues_work_where_the_driver_wants_them() {
        alone(|| {
            let card = Net::create(&NetConfig { queue_pairs: 2, ..config("card") }).unwrap();
            let outside = Outside::on("card");
            let mut driver = Driver::start(Box::new(card), 0);
            assert_ne!(driver.offered() & 1 << VIRTIO_NET_F_MQ, 0);
            let request = driver.add(4, &[&[VIRTIO_NET_CTRL_MQ as u8, 0, 2, 0]], &[1]);
            driver.ring(4);
            assert_eq!(driver.read(request.writable[0].0, 1), [0]);
            driver.add(3, &[&with_header(&frame(8, 60))], &[]);
            driver.ring(3);
            assert_eq!(outside.receive(1, LONG), [frame(8, 60)]);
        });
    }

    #[test]
    fn card_has_a_queue_for_each_processor_if_its_tap_takes_several_readers() {
        alone(|| {
            assert_eq!(queue_pairs("card", 2), 1, "there is no such tap");
            assert_eq!(queue_pairs("no\0name", 2), 1);
            let several = Tap::open("card", true).unwrap();
            assert_eq!(queue_pairs("card", 1), 1);
            assert_eq!(queue_pairs("card", 2), 2);
            assert_eq!(queue_pairs("card", 32), MAX_QUEUE_PAIRS);
            drop(several);
            let _one = Tap::open("card", false).unwrap();
            assert_eq!(queue_pairs("card", 2), 1);
        });
    }

    #[test]
    fn frames_that_cannot_be_sent_are_lost_and_the_next_is_not() {
        alone(|| {
            let (mut driver, outside) = start("card", 0);
            driver.add(SEND, &[&[0; 5]], &[]);
            let mut lying = with_header(&frame(1, 60));
            lying[..12].fill(0xff);
            driver.add(SEND, &[&lying], &[]);
            driver.add(SEND, &[&with_header(&frame(2, 60))], &[]);
            driver.ring(SEND);
            assert_eq!(driver.used(SEND).len(), 3);
            assert_eq!(outside.receive(1, LONG), [frame(2, 60)]);
        });
    }

    #[test]
    fn limits_delay_frames_and_lose_none() {
        alone(|| {
            let ops = Some(TokenBucketConfig { size: 2, one_time_burst: 0, refill_time: 100 });
            let limits = Some(RateLimiterConfig { bandwidth: None, ops });
            let card = Net::create(&NetConfig { send_limits: limits, ..config("card") }).unwrap();
            let outside = Outside::on("card");
            let mut driver = Driver::start(Box::new(card), 0);
            for number in 0..4 {
                driver.add(SEND, &[&with_header(&frame(number, 60))], &[]);
            }
            let start = Instant::now();
            driver.ring(SEND);
            assert_eq!(driver.used(SEND).len(), 2);
            let timer = driver.mmio.slot().sources().len() - 1;
            let mut late = 0;
            while late < 2 {
                driver.mmio.slot().ready(timer);
                late += driver.used(SEND).len();
                assert!(start.elapsed() < LONG);
            }
            assert!(start.elapsed() > Duration::from_millis(50));
            assert_eq!(outside.receive(4, LONG).len(), 4);
        });
    }

    #[test]
    fn limits_that_were_changed_hold_and_go_along_with_the_guest() {
        alone(|| {
            let one = TokenBucketConfig { size: 1, one_time_burst: 0, refill_time: 1 << 40 };
            let change = RateLimiterConfig { bandwidth: None, ops: Some(one) };
            let (mut driver, outside) = start("card", 0);
            let update = |card: &mut Net| card.update_limits(&RateLimiterConfig::default(), &change);
            driver.mmio.slot().with_device(update).unwrap();
            let send = |driver: &mut Driver, number| {
                driver.add(SEND, &[&with_header(&frame(number, 60))], &[]);
                driver.ring(SEND);
            };
            send(&mut driver, 1);
            send(&mut driver, 2);
            assert_eq!(outside.receive(1, LONG), [frame(1, 60)]);
            assert_eq!(driver.used(SEND).len(), 1, "the second waits for years");

            let successor = Net::create(&config("other")).unwrap();
            let outside = Outside::on("other");
            let mut next = driver.fail_over(Box::new(successor));
            send(&mut next, 3);
            assert_eq!(next.used(SEND).len(), 1, "the one that waited; the next waits for years");
            let seen = outside.receive(1, LONG);
            assert!(seen.contains(&frame(2, 60)) || seen.len() == 1, "{seen:?}");
        });
    }

    #[test]
    fn taps_that_cannot_be_had_are_refused_with_a_remedy() {
        alone(|| {
            let error = |config: &NetConfig| Net::create(config).err().unwrap().to_string();
            assert!(error(&config("a name that is too long")).contains("1 to 15 characters"));
            let _first = Net::create(&config("card")).unwrap();
            assert!(error(&config("card")).contains("another process uses it"), "{}", error(&config("card")));
        });
    }

    /// A card with the metadata service on it.
    fn card_with_service(tap: &str, metadata: &Metadata) -> Net {
        let mut card = Net::create(&config(tap)).unwrap();
        card.serve_metadata(metadata, &service(MetadataVersion::V1), true).unwrap();
        card
    }

    /// The client's frames leave by the driver's queue, and come back in its buffers.
    struct Guest {
        driver: Driver,
        client: Client,
        buffers: Vec<(u16, u64)>,
    }

    impl Guest {
        fn new(driver: Driver, number: u16) -> Self {
            let mut guest = Self { driver, client: Client::new(number), buffers: Vec::new() };
            for _ in 0..64 {
                // So short that an answer needs several.
                let buffer = guest.driver.add(RECEIVE, &[], &[200]);
                guest.buffers.push((buffer.head, buffer.writable[0].0));
            }
            guest.driver.ring(RECEIVE);
            guest
        }

        fn turn(&mut self) {
            let mut frames: Vec<Vec<u8>> = Vec::new();
            let mut more = 0;
            for (head, len) in self.driver.used(RECEIVE) {
                let address = self.buffers.iter().find(|buffer| buffer.0 == head).unwrap().1;
                let bytes = self.driver.read(address, len as usize);
                if more == 0 {
                    more = u16::from_le_bytes([bytes[10], bytes[11]]);
                    frames.push(bytes[HEADER as usize..].to_vec());
                } else {
                    frames.last_mut().unwrap().extend(bytes);
                }
                more -= 1;
                self.driver.make_available(RECEIVE, head);
            }
            self.driver.ring(RECEIVE);
            for frame in self.client.turn(frames) {
                self.driver.add(SEND, &[&with_header(&frame)], &[]);
                self.driver.ring(SEND);
                assert_eq!(self.driver.used(SEND).len(), 1, "it is not held");
            }
        }

        fn until(&mut self, done: impl Fn(&Client) -> bool) {
            let until = Instant::now() + LONG;
            while !done(&self.client) {
                assert!(Instant::now() < until, "{}", self.client.answer());
                self.turn();
            }
        }

        fn ask(&mut self) -> String {
            self.until(Client::is_open);
            self.client.say("GET /latest/meta-data/ami-id HTTP/1.0\r\n\r\n");
            self.until(Client::is_over);
            self.client.answer()
        }
    }

    #[test]
    fn guest_reads_metadata_at_once_under_any_policy_and_nobody_outside_sees_it() {
        alone(|| {
            let card = card_with_service("card", &metadata());
            let outside = Outside::on("card");
            let driver = Driver::start(Box::new(card), 0);
            driver.mmio.slot().set_output(OutputPolicy::Hold);
            let mut guest = Guest::new(driver, 1);
            assert!(guest.ask().ends_with("\r\n\r\nami-1"));
            assert!(!guest.driver.mmio.slot().output_waits());
            assert!(guest.driver.check_changes_are_marked() > 0);
            guest.driver.mmio.slot().set_output(OutputPolicy::Pass);
            guest.driver.mmio.slot().attend();
            // What is for somebody else goes its way.
            let mut other = frame(1, 60);
            other[12..14].copy_from_slice(&[8, 0]);
            guest.driver.add(SEND, &[&with_header(&other)], &[]);
            guest.driver.ring(SEND);
            assert_eq!(outside.receive(2, SHORT), [other]);
        });
    }

    #[test]
    fn guest_asks_who_has_the_address_and_a_card_without_the_service_asks_outside() {
        alone(|| {
            let mut request = frame(0, 60);
            request[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
            request[28..32].copy_from_slice(&[10, 0, 0, 2]);
            request[38..42].copy_from_slice(&DEFAULT_ADDRESS.octets());
            let ask = |driver: &mut Driver| {
                let buffer = driver.add(RECEIVE, &[], &[2048]);
                driver.ring(RECEIVE);
                driver.add(SEND, &[&with_header(&request)], &[]);
                driver.ring(SEND);
                let used = driver.used(RECEIVE);
                used.first().map(|&(_, len)| driver.read(buffer.writable[0].0 + 12, len as usize - 12))
            };
            let mut driver = Driver::start(Box::new(card_with_service("card", &metadata())), 0);
            let answer = ask(&mut driver).expect("an answer");
            assert_eq!(answer[..6], request[6..12]);
            assert_eq!(answer[20..22], [0, 2], "it is a reply");
            assert_eq!(answer[28..32], DEFAULT_ADDRESS.octets());
            assert_eq!(answer[38..42], [10, 0, 0, 2]);

            let (mut driver, outside) = start("plain", 0);
            assert_eq!(ask(&mut driver), None);
            assert_eq!(outside.receive(1, LONG), [request.clone()]);
        });
    }

    #[test]
    fn successor_tells_the_same_metadata_and_resets_the_connections_under_way() {
        alone(|| {
            let driver = Driver::start(Box::new(card_with_service("old", &metadata())), 0);
            let mut guest = Guest::new(driver, 1);
            guest.until(Client::is_open);
            let Guest { driver, client, buffers } = guest;
            let driver = driver.fail_over(Box::new(card_with_service("new", &Metadata::default())));
            let mut guest = Guest { driver, client, buffers };
            guest.until(|client| !client.is_open());
            guest.client = Client::new(2);
            assert!(guest.ask().ends_with("\r\n\r\nami-1"));
        });
    }

    #[test]
    fn state_of_a_card_with_the_service_is_none_of_one_without() {
        alone(|| {
            let driver = Driver::start(Box::new(card_with_service("old", &metadata())), 0);
            let mut state = crate::virtio::VirtioState::default();
            let mut driver = driver;
            driver.mmio.save(&mut state);
            let mut plain = driver.replace(|| Box::new(Net::create(&config("new")).unwrap()));
            let error = plain.mmio.restore(&state).unwrap_err().to_string();
            assert!(error.contains("its metadata service is another"), "{error}");
        });
    }
}
