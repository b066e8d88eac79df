#!/usr/bin/env bash
# The witness is out of reach while a side dies: the other must not go on before it is back.
#
# usage: witness.sh --primary SOCKET --standby SOCKET (--file PATH | --away COMMAND --back COMMAND) [--kill SIDE]
#                   [--for SECONDS] [OPTION...]
#   --file PATH             the witness is this file: its folder is renamed, on this machine (a folder that is mounted on
#                           both sides, with nothing else in it)
#   --away, --back COMMAND  what takes another witness away, such as a rule for the port of etcd, and gives it back
#   --kill SIDE             which side dies: primary (default) or standby
#   --for SECONDS           how long the witness is away (default: 3)
#
# Does: takes the witness away, then SIGKILL to one side. Measures: the time from the witness' return until the other side
# goes on. Must hold: it does not go on before; it does then; no acknowledged count is gone. Restores: the witness.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
file='' away='' back='' victim=primary for=3
own_option() {
    case $1 in
    --file) file=$2 taken=2 ;;
    --away) away=$2 taken=2 ;;
    --back) back=$2 taken=2 ;;
    --kill) victim=$2 taken=2 ;;
    --for) for=$2 taken=2 ;;
    esac
}
parse "$@"
if [ -n "$file" ]; then
    folder=$(dirname "$file")
    away=$(printf 'mv %q %q' "$folder" "$folder.away")
    back=$(printf 'mv %q %q' "$folder.away" "$folder")
fi
if [ -z "$away" ] || [ -z "$back" ]; then wrong_usage "give --file, or --away and --back"; fi
[[ $victim =~ ^(primary|standby)$ ]] || wrong_usage "--kill is primary or standby"
gone=false
restore() {
    if $gone; then sh -c "$back"; fi
    gone=false
}
goes_on() {
    if [ "$victim" = primary ]; then is standby active; else in_phase primary solo; fi
}
pid=$(process "$victim")
begin "the witness is taken away ($away), SIGKILL to process $pid, the $victim, the witness is back $for s later"
sh -c "$away"
gone=true
harm "witness away, SIGKILL to the $victim"
on "$victim" kill -KILL "$pid"
until=$((SECONDS + for))
while [ "$SECONDS" -lt "$until" ]; do
    if goes_on; then fail "the other side went on without the witness"; fi
    sleep 0.1
done
harm "witness back"
restore
await "the other side goes on" goes_on
say "the other side goes on $(since_harm) ms later"
answers_go_on
check_answers
say "passed"
