//! As much of the i8042 keyboard controller as resets the machine. There is no keyboard.

use crate::bus::{BusDevice, FLOATING};

/// First I/O port address of the controller.
pub const I8042_PORT: u64 = 0x60;
/// The port that commands are written to.
pub const RESET_PORT: u64 = 0x64;
/// Length of its range: data at 0x60, command and status at 0x64.
pub const I8042_LEN: u64 = 5;

const COMMAND: u64 = RESET_PORT - I8042_PORT;
/// Pulses the processor's reset line.
pub const RESET_COMMAND: u8 = 0xfe;
/// Output full, input empty, always: a driver that probes for a keyboard sees that the output cannot be drained and
/// gives up at once, and one that waits for the input to be empty before it resets need not wait.
const STATUS: u8 = 0x01;

/// The controller. It has no state to save: a reset that was requested is the machine's state.
pub struct I8042<F: FnMut() + Send> {
    on_reset: F,
}

impl<F: FnMut() + Send> I8042<F> {
    /// Calls `on_reset` when the guest asks for a reset.
    pub fn new(on_reset: F) -> Self {
        Self { on_reset }
    }
}

impl<F: FnMut() + Send> BusDevice for I8042<F> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(FLOATING);
        if let (COMMAND, Some(first)) = (offset, data.first_mut()) {
            *first = STATUS;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data.first() == Some(&RESET_COMMAND) {
            (self.on_reset)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let mut resets = 0;
        let mut controller = I8042::new(|| resets += 1);
        controller.write(0, &[RESET_COMMAND]);
        controller.write(COMMAND, &[0xd1]);
        controller.write(COMMAND, &[]);
        controller.write(COMMAND, &[RESET_COMMAND]);
        assert_eq!(resets, 1);
    }

    #[test]
    fn status_says_that_there_is_no_keyboard_and_no_need_to_wait() {
        let mut controller = I8042::new(|| ());
        let mut status = [0];
        controller.read(COMMAND, &mut status);
        assert_eq!(status[0] & 0b11, 0b01);
    }
}
