//! The vCPU threads as one crew under orders: all run, all park, all capture, all restore.
//!
//! Every order has a generation. A thread carries out the newest order once and reports. Nobody ever spins: threads wait
//! for orders, the coordinator for reports, both on condition variables.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;

use crate::kick::Kick;

/// What the threads are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Run the guest.
    Run,
    /// Stand still.
    Park,
    /// Stand still; when all do, capture the state.
    Capture,
    /// Restore the state that was laid out.
    Restore,
    /// End the thread.
    Quit,
}

/// Why the vCPU threads do not carry out an order.
#[derive(Debug, Error)]
pub enum CrewError {
    /// One has ended although nobody told it to: a bug in the VMM.
    #[error("a vCPU thread is gone")]
    Gone,
    /// One may never come back.
    #[error("the machine waits for memory that cannot be had")]
    Stuck,
}

#[derive(Debug)]
struct Gate {
    generation: u64,
    order: Order,
    /// Threads that stand still under the order.
    parked: usize,
    /// Threads that have carried the order out.
    done: usize,
    /// The run has ended: whoever is told to run stands still.
    ended: bool,
    /// Threads that are gone.
    gone: usize,
    /// Threads that were told to end, and do.
    quit: usize,
    /// Threads may never come back: nobody waits for them any more.
    stuck: bool,
}

/// The vCPU threads, seen from the coordinator and from each other.
pub(crate) struct Crew {
    kicks: Vec<Kick>,
    gate: Mutex<Gate>,
    orders: Condvar,
    reports: Condvar,
}

impl Crew {
    /// A crew whose threads will find the order to park.
    pub(crate) fn new(kicks: Vec<Kick>) -> Self {
        let parked = kicks.len();
        let gate = Gate {
            generation: 0,
            order: Order::Park,
            parked,
            done: parked,
            ended: false,
            gone: 0,
            quit: 0,
            stuck: false,
        };
        Self { kicks, gate: Mutex::new(gate), orders: Condvar::new(), reports: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Gate> {
        // Every change under the lock is whole; a panic elsewhere does not spoil it.
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- for the coordinator

    /// Gives an order and returns at once.
    pub(crate) fn order(&self, order: Order) {
        let mut gate = self.lock();
        let running = gate.order == Order::Run && !gate.ended;
        gate.generation += 1;
        gate.order = order;
        gate.parked = 0;
        gate.done = 0;
        if order != Order::Run {
            self.kicks.iter().for_each(Kick::set);
        }
        drop(gate);
        self.orders.notify_all();
        if running && order != Order::Run {
            self.kicks.iter().for_each(Kick::signal);
        }
    }

    /// The order that is in force.
    pub(crate) fn current(&self) -> Order {
        self.lock().order
    }

    /// Waits until all threads stand still.
    pub(crate) fn wait_parked(&self) -> Result<(), CrewError> {
        self.wait(|gate| gate.parked)
    }

    /// Waits until all threads have carried out the order.
    pub(crate) fn wait_done(&self) -> Result<(), CrewError> {
        self.wait(|gate| gate.done)
    }

    /// Waits until all `threads` that were started have followed the order to quit.
    pub(crate) fn wait_quit(&self, threads: usize) -> Result<(), CrewError> {
        self.wait_until(|gate| gate.quit + gate.gone >= threads).map(drop)
    }

    /// Threads may be stuck for ever: nobody waits for them, now or later.
    pub(crate) fn give_up(&self) {
        self.lock().stuck = true;
        self.reports.notify_all();
    }

    fn wait(&self, count: impl Fn(&Gate) -> usize) -> Result<(), CrewError> {
        let all = |gate: &Gate| count(gate) >= self.kicks.len();
        let gate = self.wait_until(|gate| all(gate) || gate.gone > 0)?;
        if all(&gate) { Ok(()) } else { Err(CrewError::Gone) }
    }

    fn wait_until(&self, reached: impl Fn(&Gate) -> bool) -> Result<MutexGuard<'_, Gate>, CrewError> {
        let mut gate = self.lock();
        loop {
            if gate.stuck {
                return Err(CrewError::Stuck);
            }
            if reached(&gate) {
                return Ok(gate);
            }
            gate = self.reports.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the run has ended.
    pub(crate) fn ended(&self) -> bool {
        self.lock().ended
    }

    // --- for the threads, and for whoever finds that the run is over

    /// Ends the run: every thread stands still now and stays so. Returns whether it had not ended before.
    pub(crate) fn end(&self) -> bool {
        let mut gate = self.lock();
        let first = !gate.ended;
        gate.ended = true;
        self.kicks.iter().for_each(Kick::set);
        drop(gate);
        self.orders.notify_all();
        self.kicks.iter().for_each(Kick::signal);
        first
    }

    /// The calling thread is that of vCPU `index`.
    pub(crate) fn join(&self, index: usize) -> Member<'_> {
        self.kicks[index].adopt();
        Member { crew: self, index, seen: 0 }
    }
}

/// A thread's place in the crew.
pub(crate) struct Member<'a> {
    crew: &'a Crew,
    index: usize,
    seen: u64,
}

impl Member<'_> {
    /// Waits for the next order.
    pub(crate) fn next_order(&mut self) -> Order {
        let mut gate = self.crew.lock();
        loop {
            if gate.generation != self.seen {
                self.seen = gate.generation;
                match gate.order {
                    Order::Run if gate.ended => {}
                    Order::Run => {
                        // Under the lock: an order that comes after this sets the flag again.
                        self.crew.kicks[self.index].clear();
                        return Order::Run;
                    }
                    order => return order,
                }
            }
            gate = self.crew.orders.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the thread must leave the guest: there is a new order, or the run has ended.
    pub(crate) fn must_leave(&self) -> bool {
        let gate = self.crew.lock();
        gate.generation != self.seen || gate.ended
    }

    /// Waits at most `timeout` for a reason to leave the guest, and says whether there is one.
    pub(crate) fn wait_to_leave(&self, timeout: Duration) -> bool {
        let gate = self.crew.lock();
        if gate.generation != self.seen || gate.ended {
            return true;
        }
        let (gate, _) = self.crew.orders.wait_timeout(gate, timeout).unwrap_or_else(PoisonError::into_inner);
        gate.generation != self.seen || gate.ended
    }

    /// Reports that the thread stands still.
    pub(crate) fn report_parked(&self) {
        let mut gate = self.crew.lock();
        self.park(&mut gate);
    }

    /// Reports that the thread stands still and waits until all do. False if there is another order meanwhile.
    pub(crate) fn park_with_all(&self) -> bool {
        let mut gate = self.crew.lock();
        self.park(&mut gate);
        while gate.generation == self.seen && gate.parked < self.crew.kicks.len() {
            gate = self.crew.orders.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.generation == self.seen
    }

    /// Reports that the order is carried out.
    pub(crate) fn report_done(&self) {
        let mut gate = self.crew.lock();
        if gate.generation == self.seen {
            gate.done += 1;
            if gate.done == self.crew.kicks.len() {
                self.crew.reports.notify_all();
            }
        }
    }

    fn park(&self, gate: &mut Gate) {
        if gate.generation == self.seen {
            gate.parked += 1;
            if gate.parked == self.crew.kicks.len() {
                self.crew.reports.notify_all();
                if self.crew.kicks.len() > 1 {
                    self.crew.orders.notify_all();
                }
            }
        }
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        let mut gate = self.crew.lock();
        if gate.order == Order::Quit {
            gate.quit += 1;
        } else {
            gate.gone += 1;
        }
        self.crew.reports.notify_all();
    }
}
