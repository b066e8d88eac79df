#!/usr/bin/env bash
# The process of the primary dies: kill -9.
#
# usage: kill.sh --primary SOCKET --standby SOCKET [OPTION...]
#
# Does to the primary: SIGKILL. Measures: the time until the standby runs the guest, and the longest time for which the
# service did not answer. Must hold: the standby runs the guest; no acknowledged count is gone. Changes for good: the
# guest runs on the other side, without a standby; start one there, and attach it.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse "$@"
pid=$(process primary)
begin "SIGKILL to process $pid, the primary"
harm "SIGKILL"
on primary kill -KILL "$pid"
await "the standby runs the guest" is standby active
say "the standby runs the guest after $(since_harm) ms"
answers_go_on
check_answers
say "passed"
