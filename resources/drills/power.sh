#!/usr/bin/env bash
# The host of the primary loses its power.
#
# usage: power.sh --primary SOCKET --standby SOCKET [--off COMMAND] [--on COMMAND] [OPTION...]
#   --off COMMAND           what takes the power away: ipmitool ... power off, virsh destroy ..., kill -9 of a QEMU. Without
#                           it, the primary's host (--primary-host) is asked to reset itself at once, by sysrq
#   --on COMMAND            what gives it back in the end
#
# Does to the host of the primary: all of it stops at once. Measures: the time until the standby runs the guest (its peer
# says nothing any more: no connection is closed), and the longest time for which the service did not answer. Must hold: the
# standby runs the guest; no acknowledged count is gone. Restores: --on. Changes for good: the guest runs on the other side.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
off='' power_on=''
own_option() {
    case $1 in
    --off) off=$2 taken=2 ;;
    --on) power_on=$2 taken=2 ;;
    esac
}
parse "$@"
[ -n "$off" ] || [ -n "${host[primary]}" ] || wrong_usage "give --off, or --primary-host"
restore() { [ -z "$power_on" ] || sh -c "$power_on"; }
begin "the host of the primary stops at once: ${off:-reset of ${host[primary]} by sysrq}"
harm "power off"
if [ -n "$off" ]; then
    sh -c "$off"
else
    # There is no answer to be waited for.
    timeout 3 ssh -o BatchMode=yes "${host[primary]}" 'echo 1 >/proc/sys/kernel/sysrq; echo b >/proc/sysrq-trigger' || true
fi
await "the standby runs the guest" is standby active
say "the standby runs the guest after $(since_harm) ms"
answers_go_on
check_answers
say "passed"
