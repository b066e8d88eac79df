#!/usr/bin/env bash
# The guest is handed over to the other side and back, again and again: as for maintenance of one host after the other.
#
# usage: switchover.sh --primary SOCKET --standby SOCKET [--rounds N] [OPTION...]
#   --rounds N              how often (default: 1); for more than one, each side must know the other as a standby, so that
#                           the guest is protected again after each
#
# Does: understudy switchover. Measures: the pause that the sides report, and the longest time for which the service did not
# answer. Must hold: the other side runs the guest, this one does not; no acknowledged count is gone. Changes for good: after
# an odd number of rounds the guest runs on the other side.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
rounds=1
own_option() {
    case $1 in
    --rounds) rounds=$2 taken=2 ;;
    esac
}
parse "$@"
[[ $rounds =~ ^[1-9][0-9]*$ ]] || wrong_usage "--rounds is a number from 1 on"
begin "$rounds switchovers"
from=primary to=standby
for ((round = 1; round <= rounds; round++)); do
    [ "$round" = 1 ] || await "the guest is protected again" in_phase "$from" lockstep
    harm "switchover $round from the first $from to the first $to"
    on "$from" "$understudy" switchover --api-sock "${socket[$from]}" || fail "the guest was not handed over"
    await "the other side runs the guest" runs_guest "$to"
    say "it runs there after $(since_harm) ms"
    handed_over() { ! runs_guest "$from"; }
    await "this side does not" handed_over
    answers_go_on
    read -r from to <<<"$to $from"
done
check_answers
say "passed"
