//! The switch by which a guest turns its machine off: ACPI's sleep registers (ACPI 6.5, 4.8.3.7).

use crate::bus::BusDevice;

/// I/O port of the sleep control register.
pub const SLEEP_CONTROL_PORT: u64 = 0x600;
/// I/O port of the sleep status register, the next.
pub const SLEEP_STATUS_PORT: u64 = 0x601;
/// I/O ports in all.
pub const POWER_SWITCH_LEN: u64 = 2;
/// The sleep type that means off, as the ACPI tables say.
pub const POWER_OFF_STATE: u8 = 5;

const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;

/// The sleep registers. Nothing of them is kept.
pub struct PowerSwitch<F> {
    on_off: F,
}

impl<F: FnMut() + Send> PowerSwitch<F> {
    /// A switch that calls `on_off` when the guest turns it.
    pub fn new(on_off: F) -> Self {
        Self { on_off }
    }
}

impl<F: FnMut() + Send> BusDevice for PowerSwitch<F> {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, Some(value)) = (offset, data.first())
            && value & SLEEP_ENABLE != 0
            && value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == POWER_OFF_STATE
        {
            (self.on_off)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_off_state_with_the_enable_bit_turns_the_machine_off() {
        let mut count = 0;
        let mut switch = PowerSwitch::new(|| count += 1);
        for value in 0..=255 {
            switch.write(1, &[value]);
        }
        switch.write(0, &[]);
        for value in [0, 5 << 2, 1 << 5, 1 << 5 | 4 << 2] {
            switch.write(0, &[value]);
        }
        switch.write(0, &[1 << 5 | 5 << 2]);
        let mut byte = [7];
        switch.read(0, &mut byte);
        assert_eq!((count, byte), (1, [0]));
    }
}
