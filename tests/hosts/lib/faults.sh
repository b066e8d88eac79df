# The runs of the drill "two-hosts": a guest that serves Redis is mirrored from one virtual host to another, something happens to
# the one, and what clients and the switch got to hear is judged. The guest goes on from run to run where it can.

# The side on which the guest runs, empty if there is no guest.
live=

redis_drill() { "$(binary redis-drill)" "$@"; }
vmm_told() { on "$1" "grep '\"event\":\"$2\"' /tmp/vmm.events"; }
# Protected after the last time that it was without protection.
vmm_protects() {
    [ "$(on "$1" "grep -oE '\"event\":\"(active|solo|standby_lost|suspended|unprotected|protected)\"' /tmp/vmm.events | tail -n 1")" = '"event":"protected"' ]
}
vmm_says() { on "$1" 'tail -n 3 /tmp/vmm.err' || true; }

# How the guest is mirrored, from either side. Gentle enough for emulation within emulation.
readonly pair_pace=(interval_ms 200 min_interval_ms 50 heartbeat_ms 500 heartbeat_misses 6 stall_ms 5000)

# configure_vmm SIDE: the guest's configuration for a side.
configure_vmm() {
    local peer
    peer=$(other_side "$1")
    on "$1" "cat >/tmp/config.json <<'JSON'
{
  \"boot-source\": {
    \"kernel_image_path\": \"/guest/vmlinux\", \"initrd_path\": \"/guest/redis.cpio\",
    \"boot_args\": \"$linux_args\"
  },
  \"machine-config\": { \"vcpu_count\": 1, \"mem_size_mib\": 256, \"track_dirty_pages\": true },
  \"network-interfaces\": [
    { \"iface_id\": \"eth0\", \"host_dev_name\": \"tap0\", \"guest_mac\": \"$pair_guest_mac\" }
  ],
  \"drives\": [
    { \"drive_id\": \"data\", \"path_on_host\": \"/disk/data.img\", \"is_root_device\": false, \"cache_type\": \"Writeback\",
      \"replication\": { \"mode\": \"replicated\" } }
  ],
  \"entropy\": {},
  \"mirror\": {
    $(printf '"%s": %s, ' "${pair_pace[@]}")
    \"standby\": \"$(mirror_address "$peer")\", \"listen\": \"$(mirror_address "$1")\",
    \"witness\": \"$pair_witness\", \"guid\": \"$guid\", \"delay_ms\": 8000
  }
}
JSON"
}

# mirror_address SIDE: where it waits as a standby.
mirror_address() { echo "tcp:10.78.1.1${host_number[$1]}:7000"; }

# A host waits for the guest of the other one, and will be mirrored to that once the guest runs here.
start_standby_on() {
    on "$1" "start vmm understudy standby --listen $(mirror_address "$1") --standby $(mirror_address "$(other_side "$1")") \
        --witness $pair_witness $(printf -- '--%s %s ' "${pair_pace[@]//_/-}") \
        --name host-$1 --net eth0=tap0 --drive data=/disk/data.img --events /tmp/vmm.events --api-sock /tmp/vmm.sock"
    within 20 vmm_told "$1" listening
}

end_pair() {
    local side
    live=
    for side in a b; do
        host_is_up "$side" && on "$side" 'finish vmm; rm -f /tmp/vmm.* /tmp/config.json' || true
        open_ports "$side"
    done
}

redis_answers() {
    [ "$(outside timeout 5 bash -c 'exec 3<>/dev/tcp/10.78.0.2/6379 && printf "PING\r\n" >&3 && head -n 1 <&3')" = $'+PONG\r' ]
}

# start_pair SIDE: a new guest on that side, mirrored to the other.
start_pair() {
    local side=$1
    ensure_hosts
    end_pair
    guid=$(cat /proc/sys/kernel/random/uuid)
    configure_vmm "$side"
    new_drive "$side" empty && new_drive "$(other_side "$side")" blank || return 1
    start_standby_on "$(other_side "$side")" || return 1
    on "$side" 'start vmm understudy run --config-file /tmp/config.json --events /tmp/vmm.events --api-sock /tmp/vmm.sock'
    within 90 redis_answers && within 90 vmm_told "$side" protected || return 1
    live=$side
}

# The faults, and their ends.
fault_power() { kill_host "$1"; }
undo_power() {
    wait "${pair_job[$1]}" || true
    boot_host "$1"
    within 90 host_is_up "$1" && start_standby_on "$1"
}
fault_port() { port clients "$1" disabled && port mirror "$1" disabled; }
undo_port() { port clients "$1" forwarding && port mirror "$1" forwarding; }
fault_link() { port mirror "$1" disabled; }
undo_link() { port mirror "$1" forwarding; }

history_has_lines() { [ "$(wc -l <"$clients/history")" -ge "$1" ]; }
# goes_on_somewhere PRIMARY: and says where.
goes_on_somewhere() {
    local primary=$1 standby
    standby=$(other_side "$1")
    if vmm_told "$standby" active >/dev/null; then
        echo "$standby"
    else
        [ "$fault" != power ] && vmm_told "$primary" solo >/dev/null && echo "$primary"
    fi
}

# complain TEXT: something that the drill itself found wrong.
complain() { complaints+=("$1"); }

run_fault() {
    local fault=$1 run=$2 primary standby
    local complaints=() fault_us=0 back_us=null now_us offset_a=0 offset_b=0 loader side
    clients="$pair_dir/$run-$fault"
    rm -rf "$clients"
    mkdir -p "$clients"
    if [ -z "$live" ] && ! start_pair a; then
        keep_events
        return 1
    fi
    primary=$live standby=$(other_side "$live")

    start_client watch "$(binary redis-drill)" watch "$pair_guest_mac" "$clients/frames" a=clients-a b=clients-b
    start_client load "$(binary redis-drill)" load 10.78.0.2:6379 "$run-$fault/" "$clients/history" "$clients/stop"
    loader=${client_pids[-1]}
    within 60 history_has_lines 60 || complain "clients get no answers before the fault"
    for side in a b; do
        on "$side" ': >/tmp/vmm.events'
    done
    offset_a=$(outside "$(binary redis-drill)" offset 10.78.2.11:7004) || complain "host a does not tell its time"
    offset_b=$(outside "$(binary redis-drill)" offset 10.78.2.12:7004) || complain "host b does not tell its time"
    sleep "$((RANDOM % 2)).$((RANDOM % 10))"

    fault_us=$(redis_drill clock)
    "fault_$fault" "$primary"
    if within 60 goes_on_somewhere "$primary"; then
        live=$(goes_on_somewhere "$primary")
        now_us=$(redis_drill clock)
        within 60 redis_drill answered "$clients/history" "$now_us" || complain "no client gets an answer after the fault"
        guest_is_behind "$live" || complain "the switch has the guest behind the port of '$(guest_port)', and it runs on $live"
        sleep 2
    else
        live=
        complain "the guest goes on nowhere: a: $(vmm_says a); b: $(vmm_says b)"
    fi

    # What has come back must not speak for the guest.
    keep_events
    back_us=$(redis_drill clock)
    "undo_$fault" "$primary" || complain "the host is not back"
    if [ -n "$live" ]; then
        within 90 vmm_protects "$live" || complain "the guest is not protected again: $live: $(vmm_says "$live")"
        sleep 2
    fi
    touch "$clients/stop"
    wait "$loader" || complain "a key could not be read in the end"
    keep_events
    stop_clients
    [ -z "$live" ] || check_disk "$live"
    [ -z "$live" ] || guest_is_behind "$live" || complain "in the end the switch has the guest behind '$(guest_port)', and it runs on $live"

    local told=
    for side in "${complaints[@]+"${complaints[@]}"}"; do
        told+="${told:+,}$(json_text "$side")"
    done
    cat >"$clients/run.json" <<JSON
{ "fault": "$fault", "run": $run, "primary": "$primary", "standby": "$standby", "fault_us": $fault_us, "back_us": $back_us,
  "offset_us": { "a": ${offset_a:-0}, "b": ${offset_b:-0} }, "complaints": [$told] }
JSON
    redis_drill judge "$clients" >"$clients/verdict" || { live=; return 1; }
    # Without protection the next fault would be its end.
    [ "$(field outcome "$(cat "$clients/verdict")")" = reprotected ] || live=
}

# keep_events: what both sides told, and said. A host that is off has nothing to add to what is there.
keep_events() {
    local side file
    for side in a b; do
        for file in events err out; do
            fetch_from "$side" "vmm.$file" >"$clients/fetched" 2>/dev/null && [ -s "$clients/fetched" ] || continue
            mv "$clients/fetched" "$clients/$side.$file"
        done
    done
    rm -f "$clients/fetched"
}

# The guest, or a host's kernel, has crashed by the emulation's fault (see README.md), or hangs by it.
emulation_failed() {
    host_has_crashed "$pair_dir/a" || host_has_crashed "$pair_dir/b" || grep -qs 'triple fault' "$clients"/[ab].events "$clients"/[ab].err ||
        { host_runs a && emulation_hangs on a >&2; } || { host_runs b && emulation_hangs on b >&2; }
}

# drill_fault FAULT RUN: a run, and some more if the emulation is at fault; says what came of it.
drill_fault() {
    local line repeats=0
    run_fault "$1" "$2" && report_fault "$(cat "$clients/verdict")" && return
    while emulation_failed && [ "$repeats" -lt "$most_crashes" ]; do
        repeats=$((repeats + 1))
        say "$1, run $2, is run once more: the guest or a virtual host has crashed (see README.md); its records: $clients.crashed"
        rm -rf "$clients.crashed"
        mv "$clients" "$clients.crashed"
        end_hosts
        run_fault "$1" "$2" && report_fault "$(cat "$clients/verdict")" && return
    done
    failures=$((failures + 1))
    line="{\"drill\":\"two-hosts\",\"fault\":\"$1\",\"run\":$2,\"outcome\":\"lost\",\"violations\":1,\"told\":[\"no guest was protected; see $clients\"]}"
    [ ! -s "$clients/verdict" ] || line=$(cat "$clients/verdict")
    report_fault "$line"
    end_hosts
}

# end_hosts: the next run begins with new ones.
end_hosts() {
    local side
    live=
    stop_clients
    for side in a b; do
        ! host_runs "$side" || kill_host "$side" || true
        [ -z "${pair_job[$side]:-}" ] || wait "${pair_job[$side]}" || true
        open_ports "$side"
    done
    pair_job=()
}

report_fault() {
    local line=$1
    if "$json"; then
        printf '%s\n' "$line"
        return
    fi
    printf '%-6s run %s  %-11s on %s after %s: noticed %s, resumed %s, answered %s, protected again %s ms; %s requests, %s unanswered; violations %s\n' \
        "$(field fault "$line")" "$(field run "$line")" "$(field outcome "$line")" "$(field live "$line")" "$(field primary "$line")" \
        "$(field detected_ms "$line")" "$(field resumed_ms "$line")" "$(field answered_ms "$line")" \
        "$(field reprotected_ms "$line")" "$(field requests "$line")" "$(field unanswered "$line")" "$(field violations "$line")"
    printf '       drive: %s of %s MiB sent to the host that is back (%s), %s keys found on it\n' "$(field drive_sent_mib "$line")" \
        "$(field drive_mib "$line")" "$(field drive_sync "$line")" "$(field drive_keys "$line")"
    sed -n 's/.*"told":\[\(.\+\)\]}$/  \1/p' <<<"$line"
}
