//! Random schedules: who moves when comes from a seed, what goes wrong is a list that proptest can make shorter.

use std::time::Duration;

use mirror::ids::Epoch;
use proptest::collection::vec;
use proptest::prelude::*;

use super::Side;
use super::guest::{LIVES, mix};
use super::witness::Reach;
use super::world::{Move, Outcome, World};

/// Something that goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// A side is killed; so many of its frames still arrive; its kernel closes the link or not.
    Kill(Side, usize, bool),
    /// A side stands still for so many milliseconds.
    Stop(Side, u64),
    /// What is sent to this side vanishes from now on.
    Cut(Side),
    /// What is sent to this side arrives again.
    Mend(Side),
    /// Frame `1` on its way to this side is lost.
    Drop(Side, usize),
    /// Frame `1` on its way to this side comes twice.
    Duplicate(Side, usize),
    /// Frames `1` and `2` on their way to this side change places.
    Swap(Side, usize, usize),
    /// Bit `2` of frame `1` on its way to this side is flipped.
    Flip(Side, usize, usize),
    /// Nothing arrives at this side for so many milliseconds.
    Delay(Side, u64),
    /// This side notices that its link is broken.
    Break(Side),
    /// This side notices no time for so many milliseconds.
    Timeless(Side, u64),
    /// The witness can be reached otherwise.
    Witness(Reach),
    /// The clock jumps.
    Jump(u64),
    /// What is sent on the second link vanishes from now on, or arrives again.
    SecondLink(bool),
    /// Not a fault: an operator asks for a switchover.
    Switchover,
    /// Not a fault: an operator wants no standby any longer.
    Detach,
}

/// A schedule: everything that happens follows from it.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Who moves when.
    pub seed: u64,
    /// The schedule begins when the guest is protected; otherwise with two processes that know nothing.
    pub protected: bool,
    /// Random moves before all faults end.
    pub moves: u16,
    /// Step after which the guest ends.
    pub ends_after: u64,
    /// What the final pause of seeding may cost, in microseconds.
    pub pause_budget_us: u64,
    /// Whether there is a witness.
    pub witness: bool,
    /// Whether there is a second link.
    pub second_link: bool,
    /// What goes wrong, and after how many thousandths of the moves.
    pub faults: Vec<(u16, Fault)>,
    /// What goes wrong when the live side mirrors its guest anew, and anew.
    pub later: Vec<Vec<(u16, Fault)>>,
}

fn side() -> impl Strategy<Value = Side> {
    prop_oneof![Just(Side::Primary), Just(Side::Standby)]
}

fn fault() -> impl Strategy<Value = Fault> {
    let frame = 0_usize..6;
    let reach = prop_oneof![Just(Reach::Answers), Just(Reach::Gone), Just(Reach::Mute)];
    prop_oneof![
        3 => (side(), 0_usize..8, any::<bool>()).prop_map(|(side, arrive, seen)| Fault::Kill(side, arrive, seen)),
        3 => (side(), 1_u64..600).prop_map(|(side, ms)| Fault::Stop(side, ms)),
        2 => side().prop_map(Fault::Cut),
        1 => side().prop_map(Fault::Mend),
        1 => (side(), frame.clone()).prop_map(|(side, at)| Fault::Drop(side, at)),
        1 => (side(), frame.clone()).prop_map(|(side, at)| Fault::Duplicate(side, at)),
        1 => (side(), frame.clone(), frame.clone()).prop_map(|(side, a, b)| Fault::Swap(side, a, b)),
        1 => (side(), frame, any::<usize>()).prop_map(|(side, at, bit)| Fault::Flip(side, at, bit)),
        2 => (side(), 1_u64..500).prop_map(|(side, ms)| Fault::Delay(side, ms)),
        2 => side().prop_map(Fault::Break),
        1 => (side(), 1_u64..500).prop_map(|(side, ms)| Fault::Timeless(side, ms)),
        2 => reach.prop_map(Fault::Witness),
        1 => (1_u64..400).prop_map(Fault::Jump),
        1 => any::<bool>().prop_map(Fault::SecondLink),
        3 => Just(Fault::Switchover),
        2 => Just(Fault::Detach),
    ]
}

/// Any schedule.
pub fn schedules() -> impl Strategy<Value = Schedule> {
    let ends_after = prop_oneof![4 => Just(u64::MAX), 1 => 1_u64..400];
    let faults = || vec((0_u16..1000, fault()), 0..7);
    let later =
        prop_oneof![2 => Just(0_usize), 1 => 1..LIVES].prop_flat_map(move |lives| vec(faults(), lives));
    let moves = prop_oneof![500_u16..6000, 500_u16..20_000];
    let budget = prop_oneof![Just(0_u64), Just(10_000)];
    let links = (prop::bool::weighted(0.9), any::<bool>());
    (any::<u64>(), any::<bool>(), moves, ends_after, budget, links, faults(), later).prop_map(
        |(seed, protected, moves, ends_after, pause_budget_us, (witness, second_link), faults, later)| {
            Schedule {
                seed,
                protected,
                moves,
                ends_after,
                pause_budget_us,
                witness,
                second_link,
                faults,
                later,
            }
        },
    )
}

/// Numbers from a seed.
struct Dice {
    seed: u64,
    thrown: u64,
}

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.thrown += 1;
        mix(self.seed, self.thrown, 9) % limit
    }
}

impl Schedule {
    /// Lets it happen.
    ///
    /// # Errors
    /// The promise that was broken.
    pub fn run(&self) -> Result<Outcome, String> {
        let new = if self.witness { World::new } else { World::without_witness };
        let mut world = new(self.ends_after, Duration::from_micros(self.pause_budget_us));
        if self.second_link {
            world.open_second_link();
        }
        let mut dice = Dice { seed: self.seed, thrown: 0 };
        if self.protected {
            world.run_until(20_000, |world| world.primary.core.epoch() != Epoch::NONE)?;
        }
        self.suffer(&self.faults, &mut world, &mut dice)?;
        let mut outcome = world.settle()?;
        for faults in &self.later {
            let pause_budget = Duration::from_micros(self.pause_budget_us);
            match world.next_life(outcome, pause_budget)? {
                Some(next) => world = next,
                None => break,
            }
            if self.second_link {
                world.open_second_link();
            }
            self.suffer(faults, &mut world, &mut dice)?;
            outcome = world.settle()?;
        }
        Ok(outcome)
    }

    /// Random moves, and what goes wrong meanwhile.
    fn suffer(&self, faults: &[(u16, Fault)], world: &mut World, dice: &mut Dice) -> Result<(), String> {
        // Some worlds are slow on one side, or have a guest that writes a lot.
        let (quick, guest) = (1 + dice.below(4), 1 + dice.below(12));
        let microseconds = 1 + dice.below(120);
        let due = |at: u16| u64::from(at) * u64::from(self.moves) / 1000;
        for number in 0..u64::from(self.moves) {
            let now = faults.iter().filter(|(at, _)| due(*at) == number);
            now.for_each(|(_, fault)| fault.strike(world));
            let step = Move::ALL[dice.below(Move::ALL.len() as u64) as usize];
            if step == Move::Run && dice.below(12) >= guest {
                continue;
            }
            let side = if dice.below(quick + 1) == 0 { Side::Primary } else { Side::Standby };
            let side = if self.seed.is_multiple_of(2) { side } else { side.other() };
            world.make(side, step)?;
            world.now += Duration::from_micros(dice.below(microseconds));
        }
        Ok(())
    }
}

impl Fault {
    fn strike(self, world: &mut World) {
        let later = |ms| world.now + Duration::from_millis(ms);
        match self {
            Self::Kill(side, arriving, noticed) => world.kill(side, arriving, noticed),
            Self::Stop(side, ms) => world.stopped[side as usize] = later(ms),
            Self::Cut(side) => world.wire_to(side).cut = true,
            Self::Mend(side) => world.wire_to(side).cut = false,
            Self::Drop(side, at) => {
                world.wire_to(side).frames.remove(at);
            }
            Self::Duplicate(side, at) => {
                let frames = &mut world.wire_to(side).frames;
                if let Some(frame) = frames.get(at).cloned() {
                    frames.insert(at, frame);
                }
            }
            Self::Swap(side, a, b) => {
                let frames = &mut world.wire_to(side).frames;
                if a.max(b) < frames.len() {
                    frames.swap(a, b);
                }
            }
            Self::Flip(side, at, bit) => {
                if let Some(frame) = world.wire_to(side).frames.get_mut(at) {
                    let bit = bit % (frame.len() * 8);
                    frame[bit / 8] ^= 1 << (bit % 8);
                }
            }
            Self::Delay(side, ms) => world.delayed[side as usize] = later(ms),
            Self::Break(side) => world.break_link(side),
            Self::Timeless(side, ms) => world.timeless[side as usize] = later(ms),
            Self::Witness(reach) => world.witness.reach = reach,
            Self::Jump(ms) => world.now = later(ms),
            Self::SecondLink(cut) => world.second.cut = cut,
            Self::Switchover => {
                world.switch_over();
            }
            Self::Detach => {
                world.detach();
            }
        }
    }
}
