//! An i8042 keyboard controller with an AT keyboard, and without a mouse. It also resets the machine.
//!
//! What a real one has in hardware is told at once here: a byte that waits is in the output buffer, and its interrupt is
//! raised anew with each access that leaves it there.

mod keyboard;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::Trigger;

use crate::bus::{BusDevice, FLOATING};

pub use keyboard::{BUFFER_LEN, Keyboard, KeyboardError};

/// First I/O port address of the controller: its data port.
pub const I8042_PORT: u64 = 0x60;
/// The port that commands are written to, and the status is read from.
pub const RESET_PORT: u64 = 0x64;
/// Length of its range: data at 0x60, command and status at 0x64.
pub const I8042_LEN: u64 = 5;
/// Interrupt line of the keyboard.
pub const KEYBOARD_IRQ: u32 = 1;
/// Pulses the processor's reset line.
pub const RESET_COMMAND: u8 = 0xfe;

const DATA: u64 = 0;
const COMMAND: u64 = RESET_PORT - I8042_PORT;

// Commands (IBM PS/2 technical reference, keyboard and auxiliary device controller).
const READ_COMMAND_BYTE: u8 = 0x20;
const WRITE_COMMAND_BYTE: u8 = 0x60;
const TEST_MOUSE: u8 = 0xa9;
const TEST_CONTROLLER: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE_KEYBOARD: u8 = 0xad;
const ENABLE_KEYBOARD: u8 = 0xae;
const READ_INPUT_PORT: u8 = 0xc0;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const LOOP_KEYBOARD: u8 = 0xd2;
const LOOP_MOUSE: u8 = 0xd3;
const WRITE_MOUSE: u8 = 0xd4;

// Answers.
const CONTROLLER_PASSED: u8 = 0x55;
const KEYBOARD_PASSED: u8 = 0x00;
/// Its clock line is stuck: nothing is there.
const NO_MOUSE: u8 = 0x01;
/// Keyboard not locked.
const INPUT_PORT: u8 = 1 << 7;
/// Not in reset, address line 20 open.
const OUTPUT_PORT: u8 = 0b11;

// Bits of the command byte.
const KEYBOARD_INTERRUPT: u8 = 1 << 0;
const SYSTEM: u8 = 1 << 2;
const KEYBOARD_OFF: u8 = 1 << 4;
const MOUSE_OFF: u8 = 1 << 5;
const TRANSLATE: u8 = 1 << 6;

// Bits of the status. Input is taken at once, so its buffer is never full.
const OUTPUT_FULL: u8 = 1 << 0;
const NOT_LOCKED: u8 = 1 << 4;

/// What is done with the next byte on the data port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Parameter {
    /// It is the command byte.
    CommandByte,
    /// It is read again.
    Loop,
    /// Nothing: there is no mouse, and no line of the output port to switch.
    Nothing,
}

/// What of a controller and its keyboard is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// The command byte.
    pub command_byte: u8,
    /// What a command awaits.
    pub parameter: Option<Parameter>,
    /// The controller's own answer, which is read before anything from the keyboard.
    pub answer: Option<u8>,
    /// The keyboard.
    pub keyboard: Keyboard,
}

impl Default for I8042State {
    /// As firmware leaves it that does not need it: it has passed its test, and translates; keyboard and interrupt are off.
    fn default() -> Self {
        Self {
            command_byte: SYSTEM | KEYBOARD_OFF | MOUSE_OFF | TRANSLATE,
            parameter: None,
            answer: None,
            keyboard: Keyboard::default(),
        }
    }
}

/// Why a controller cannot be restored.
#[derive(Debug, Error)]
pub enum I8042RestoreError {
    /// The state cannot have come from one.
    #[error(
        "the state of the keyboard has {0} bytes waiting, which is too much: it is damaged; use another copy"
    )]
    State(u8),
    /// The interrupt could not be raised.
    #[error("the interrupt of the keyboard could not be raised: {0}")]
    Interrupt(String),
}

/// The controller, whose interrupt is `T`.
pub struct I8042<T: Trigger, F: FnMut() + Send> {
    state: I8042State,
    interrupt: T,
    on_reset: F,
}

impl<T, F> I8042<T, F>
where
    T: Trigger,
    T::E: std::fmt::Display,
    F: FnMut() + Send,
{
    /// A controller that calls `on_reset` when the guest asks for a reset. A reset that was requested is the machine's
    /// state, not the controller's.
    pub fn new(interrupt: T, on_reset: F) -> Self {
        Self { state: I8042State::default(), interrupt, on_reset }
    }

    /// Its state. Allocates nothing.
    pub fn save(&self) -> I8042State {
        self.state
    }

    /// Becomes the controller that `state` was saved from. An interrupt that is pending in it is raised again.
    ///
    /// # Errors
    /// [`I8042RestoreError`]; for a state that cannot be, the controller is unchanged.
    pub fn restore(&mut self, state: &I8042State) -> Result<(), I8042RestoreError> {
        if usize::from(state.keyboard.waiting) > BUFFER_LEN {
            return Err(I8042RestoreError::State(state.keyboard.waiting));
        }
        self.state = *state;
        self.signal().map_err(|cause| I8042RestoreError::Interrupt(cause.to_string()))
    }

    /// Presses Ctrl, Alt and Del at once and lets them go.
    ///
    /// # Errors
    /// [`KeyboardError`]
    pub fn press_ctrl_alt_del(&mut self) -> Result<(), KeyboardError> {
        if !self.has(KEYBOARD_INTERRUPT) || self.has(KEYBOARD_OFF) {
            return Err(KeyboardError::Off);
        }
        let translated = self.has(TRANSLATE);
        self.state.keyboard.press_ctrl_alt_del(translated)?;
        self.signal().map_err(|cause| KeyboardError::Interrupt(cause.to_string()))
    }

    fn has(&self, bit: u8) -> bool {
        self.state.command_byte & bit != 0
    }

    /// The byte in the output buffer.
    fn output(&self) -> Option<u8> {
        let from_keyboard = || self.state.keyboard.next().filter(|_| !self.has(KEYBOARD_OFF));
        self.state.answer.or_else(from_keyboard)
    }

    fn take_output(&mut self) -> Option<u8> {
        let output = self.output()?;
        if self.state.answer.take().is_none() {
            self.state.keyboard.take();
        }
        Some(output)
    }

    fn status(&self) -> u8 {
        let output_full = if self.output().is_some() { OUTPUT_FULL } else { 0 };
        NOT_LOCKED | self.state.command_byte & SYSTEM | output_full
    }

    /// Raises the interrupt if there is something to be read.
    fn signal(&self) -> Result<(), T::E> {
        if self.has(KEYBOARD_INTERRUPT) && self.output().is_some() {
            self.interrupt.trigger()
        } else {
            Ok(())
        }
    }

    fn command(&mut self, command: u8) {
        let state = &mut self.state;
        // A parameter that was awaited will not come any more.
        state.parameter = None;
        match command {
            READ_COMMAND_BYTE => state.answer = Some(state.command_byte),
            WRITE_COMMAND_BYTE => state.parameter = Some(Parameter::CommandByte),
            TEST_MOUSE => state.answer = Some(NO_MOUSE),
            TEST_CONTROLLER => {
                state.command_byte |= SYSTEM;
                state.answer = Some(CONTROLLER_PASSED);
            }
            TEST_KEYBOARD => state.answer = Some(KEYBOARD_PASSED),
            DISABLE_KEYBOARD => state.command_byte |= KEYBOARD_OFF,
            ENABLE_KEYBOARD => state.command_byte &= !KEYBOARD_OFF,
            READ_INPUT_PORT => state.answer = Some(INPUT_PORT),
            READ_OUTPUT_PORT => state.answer = Some(OUTPUT_PORT),
            // Comes back without the mark of a mouse's: a driver need not wait to learn that there is none.
            LOOP_KEYBOARD | LOOP_MOUSE => state.parameter = Some(Parameter::Loop),
            WRITE_OUTPUT_PORT | WRITE_MOUSE => state.parameter = Some(Parameter::Nothing),
            RESET_COMMAND => (self.on_reset)(),
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        match self.state.parameter.take() {
            Some(Parameter::CommandByte) => self.state.command_byte = value,
            Some(Parameter::Loop) => self.state.answer = Some(value),
            Some(Parameter::Nothing) => {}
            None => {
                let translated = self.has(TRANSLATE);
                self.state.keyboard.write(value, translated);
            }
        }
    }
}

impl<T, F> BusDevice for I8042<T, F>
where
    T: Trigger + Send,
    T::E: std::fmt::Display,
    F: FnMut() + Send,
{
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(FLOATING);
        match (offset, data.first_mut()) {
            (COMMAND, Some(first)) => *first = self.status(),
            (DATA, Some(first)) => {
                if let Some(output) = self.take_output() {
                    *first = output;
                }
                // A guest that polls gets its bytes even if the interrupt could not be raised.
                let _ = self.signal();
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data.first()) {
            (COMMAND, Some(&command)) => self.command(command),
            (DATA, Some(&value)) => self.data(value),
            _ => return,
        }
        // As above.
        let _ = self.signal();
    }
}
