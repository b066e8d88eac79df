//! A 16550A serial port, by vm-superio, with a queue in front of its receiver.

use std::collections::VecDeque;
use std::io::Write;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::Trigger;
use vm_superio::serial::{Error as PortError, NoEvents, Serial as Port, SerialState as PortState};

use crate::bus::{BusDevice, FLOATING};

/// I/O port address of the first serial port (COM1).
pub const SERIAL_PORT: u64 = 0x3f8;
/// Length of its range.
pub const SERIAL_LEN: u64 = 8;
/// Interrupt line of the first serial port.
pub const SERIAL_IRQ: u32 = 4;
/// Most bytes of input that wait for the guest to read them.
pub const INPUT_LIMIT: usize = 64 << 10;

/// What of a serial port is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// DLL.
    pub baud_divisor_low: u8,
    /// DLM.
    pub baud_divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// Received and not yet read, at most the 64 bytes of the FIFO.
    pub fifo: Vec<u8>,
    /// Input that waits for the FIFO, at most [`INPUT_LIMIT`].
    pub waiting: Vec<u8>,
}

/// Why a serial port cannot be restored or take input.
#[derive(Debug, Error)]
pub enum SerialError {
    /// The state cannot have come from a serial port.
    #[error(
        "the state of the serial port holds {fifo} bytes in its FIFO and {waiting} waiting, which is too much"
    )]
    State {
        /// Bytes in the FIFO.
        fifo: usize,
        /// Bytes before the FIFO.
        waiting: usize,
    },
    /// The interrupt could not be raised.
    #[error("the interrupt of the serial port could not be raised: {0}")]
    Interrupt(String),
}

/// A serial port whose output goes to `W` and whose interrupt is `T`.
pub struct Serial<T: Trigger, W: Write> {
    port: Port<T, NoEvents, W>,
    waiting: VecDeque<u8>,
}

impl<T, W> Serial<T, W>
where
    T: Trigger + Clone,
    T::E: std::fmt::Display,
    W: Write + Clone,
{
    /// A port as after power-on.
    pub fn new(interrupt: T, out: W) -> Self {
        Self { port: Port::new(interrupt, out), waiting: VecDeque::new() }
    }

    /// Copies the state into `state`. Allocates only for input that the guest has not read.
    pub fn save(&self, state: &mut SerialState) {
        let port = self.port.state();
        state.baud_divisor_low = port.baud_divisor_low;
        state.baud_divisor_high = port.baud_divisor_high;
        state.interrupt_enable = port.interrupt_enable;
        state.interrupt_identification = port.interrupt_identification;
        state.line_control = port.line_control;
        state.line_status = port.line_status;
        state.modem_control = port.modem_control;
        state.modem_status = port.modem_status;
        state.scratch = port.scratch;
        state.fifo = port.in_buffer;
        state.waiting.clear();
        state.waiting.extend(&self.waiting);
    }

    /// Becomes the port that `state` was saved from. An interrupt that is pending in it is raised again.
    ///
    /// # Errors
    /// [`SerialError`]; the port is then unchanged.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), SerialError> {
        let error = SerialError::State { fifo: state.fifo.len(), waiting: state.waiting.len() };
        if state.waiting.len() > INPUT_LIMIT {
            return Err(error);
        }
        let port = PortState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.clone(),
        };
        let (interrupt, out) = (self.port.interrupt_evt().clone(), self.port.writer().clone());
        self.port = Port::from_state(&port, interrupt, NoEvents, out).map_err(|cause| match cause {
            PortError::Trigger(cause) => SerialError::Interrupt(cause.to_string()),
            _ => error,
        })?;
        self.waiting.clear();
        self.waiting.extend(&state.waiting);
        Ok(())
    }

    /// Gives the guest `bytes` to read and says how many were taken: fewer than all when [`INPUT_LIMIT`] is reached.
    ///
    /// # Errors
    /// [`SerialError::Interrupt`]; the bytes are then taken, but the guest was not told.
    pub fn input(&mut self, bytes: &[u8]) -> Result<usize, SerialError> {
        let taken = bytes.len().min(INPUT_LIMIT - self.waiting.len());
        self.waiting.extend(&bytes[..taken]);
        self.refill()?;
        Ok(taken)
    }

    /// Moves what waits into the FIFO. In loopback mode the receiver is cut off from the line, so it waits on.
    fn refill(&mut self) -> Result<(), SerialError> {
        let room = self.port.fifo_capacity();
        if room == 0 || self.waiting.is_empty() {
            return Ok(());
        }
        let (first, _) = self.waiting.as_slices();
        let mut chunk = [0; 64];
        let moved = first.len().min(room).min(chunk.len());
        chunk[..moved].copy_from_slice(&first[..moved]);
        match self.port.enqueue_raw_bytes(&chunk[..moved]) {
            Ok(count) => {
                self.waiting.drain(..count);
                Ok(())
            }
            Err(PortError::Trigger(cause)) => {
                self.waiting.drain(..moved);
                Err(SerialError::Interrupt(cause.to_string()))
            }
            Err(_) => Ok(()),
        }
    }
}

impl<T, W> BusDevice for Serial<T, W>
where
    T: Trigger + Clone + Send,
    T::E: std::fmt::Display,
    W: Write + Clone + Send,
{
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(FLOATING);
        if let Some(first) = data.first_mut() {
            *first = self.port.read(offset as u8);
            // A guest that polls gets its bytes even if the interrupt could not be raised.
            let _ = self.refill();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(&first) = data.first() {
            // The console takes every byte, and a transmit interrupt that is lost is raised by the next byte.
            let _ = self.port.write(offset as u8, first);
            // Leaving loopback mode lets waiting input in.
            let _ = self.refill();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const LSR: u64 = 5;
    const SCR: u64 = 7;

    #[derive(Clone, Default)]
    struct Line(Arc<AtomicUsize>);

    impl Trigger for Line {
        type E = io::Error;

        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn serial() -> (Serial<Line, Sink>, Line, Sink) {
        let (line, sink) = (Line::default(), Sink::default());
        (Serial::new(line.clone(), sink.clone()), line, sink)
    }

    fn read(serial: &mut Serial<Line, Sink>, register: u64) -> u8 {
        let mut byte = [0];
        serial.read(register, &mut byte);
        byte[0]
    }

    #[test]
    fn bytes_written_reach_the_sink() {
        let (mut serial, _, sink) = serial();
        for byte in b"hello" {
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(*sink.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_and_in_order() {
        let (mut serial, line, _) = serial();
        serial.write(IER, &[1]);
        let input: Vec<u8> = (0..=255).cycle().take(1000).collect();
        assert_eq!(serial.input(&input).unwrap(), 1000);
        let mut output = Vec::new();
        while read(&mut serial, LSR) & 1 != 0 {
            output.push(read(&mut serial, DATA));
        }
        assert_eq!(output, input);
        assert!(line.0.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn input_beyond_the_limit_is_refused_not_stored() {
        let (mut serial, ..) = serial();
        let taken = serial.input(&vec![0; 2 * INPUT_LIMIT]).unwrap();
        assert_eq!(taken, INPUT_LIMIT);
        assert!(serial.input(&vec![0; INPUT_LIMIT]).unwrap() <= 64);
    }

    #[test]
    fn restored_port_goes_on_with_registers_and_unread_input() {
        let (mut old, ..) = serial();
        old.write(IER, &[1]);
        old.write(SCR, &[0x5a]);
        old.input(&[7; 100]).unwrap();
        let mut state = SerialState::default();
        old.save(&mut state);

        let (mut new, line, _) = serial();
        new.restore(&state).unwrap();

        assert_eq!(line.0.load(Ordering::Relaxed), 1, "the pending interrupt is raised again");
        let mut again = SerialState::default();
        new.save(&mut again);
        assert_eq!(again, state);
        assert_eq!(read(&mut new, SCR), 0x5a);
        for _ in 0..100 {
            assert_eq!((read(&mut new, LSR) & 1, read(&mut new, DATA)), (1, 7));
        }
        assert_eq!(read(&mut new, LSR) & 1, 0);
    }

    #[test]
    fn state_with_an_impossible_fifo_is_refused() {
        let (mut serial, ..) = serial();
        let state = SerialState { fifo: vec![0; 65], ..SerialState::default() };
        assert!(matches!(serial.restore(&state), Err(SerialError::State { .. })));
    }
}
