//! Output commit for devices: an effect that can be seen outside waits for the epoch that knows of it.
//!
//! A request with such an effect (a frame to send, a block to write) is taken from its queue and *held*: neither carried
//! out nor completed. As long as it is, it is in flight in the device's saved state. At a capture what is held is
//! marked; when the standby has committed that epoch, what was marked is carried out. A standby that takes over carries
//! out everything that its state has in flight. So an effect is never ahead of the state that led to it, and a request
//! is never lost; at most it is carried out by both sides, which is harmless for a block written from the same memory
//! and for a frame.

use std::collections::VecDeque;

/// What happens to requests with an effect that can be seen outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutputPolicy {
    /// They are carried out at once: nobody mirrors this guest.
    #[default]
    Pass,
    /// They wait for their epoch.
    Hold,
    /// They wait for ever: another side is the live one.
    Freeze,
}

/// Requests that wait, in the order of their coming.
#[derive(Debug)]
pub struct Held<T> {
    waiting: VecDeque<T>,
    /// How many of them the last capture knows of.
    marked: usize,
    /// How many of them may be carried out.
    released: usize,
    policy: OutputPolicy,
}

impl<T> Default for Held<T> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), marked: 0, released: 0, policy: OutputPolicy::default() }
    }
}

impl<T> Held<T> {
    /// Nothing held; room for `capacity` requests without allocating.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { waiting: VecDeque::with_capacity(capacity), ..Self::default() }
    }

    /// Takes a request. [`pop`](Self::pop) gives it back when it may be carried out: at once under
    /// [`OutputPolicy::Pass`].
    pub fn push(&mut self, request: T) {
        self.waiting.push_back(request);
    }

    /// A capture is under way: it knows of everything that is held now.
    pub fn mark(&mut self) {
        self.marked = self.waiting.len();
    }

    /// The epoch of the last capture is committed.
    pub fn release(&mut self) {
        self.released = self.released.max(self.marked);
    }

    /// Changes what happens to requests, also to those that are held.
    pub fn set_policy(&mut self, policy: OutputPolicy) {
        // What one side has frozen it never lets go.
        if self.policy != OutputPolicy::Freeze {
            self.policy = policy;
        }
    }

    /// The next request that may be carried out now.
    pub fn pop(&mut self) -> Option<T> {
        match self.policy {
            OutputPolicy::Pass => {}
            OutputPolicy::Hold if self.released > 0 => {}
            _ => return None,
        }
        let request = self.waiting.pop_front()?;
        self.released = self.released.saturating_sub(1);
        self.marked = self.marked.saturating_sub(1);
        Some(request)
    }

    /// Puts the request that [`pop`](Self::pop) gave last back to its place: it could not be carried out yet.
    pub fn put_back(&mut self, request: T) {
        self.waiting.push_front(request);
        self.released += 1;
        self.marked += 1;
    }

    /// Whether a request waits that no capture knows of yet.
    pub fn waits(&self) -> bool {
        self.policy == OutputPolicy::Hold && self.waiting.len() > self.marked
    }

    /// Everything that waits, in order, in two parts.
    pub fn as_slices(&self) -> (&[T], &[T]) {
        self.waiting.as_slices()
    }

    /// Everything that waits, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.waiting.iter()
    }

    /// Forgets everything that waits: the device was reset.
    pub fn clear(&mut self) {
        self.waiting.clear();
        (self.marked, self.released) = (0, 0);
    }

    /// How many requests wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(held: &mut Held<u8>) -> Vec<u8> {
        std::iter::from_fn(|| held.pop()).collect()
    }

    #[test]
    fn only_what_a_committed_capture_knows_of_is_carried_out() {
        let mut held = Held::default();
        held.set_policy(OutputPolicy::Hold);
        held.push(1);
        held.mark();
        held.push(2);
        assert!(take(&mut held).is_empty());
        held.release();
        assert_eq!(take(&mut held), [1]);
        assert!(held.waits());
        held.mark();
        assert!(!held.waits());
        held.release();
        assert_eq!(take(&mut held), [2]);
    }

    #[test]
    fn a_request_that_comes_while_others_are_released_is_not_let_out_with_them() {
        let mut held = Held::default();
        held.set_policy(OutputPolicy::Hold);
        held.push(1);
        held.mark();
        held.release();
        held.push(2);
        assert_eq!(take(&mut held), [1]);
        held.release();
        assert!(take(&mut held).is_empty());
    }

    #[test]
    fn request_that_could_not_be_carried_out_comes_first_again() {
        let mut held = Held::default();
        held.set_policy(OutputPolicy::Hold);
        held.push(1);
        held.push(2);
        held.mark();
        held.release();
        let first = held.pop().unwrap();
        held.put_back(first);
        assert_eq!(take(&mut held), [1, 2]);
    }

    #[test]
    fn frozen_side_never_carries_out_anything_again() {
        let mut held = Held::default();
        held.set_policy(OutputPolicy::Hold);
        held.push(1);
        held.mark();
        held.release();
        held.set_policy(OutputPolicy::Freeze);
        held.set_policy(OutputPolicy::Pass);
        assert!(take(&mut held).is_empty());
    }

    #[test]
    fn live_side_without_standby_carries_out_everything() {
        let mut held = Held::default();
        held.set_policy(OutputPolicy::Hold);
        held.push(1);
        held.set_policy(OutputPolicy::Pass);
        held.push(2);
        assert_eq!(take(&mut held), [1, 2]);
    }
}
