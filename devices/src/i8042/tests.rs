use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;

#[derive(Clone, Default)]
struct Line(Arc<AtomicUsize>);

impl Line {
    /// Interrupts since the last call.
    fn interrupts(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// The keyboard's command that has the longest answer.
const IDENTIFY: u8 = 0xf2;

type Controller = I8042<Line, fn()>;

fn controller() -> (Controller, Line) {
    let line = Line::default();
    (I8042::new(line.clone(), || ()), line)
}

fn status(controller: &mut Controller) -> u8 {
    let mut status = [0];
    controller.read(COMMAND, &mut status);
    status[0]
}

/// What a driver that polls reads.
fn drain(controller: &mut Controller) -> Vec<u8> {
    let mut read = Vec::new();
    while status(controller) & OUTPUT_FULL != 0 {
        let mut byte = [0];
        controller.read(DATA, &mut byte);
        read.push(byte[0]);
        assert!(read.len() <= BUFFER_LEN + 1, "there is always more: {read:x?}");
    }
    read
}

fn command(controller: &mut Controller, command: u8) -> Vec<u8> {
    controller.write(COMMAND, &[command]);
    drain(controller)
}

fn data(controller: &mut Controller, value: u8) -> Vec<u8> {
    controller.write(DATA, &[value]);
    drain(controller)
}

/// As a driver does that has bound to the keyboard.
fn enable(controller: &mut Controller, translate: bool) {
    command(controller, WRITE_COMMAND_BYTE);
    let translate = if translate { TRANSLATE } else { 0 };
    data(controller, SYSTEM | MOUSE_OFF | KEYBOARD_INTERRUPT | translate);
}

#[test]
fn only_the_reset_command_resets() {
    let mut resets = 0;
    let mut controller = I8042::new(Line::default(), || resets += 1);
    controller.write(0, &[RESET_COMMAND]);
    controller.write(COMMAND, &[0xd1]);
    controller.write(0, &[RESET_COMMAND]);
    controller.write(COMMAND, &[]);
    for offset in 1..COMMAND {
        controller.write(offset, &[RESET_COMMAND]);
    }
    controller.write(COMMAND, &[RESET_COMMAND]);
    assert_eq!(resets, 1);
}

#[test]
fn status_says_that_nobody_need_wait_and_nothing_is_locked() {
    let (mut controller, _) = controller();
    assert_eq!(status(&mut controller), NOT_LOCKED | SYSTEM);
    controller.write(COMMAND, &[TEST_CONTROLLER]);
    assert_eq!(status(&mut controller), NOT_LOCKED | SYSTEM | OUTPUT_FULL);
}

#[test]
fn controller_passes_its_tests_and_has_no_mouse() {
    let (mut controller, _) = controller();
    assert_eq!(command(&mut controller, TEST_CONTROLLER), [0x55]);
    assert_eq!(command(&mut controller, TEST_KEYBOARD), [0]);
    // Linux takes 0x00, 0xfa and 0xff for a mouse.
    assert_eq!(command(&mut controller, TEST_MOUSE), [1]);
    assert_eq!(command(&mut controller, LOOP_MOUSE), [0; 0]);
    controller.write(DATA, &[0x5a]);
    assert_eq!(status(&mut controller) & (OUTPUT_FULL | 1 << 5), OUTPUT_FULL, "not from a mouse");
    assert_eq!(drain(&mut controller), [0x5a]);
    assert_eq!(command(&mut controller, WRITE_MOUSE), [0; 0]);
    assert_eq!(data(&mut controller, RESET_COMMAND), [0; 0], "what is for a mouse is not for the keyboard");
}

#[test]
fn command_byte_is_read_as_it_was_written() {
    let (mut controller, _) = controller();
    let initial = SYSTEM | KEYBOARD_OFF | MOUSE_OFF | TRANSLATE;
    assert_eq!(command(&mut controller, READ_COMMAND_BYTE), [initial]);
    command(&mut controller, ENABLE_KEYBOARD);
    assert_eq!(command(&mut controller, READ_COMMAND_BYTE), [initial & !KEYBOARD_OFF]);
    command(&mut controller, DISABLE_KEYBOARD);
    assert_eq!(command(&mut controller, READ_COMMAND_BYTE), [initial]);
    command(&mut controller, WRITE_COMMAND_BYTE);
    assert_eq!(data(&mut controller, 0xa5), [0; 0]);
    assert_eq!(command(&mut controller, READ_COMMAND_BYTE), [0xa5]);
}

#[test]
fn keyboard_answers_what_a_driver_asks_before_it_binds() {
    for (translate, identity) in [(false, 0x83), (true, 0x41)] {
        let (mut controller, _) = controller();
        enable(&mut controller, translate);
        for (written, read) in [
            (0xff, &[0xfa, 0xaa][..]),
            (0xf2, &[0xfa, 0xab, identity]),
            (0xee, &[0xee]),
            (0xed, &[0xfa]),
            (0x07, &[0xfa]),
            (0xf3, &[0xfa]),
            (0x00, &[0xfa]),
            (0xf5, &[0xfa]),
            (0xf0, &[0xfa]),
            (0x03, &[0xfa]),
            (0xf0, &[0xfa]),
            (0x00, if translate { &[0xfa, 0x41] } else { &[0xfa, 0x02] }),
            (0xf6, &[0xfa]),
            (0xf4, &[0xfa]),
            (0xea, &[0xfe]),
        ] {
            assert_eq!(data(&mut controller, written), read, "{written:#x}");
        }
    }
}

#[test]
fn every_byte_that_waits_has_its_interrupt_once_the_guest_wants_them() {
    let (mut controller, line) = controller();
    enable(&mut controller, true);
    line.interrupts();
    controller.write(DATA, &[IDENTIFY]);
    for left in (0..3).rev() {
        assert_eq!(line.interrupts(), 1, "{left} bytes are left behind this one");
        controller.read(DATA, &mut [0]);
    }
    assert_eq!((line.interrupts(), status(&mut controller) & OUTPUT_FULL), (0, 0));

    command(&mut controller, WRITE_COMMAND_BYTE);
    data(&mut controller, 0);
    line.interrupts();
    controller.write(DATA, &[IDENTIFY]);
    assert_eq!(line.interrupts(), 0, "the guest does not want them");
    controller.write(COMMAND, &[WRITE_COMMAND_BYTE]);
    controller.write(DATA, &[KEYBOARD_INTERRUPT]);
    assert_eq!(line.interrupts(), 1, "now it does");
}

#[test]
fn keyboard_that_is_off_keeps_its_bytes_and_the_controllers_answer_comes_first() {
    let (mut controller, _) = controller();
    enable(&mut controller, true);
    controller.write(DATA, &[0xee]);
    assert_eq!(command(&mut controller, DISABLE_KEYBOARD), [0; 0]);
    assert_eq!(command(&mut controller, TEST_CONTROLLER), [0x55]);
    controller.write(COMMAND, &[TEST_KEYBOARD]);
    assert_eq!(command(&mut controller, ENABLE_KEYBOARD), [0, 0xee]);
}

#[test]
fn ctrl_alt_del_goes_down_and_up_in_the_guests_scancodes() {
    for (translate, keys) in [
        (false, &[0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14][..]),
        (true, &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d]),
    ] {
        let (mut controller, line) = controller();
        enable(&mut controller, translate);
        line.interrupts();
        controller.press_ctrl_alt_del().unwrap();
        assert_eq!(line.interrupts(), 1);
        assert_eq!(drain(&mut controller), keys);
        controller.press_ctrl_alt_del().expect("there is room again");
    }
}

#[test]
fn keys_that_the_guest_would_not_hear_are_not_pressed() {
    let off: [fn(&mut Controller); 4] = [
        |_| (),
        |controller| drop(command(controller, ENABLE_KEYBOARD)),
        |controller| {
            enable(controller, true);
            command(controller, DISABLE_KEYBOARD);
        },
        |controller| {
            enable(controller, true);
            data(controller, 0xf5);
        },
    ];
    for (index, make) in off.into_iter().enumerate() {
        let (mut controller, line) = controller();
        make(&mut controller);
        line.interrupts();
        let before = controller.save();
        assert_eq!(controller.press_ctrl_alt_del(), Err(KeyboardError::Off), "{index}");
        assert_eq!((controller.save(), line.interrupts()), (before, 0), "{index}");
    }
}

#[test]
fn keys_for_which_there_is_no_room_are_not_pressed_in_part() {
    let (mut controller, _) = controller();
    enable(&mut controller, false);
    controller.press_ctrl_alt_del().unwrap();
    let before = controller.save();
    assert_eq!(controller.press_ctrl_alt_del(), Err(KeyboardError::Full));
    assert_eq!(controller.save(), before);
}

#[test]
fn guest_that_never_reads_loses_answers_and_nothing_else() {
    let (mut controller, _) = controller();
    enable(&mut controller, true);
    for _ in 0..1000 {
        controller.write(DATA, &[0xee]);
    }
    assert_eq!(drain(&mut controller), [0xee; BUFFER_LEN]);
    assert_eq!(data(&mut controller, 0xee), [0xee]);
}

#[test]
fn restored_controller_goes_on_with_what_is_unread_and_raises_its_interrupt_again() {
    let (mut old, _) = controller();
    enable(&mut old, true);
    old.write(DATA, &[0xed]);
    old.press_ctrl_alt_del().unwrap();
    old.write(COMMAND, &[TEST_CONTROLLER]);
    old.write(COMMAND, &[WRITE_COMMAND_BYTE]);

    let (mut new, line) = controller();
    new.restore(&old.save()).unwrap();

    assert_eq!(line.interrupts(), 1);
    assert_eq!(new.save(), old.save());
    assert_eq!(drain(&mut new), [0x55, 0xfa, 0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d]);
    data(&mut new, KEYBOARD_INTERRUPT | TRANSLATE);
    assert_eq!(command(&mut new, READ_COMMAND_BYTE), [KEYBOARD_INTERRUPT | TRANSLATE]);
    assert_eq!(data(&mut new, 0x07), [0xfa], "LEDs, whose command came before");
    assert_eq!(data(&mut new, 0x07), [0xfe], "no command");
}

#[test]
fn state_with_more_than_the_buffer_holds_is_refused() {
    let (mut controller, line) = controller();
    let before = controller.save();
    let keyboard = Keyboard { waiting: 17, ..Keyboard::default() };
    let state = I8042State { command_byte: KEYBOARD_INTERRUPT, keyboard, ..before };
    assert!(matches!(controller.restore(&state), Err(I8042RestoreError::State(17))));
    assert_eq!((controller.save(), line.interrupts()), (before, 0));
}

proptest! {
    #[test]
    fn whatever_a_guest_does_the_buffer_is_bounded_and_its_twin_answers_alike(
        accesses in prop::collection::vec((any::<bool>(), 0..I8042_LEN, any::<u8>(), 0..4_usize), 0..200),
        press_at in 0..200_usize,
    ) {
        let ((mut controller, _), (mut twin, _)) = (controller(), controller());
        for (index, (write, offset, value, len)) in accesses.into_iter().enumerate() {
            if index == press_at {
                let _ = controller.press_ctrl_alt_del();
            }
            twin.restore(&controller.save()).unwrap();
            let (mut ours, mut theirs) = (vec![value; len], vec![value; len]);
            if write {
                controller.write(offset, &ours);
                twin.write(offset, &theirs);
            } else {
                controller.read(offset, &mut ours);
                twin.read(offset, &mut theirs);
            }
            prop_assert_eq!(ours, theirs);
            prop_assert_eq!(controller.save(), twin.save());
            prop_assert!(usize::from(controller.save().keyboard.waiting) <= BUFFER_LEN);
        }
        drain(&mut controller);
    }
}
