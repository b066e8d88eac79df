//! Session tokens: random names, each good for a time.

use std::fmt::Write;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Seconds for which a token may be good.
pub(super) const LIFETIME: std::ops::RangeInclusive<u32> = 1..=21_600;

/// Most tokens that are good at a time. Whoever asks for more loses the one that would end first.
pub const MAX_TOKENS: usize = 256;

/// A token that was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedToken {
    /// Its name.
    pub name: [u8; 16],
    /// Milliseconds for which it is still good.
    pub left_ms: u64,
}

/// All that were given and are still good.
#[derive(Debug, Default)]
pub(super) struct Tokens(Vec<([u8; 16], Instant)>);

impl Tokens {
    /// A new one; `None` if the kernel has no random numbers.
    pub(super) fn give(&mut self, lifetime_s: u32, now: Instant) -> Option<String> {
        let mut name = [0; 16];
        rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::empty()).ok()?;
        self.0.retain(|&(_, end)| end > now);
        while self.0.len() >= MAX_TOKENS
            && let Some(first) = (0..self.0.len()).min_by_key(|&index| self.0[index].1)
        {
            self.0.swap_remove(first);
        }
        self.0.push((name, now + Duration::from_secs(lifetime_s.into())));
        Some(name.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        }))
    }

    /// Whether `text` is one that is good.
    pub(super) fn is_good(&self, text: &str, now: Instant) -> bool {
        // Other characters than the digits that `give` writes are another text, whatever number they stand for.
        let plain =
            text.len() == 32 && text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c));
        let Some(name) = plain.then(|| u128::from_str_radix(text, 16).ok()).flatten() else { return false };
        self.0.iter().any(|&(other, end)| other == name.to_be_bytes() && end > now)
    }

    pub(super) fn save(&self, into: &mut Vec<SavedToken>, now: Instant) {
        into.clear();
        into.extend(self.0.iter().take(MAX_TOKENS).map(|&(name, end)| SavedToken {
            name,
            left_ms: end.saturating_duration_since(now).as_millis() as u64,
        }));
    }

    pub(super) fn restore(saved: &[SavedToken], now: Instant) -> Self {
        let longest = u64::from(*LIFETIME.end()) * 1000;
        let token =
            |saved: &SavedToken| (saved.name, now + Duration::from_millis(saved.left_ms.min(longest)));
        Self(saved.iter().take(MAX_TOKENS).map(token).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_good_until_its_end_and_nothing_else_is() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let token = tokens.give(60, now).unwrap();
        assert!(tokens.is_good(&token, now));
        assert!(tokens.is_good(&token, now + Duration::from_secs(59)));
        assert!(!tokens.is_good(&token, now + Duration::from_mins(1)));
        for other in ["", "foo", &"0".repeat(32), &token.to_uppercase().replace('A', "g"), &token[1..]] {
            assert!(!tokens.is_good(other, now), "{other}");
        }
    }

    #[test]
    fn tokens_are_good_elsewhere_for_the_time_that_was_left() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let token = tokens.give(60, now).unwrap();
        let mut saved = Vec::new();
        tokens.save(&mut saved, now + Duration::from_secs(20));
        let there = Tokens::restore(&saved, now);
        assert!(there.is_good(&token, now + Duration::from_secs(39)));
        assert!(!there.is_good(&token, now + Duration::from_secs(40)));
    }

    #[test]
    fn no_more_tokens_than_there_may_be_are_kept_and_the_first_to_end_go_first() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let first = tokens.give(10, now).unwrap();
        let last: Vec<_> = (0..MAX_TOKENS).map(|_| tokens.give(20, now).unwrap()).collect();
        assert_eq!(tokens.0.len(), MAX_TOKENS);
        assert!(!tokens.is_good(&first, now));
        assert!(last.iter().all(|token| tokens.is_good(token, now)));
    }
}
