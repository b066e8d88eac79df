//! An AT keyboard as far as a driver asks after it, with three keys.
//!
//! It speaks scancode set 2. Its controller can translate that to set 1 (bit 6 of the command byte): then it is told so, and
//! what it puts into its buffer is what the guest reads.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bytes that wait for the guest at most, as many as in a real keyboard.
pub const BUFFER_LEN: usize = 16;

// Commands (IBM PS/2 technical reference, keyboard and auxiliary device: system commands).
const SET_LEDS: u8 = 0xed;
const ECHO: u8 = 0xee;
const SCANCODE_SET: u8 = 0xf0;
const IDENTIFY: u8 = 0xf2;
const SET_TYPEMATIC: u8 = 0xf3;
const ENABLE: u8 = 0xf4;
const DISABLE: u8 = 0xf5;
const SET_DEFAULTS: u8 = 0xf6;
const RESET: u8 = 0xff;

// Answers.
const ACKNOWLEDGE: u8 = 0xfa;
const SELF_TEST_PASSED: u8 = 0xaa;
const RESEND: u8 = 0xfe;
/// The second byte of an identification, and the number of the scancode set that is spoken: as sent, and translated.
const IDENTITY: (u8, u8) = (0x83, 0x41);
const SET_2: (u8, u8) = (0x02, 0x41);

/// Ctrl, Alt and Del go down, and up again in the opposite order: in scancode set 2, and translated.
const CTRL_ALT_DEL: (&[u8], &[u8]) = (
    &[0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14],
    &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d],
);

/// Why keys cannot be pressed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum KeyboardError {
    /// Nobody would see them.
    #[error(
        "the guest does not listen to its keyboard: no driver in it (Linux: i8042 and atkbd) has enabled keyboard and \
         interrupt; wait until it has booted, or let a program in the guest power it off"
    )]
    Off,
    /// There is no room for them.
    #[error("the guest has not read the keys that were pressed before; ask again when it has")]
    Full,
    /// The interrupt could not be raised.
    #[error("the keys are in the keyboard's buffer, but its interrupt could not be raised: {0}")]
    Interrupt(String),
}

/// A keyboard, which is also what of it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keyboard {
    /// Whether it tells which keys are pressed.
    pub scanning: bool,
    /// The command whose parameter is awaited.
    pub command: Option<u8>,
    /// What waits for the guest, the oldest first.
    pub buffer: [u8; BUFFER_LEN],
    /// Bytes of it that do, at most [`BUFFER_LEN`].
    pub waiting: u8,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self { scanning: true, command: None, buffer: [0; BUFFER_LEN], waiting: 0 }
    }
}

impl Keyboard {
    /// The byte that the guest is to read next.
    pub(super) fn next(&self) -> Option<u8> {
        (self.waiting > 0).then_some(self.buffer[0])
    }

    /// Gives that byte away.
    pub(super) fn take(&mut self) -> Option<u8> {
        let byte = self.next()?;
        self.buffer.rotate_left(1);
        self.waiting -= 1;
        Some(byte)
    }

    /// Takes a byte from the guest: a command, or the parameter of one.
    pub(super) fn write(&mut self, byte: u8, translated: bool) {
        let as_read = |(sent, read)| if translated { read } else { sent };
        if let Some(command) = self.command.take() {
            // It goes on with set 2 whatever is asked for, which a driver that asks back is told.
            match (command, byte) {
                (SCANCODE_SET, 0) => self.answer(&[ACKNOWLEDGE, as_read(SET_2)]),
                _ => self.answer(&[ACKNOWLEDGE]),
            }
            return;
        }
        match byte {
            SET_LEDS | SCANCODE_SET | SET_TYPEMATIC => {
                self.command = Some(byte);
                self.answer(&[ACKNOWLEDGE]);
            }
            ECHO => self.answer(&[ECHO]),
            IDENTIFY => self.answer(&[ACKNOWLEDGE, 0xab, as_read(IDENTITY)]),
            ENABLE | DISABLE | SET_DEFAULTS => {
                self.waiting = 0;
                if byte != SET_DEFAULTS {
                    self.scanning = byte == ENABLE;
                }
                self.answer(&[ACKNOWLEDGE]);
            }
            RESET => {
                *self = Self::default();
                self.answer(&[ACKNOWLEDGE, SELF_TEST_PASSED]);
            }
            _ => self.answer(&[RESEND]),
        }
    }

    /// Presses the three keys and lets them go.
    ///
    /// # Errors
    /// [`KeyboardError::Off`] and [`KeyboardError::Full`]; no key is then pressed.
    pub(super) fn press_ctrl_alt_del(&mut self, translated: bool) -> Result<(), KeyboardError> {
        if !self.scanning {
            return Err(KeyboardError::Off);
        }
        let (sent, read) = CTRL_ALT_DEL;
        self.put(if translated { read } else { sent })
    }

    /// An answer for which there is no room is lost: whoever awaits it has to read.
    fn answer(&mut self, bytes: &[u8]) {
        let _ = self.put(bytes);
    }

    /// Puts all of `bytes` into the buffer, or none.
    fn put(&mut self, bytes: &[u8]) -> Result<(), KeyboardError> {
        let start = usize::from(self.waiting);
        let room = self.buffer.get_mut(start..start + bytes.len()).ok_or(KeyboardError::Full)?;
        room.copy_from_slice(bytes);
        self.waiting += bytes.len() as u8;
        Ok(())
    }
}
