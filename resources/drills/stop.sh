#!/usr/bin/env bash
# The primary stands still and wakes up later, when another side has the guest: SIGSTOP, SIGCONT.
#
# usage: stop.sh --primary SOCKET --standby SOCKET [--asleep SECONDS] [OPTION...]
#   --asleep SECONDS        how long it stands still after the standby has taken over (default: 2)
#
# Does to the primary: SIGSTOP, SIGCONT. Measures: the time until the standby runs the guest, and the longest time for which
# the service did not answer. Must hold: the standby runs the guest; the primary does not when it wakes up: it has ended, is
# frozen, or waits as a standby; no acknowledged count is gone. Restores: SIGCONT.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
asleep=2
own_option() {
    case $1 in
    --asleep) asleep=$2 taken=2 ;;
    esac
}
parse "$@"
pid=$(process primary)
restore() { on primary kill -CONT "$pid" 2>/dev/null || true; }
begin "SIGSTOP to process $pid, the primary; SIGCONT $asleep s after the takeover"
harm "SIGSTOP"
on primary kill -STOP "$pid"
await "the standby runs the guest" is standby active
say "the standby runs the guest after $(since_harm) ms"
answers_go_on
sleep "$asleep"
say "SIGCONT"
on primary kill -CONT "$pid"
does_not_run() { ! runs_guest primary; }
await "the old primary stops" does_not_run
answers_go_on
runs_guest standby || fail "the standby does not run the guest any more"
check_answers
say "passed"
