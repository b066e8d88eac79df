//! A port through which a guest ends its run with an exit code.

use crate::bus::{BusDevice, FLOATING};

/// I/O port address at which the exit port is put.
pub const EXIT_PORT: u64 = 0x501;

/// Ends the run with the byte written to it. It has nothing to save: the end of the run is the machine's state.
pub struct ExitPort<F: FnMut(u8) + Send> {
    on_exit: F,
}

impl<F: FnMut(u8) + Send> ExitPort<F> {
    /// Calls `on_exit` with each byte that the guest writes.
    pub fn new(on_exit: F) -> Self {
        Self { on_exit }
    }
}

impl<F: FnMut(u8) + Send> BusDevice for ExitPort<F> {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(FLOATING);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let Some(&code) = data.first() {
            (self.on_exit)(code);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_written_is_the_exit_code() {
        let mut codes = Vec::new();
        let mut port = ExitPort::new(|code| codes.push(code));
        port.write(0, &[42]);
        port.write(0, &[]);
        assert_eq!(codes, [42]);
    }
}
