#!/usr/bin/env bash
# The link between the two sides becomes slow.
#
# usage: slow.sh --primary SOCKET --standby SOCKET --device DEVICE [--rate RATE] [--delay TIME] [--for SECONDS] [OPTION...]
#   --device DEVICE         the network device of the primary's host that leads to the standby
#   --rate RATE             as tc has it (default: 50mbit)
#   --delay TIME            as tc has it; needs netem in the kernel (default: none)
#   --for SECONDS           how long (default: 5)
#
# Does on the primary's host: tc qdisc replace dev DEVICE root, for all that leaves by it. Measures: the longest time for
# which the service did not answer. Must hold: exactly one side runs the guest; no acknowledged count is gone. Whether the
# guest is still protected is told. Restores: tc qdisc del dev DEVICE root (a discipline that was set there before is lost).
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
device='' rate=50mbit delay='' for=5
own_option() {
    case $1 in
    --device) device=$2 taken=2 ;;
    --rate) rate=$2 taken=2 ;;
    --delay) delay=$2 taken=2 ;;
    --for) for=$2 taken=2 ;;
    esac
}
parse "$@"
[ -n "$device" ] || wrong_usage "give --device"
restore() { on primary tc qdisc del dev "$device" root 2>/dev/null || true; }
begin "$device of the primary's host is limited to $rate${delay:+, delayed by $delay}, for $for s"
harm "slow"
if [ -n "$delay" ]; then
    on primary tc qdisc replace dev "$device" root netem delay "$delay" rate "$rate"
else
    on primary tc qdisc replace dev "$device" root tbf rate "$rate" burst 64kb latency 200ms
fi
sleep "$for"
restore
say "as fast as before"
one() { runs_guest primary || is standby active; }
await "one side runs the guest" one
answers_go_on
if runs_guest primary && is standby active; then fail "both sides run the guest"; fi
if in_phase primary lockstep; then
    say "the guest was protected all the while"
elif is standby active; then
    say "so slow that it counted as lost: the standby runs the guest"
else
    say "so slow that it counted as lost: the primary runs the guest, without a standby; attach one"
fi
check_answers
say "passed"
