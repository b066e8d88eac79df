# The drill "watchdog": what host/watchdog does, seen from outside.

# Seconds after which the watchdog resets the host, as host/watchdog has it.
readonly watchdog_seconds=8

lay_out_watchdog() {
    local dir=$1
    rm -rf "$dir/layer"
    mkdir -p "$dir/layer/lib/modules"
    cp "$cache"/kernel/modules/{watchdog,softdog}.ko "$dir/layer/lib/modules"
    pack "$dir/layer" "$dir/layer.cpio"
    {
        printf 'arguments=%q\n' "$linux_args $workload_args cpus=1"
        cat "$here/host/watchdog"
    } >"$dir/drill"
    lay_out_host "$dir" "$dir/layer.cpio" -- "$(binary understudy)"
}

drill_watchdog() {
    drill_prepare
    local dir="$cache/watchdog" run
    for ((run = 1; run <= runs; run++)); do
        lay_out_watchdog "$dir"
        say "starting the virtual host (its console: $dir/console.log)"
        virtual_host "$dir" 300 -nic none && say "the virtual host came to its end by itself"
        judge_watchdog "$dir"
    done
}

# judge_watchdog DIRECTORY: from what the host told before its end.
judge_watchdog() {
    local dir=$1 status lived
    said() { results_of "$dir" "$1" | tail -n 1; }
    [ "$(said petted)" = 0 ] && status=true || status=false
    report_check watchdog petted $status "a watchdog is armed while the guest is protected, and petted: $(said petted)"
    [[ $(said alone) == [1-9]* ]] && status=true || status=false
    report_check watchdog alone $status "it is disarmed when the guest is alone: $(said alone)"
    [[ $(said ended) == 1 ]] && status=true || status=false
    report_check watchdog ended $status "a primary that is ended in order disarms it: $(said ended)"
    lived=$(said lived)
    if [[ $(said stopped) == [0-9]* ]] && [ "${lived:-0}" -le $((watchdog_seconds + 1)) ] &&
        ! results_of "$dir" late | grep -q . && ! grep -qsx 'end 0' "$dir/results"; then
        report_check watchdog stopped true "a primary that is stopped takes its host with it after ${lived:-0} s, before the standby goes on"
    else
        report_check watchdog stopped false "the host of a primary that was stopped lived on for ${lived:-no} s; see $dir/console.log"
    fi
}
