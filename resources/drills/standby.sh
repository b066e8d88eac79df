#!/usr/bin/env bash
# The standby dies; a new one is attached, and the guest is protected again.
#
# usage: standby.sh --primary SOCKET --standby SOCKET --start COMMAND --attach ADDRESS [--witness WITNESS] [OPTION...]
#   --start COMMAND         starts a new standby; it may go on in the background
#   --attach ADDRESS        where that listens: unix:PATH or tcp:HOST:PORT
#   --witness WITNESS       the guest's witness, as for `understudy attach`
#
# Does to the standby: SIGKILL. Measures: the time until the guest goes on alone, the longest time for which the service did
# not answer, and the time until it is protected again. Must hold: the guest goes on where it is; it is protected by the new
# standby in the end; no acknowledged count is gone. Changes for good: the standby is another process.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
start='' address='' witness=()
own_option() {
    case $1 in
    --start) start=$2 taken=2 ;;
    --attach) address=$2 taken=2 ;;
    --witness) witness=(--witness "$2") taken=2 ;;
    esac
}
parse "$@"
if [ -z "$start" ] || [ -z "$address" ]; then wrong_usage "give --start and --attach"; fi
pid=$(process standby)
begin "SIGKILL to process $pid, the standby; then a new one is attached"
harm "SIGKILL"
on standby kill -KILL "$pid"
await "the guest goes on alone" in_phase primary solo
say "the guest goes on alone after $(since_harm) ms"
answers_go_on
sh -c "$start"
harm "a new standby is attached"
attached() {
    on primary "$understudy" attach --api-sock "${socket[primary]}" --standby "$address" "${witness[@]}" >/dev/null 2>"$work/attach"
}
await "the new standby is attached" attached
await "the guest is protected" in_phase primary lockstep
say "the guest is protected again after $(since_harm) ms"
answers_go_on
check_answers
say "passed"
