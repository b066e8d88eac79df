#!/usr/bin/env bash
# The link between the two sides is cut, one way or both; everything else still works.
#
# usage: cut.sh --primary SOCKET --standby SOCKET --port PORT [--way WAY] [--apart SECONDS] [OPTION...]
#   --port PORT             the TCP port at which the standby listens
#   --way WAY               both, to-standby or to-primary (default: both)
#   --apart SECONDS         how long it stays cut after the decision (default: 2)
#
# Does on the standby's host: drops packets of that port, by a table of nftables of its own (or by rules of iptables, where
# there is no nft). Measures: the time until one side goes on. Must hold: exactly one side runs the guest, also after the
# link is back; no acknowledged count is gone. Restores: the rules go.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
port='' way=both apart=2
own_option() {
    case $1 in
    --port) port=$2 taken=2 ;;
    --way) way=$2 taken=2 ;;
    --apart) apart=$2 taken=2 ;;
    esac
}
parse "$@"
[[ $port =~ ^[0-9]+$ ]] || wrong_usage "give --port, a number"
[[ $way =~ ^(both|to-standby|to-primary)$ ]] || wrong_usage "--way is both, to-standby or to-primary"

# The chains and what of a packet must match, one pair a line.
rules() {
    if [ "$way" != to-primary ]; then echo "input dport"; fi
    if [ "$way" != to-standby ]; then echo "output sport"; fi
}
cut() {
    if on standby sh -c 'command -v nft' >/dev/null; then
        on standby nft add table inet understudy_drill
        rules | while read -r chain match; do
            on standby nft "add chain inet understudy_drill $chain { type filter hook $chain priority 0 ; }"
            on standby nft "add rule inet understudy_drill $chain tcp $match $port drop"
        done
    else
        rules | while read -r chain match; do
            on standby iptables -I "${chain^^}" -p tcp "--$match" "$port" -j DROP
        done
    fi
}
heal() {
    if on standby sh -c 'command -v nft' >/dev/null; then
        on standby nft delete table inet understudy_drill 2>/dev/null || true
    else
        rules | while read -r chain match; do
            on standby iptables -D "${chain^^}" -p tcp "--$match" "$port" -j DROP 2>/dev/null || true
        done
    fi
}
restore() { heal; }
is_solo() { in_phase primary solo; }
decided() { is standby active || is_solo; }
both() { is standby active && runs_guest primary; }

begin "packets of port $port are dropped on the standby's host, $way"
harm "cut"
cut
await "one side goes on" decided
say "decided after $(since_harm) ms"
answers_go_on
sleep "$apart"
say "healed"
heal
if is standby active; then
    say "the standby runs the guest"
    alone() { ! runs_guest primary; }
    await "the primary stops" alone
else
    say "the primary runs the guest, without a standby; attach one"
fi
! both || fail "both sides run the guest"
answers_go_on
check_answers
say "passed"
