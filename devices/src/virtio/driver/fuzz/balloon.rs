//! A balloon as a subject.

use std::sync::{Arc, Mutex};

use super::input::Input;
use super::{Driver, Subject};
use crate::virtio::balloon::{Balloon, BalloonConfig, Discard};
use crate::virtio::{DeviceState, VirtioDevice};

/// Notes the last pages that were given back.
#[derive(Clone, Default)]
struct Given(Arc<Mutex<Option<(u64, u64)>>>);

impl Discard for Given {
    fn discard(&mut self, start: u64, len: u64) {
        assert!(start.is_multiple_of(4096) && len.is_multiple_of(4096) && len > 0);
        *self.0.lock().unwrap() = Some((start, len));
    }
}

/// A balloon with all that it can do.
#[derive(Default)]
pub struct BalloonSubject(Given);

impl Subject for BalloonSubject {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let config = BalloonConfig {
            amount_mib: 1,
            deflate_on_oom: true,
            statistics_interval_s: 1,
            free_page_reporting: true,
        };
        Box::new(Balloon::create(&config, Box::new(self.0.clone())).unwrap())
    }

    fn request(&mut self, queue: usize, choices: &mut Input<'_>) -> (Vec<Vec<u8>>, Vec<usize>) {
        match queue {
            0 | 1 => {
                let count = 1 + choices.below(255);
                let first = choices.double();
                let number = |index: usize| first.wrapping_add(index as u32 * 3 / 2).to_le_bytes();
                (vec![(0..count).flat_map(number).collect()], Vec::new())
            }
            2 => {
                let count = choices.below(20);
                (
                    vec![(0..count).flat_map(|tag| [tag as u8, 0, 1, 2, 3, 4, 5, 6, 7, 8]).collect()],
                    Vec::new(),
                )
            }
            _ => (Vec::new(), vec![4096 * choices.below(20), 4096]),
        }
    }

    fn in_flight(&self, state: &DeviceState, queue: usize) -> usize {
        let DeviceState::Balloon(state) = state else { panic!("another device's state: {state:?}") };
        usize::from(queue == 2 && state.statistics.is_some())
    }

    fn kept(&self, queue: usize) -> u16 {
        // The statistics are given back when new ones are wanted.
        u16::from(queue == 2)
    }

    fn prove(&mut self, driver: &mut Driver) {
        let request = driver.add(0, &[&7_u32.to_le_bytes()], &[]);
        driver.ring(0);
        assert_eq!(driver.used(0), [(request.head, 0)]);
        assert_eq!(self.0.0.lock().unwrap().take(), Some((7 * 4096, 4096)));
        let reported = driver.add_chain(3, &[(0x10_0000, 0x2000, 2)]);
        driver.ring(3);
        assert_eq!(driver.used(3), [(reported, 0)]);
        assert_eq!(self.0.0.lock().unwrap().take(), Some((0x10_0000, 0x2000)));
    }
}
