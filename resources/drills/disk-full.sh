#!/usr/bin/env bash
# The disk to which a side writes becomes full: the guest's image, a journal, events.
#
# usage: disk-full.sh --primary SOCKET --standby SOCKET --folder FOLDER [--side SIDE] [--for SECONDS] [OPTION...]
#   --folder FOLDER         a folder of the file system that is filled
#   --side SIDE             on whose host it is: primary (default) or standby
#   --for SECONDS           how long it is full (default: 5)
#
# Does on that host: fills the file system with one file. Measures: the longest time for which the service did not answer.
# Must hold: the guest still runs on exactly one side; no acknowledged count is gone. Whether the guest is still protected is
# told. Restores: the file is removed.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
folder='' where=primary for=5
own_option() {
    case $1 in
    --folder) folder=$2 taken=2 ;;
    --side) where=$2 taken=2 ;;
    --for) for=$2 taken=2 ;;
    esac
}
parse "$@"
[ -n "$folder" ] || wrong_usage "give --folder"
[[ $where =~ ^(primary|standby)$ ]] || wrong_usage "--side is primary or standby"
filler=$folder/understudy-drill-filler
restore() { on "$where" rm -f "$filler"; }
begin "the file system of $folder is filled, on the host of the $where, for $for s"
harm "full"
# It ends when there is no room any more.
on "$where" dd if=/dev/zero of="$filler" bs=64K 2>/dev/null || true
on "$where" dd if=/dev/zero of="$filler" bs=512 oflag=append conv=notrunc 2>/dev/null || true
sleep "$for"
restore
say "there is room again"
one() { runs_guest primary || is standby active; }
await "one side runs the guest" one
answers_go_on
if runs_guest primary && is standby active; then fail "both sides run the guest"; fi
if in_phase primary lockstep; then say "the guest was protected all the while"; else say "the guest is NOT protected any more"; fi
check_answers
say "passed"
