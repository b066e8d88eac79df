# The scenarios of the drill "linux": what is done to the guest, and what must hold then. Everything is seen from outside; the
# virtual host is told what to do by `host`.

# The name of the scenario that runs, whether its guest, or the virtual host itself, has crashed by the emulation's fault (see
# README.md), and how often that has happened: then it is run anew, and must pass as a whole. What crashes once more has failed.
scenario=
crashed=false
crashes=0
# The virtual host has to be started anew.
host_lost=false

# since MOMENT: milliseconds since a moment of $EPOCHREALTIME.
since() { awk -v start="$1" -v now="$EPOCHREALTIME" 'BEGIN { print int((now - start) * 1000) }'; }

# emulation_at_fault: whether and how the emulation has ended the scenario (see README.md).
emulation_at_fault() {
    local hung
    if host_has_crashed "$linux_dir"; then
        echo "the kernel of the virtual host has crashed (its console: $linux_dir/console.crashed.log)"
    elif { told first ended || told second ended; } | grep -q 'triple fault'; then
        echo "its guest has crashed"
    elif hung=$(emulation_hangs host); then
        echo "the virtual host hangs: $hung"
    else
        return 1
    fi
}

# check TEXT COMMAND...: one promise; what the command prints is told if it is broken.
check() {
    local text=$1 said reason
    shift
    ! $crashed || return 1
    if said=$("$@" 2>&1); then
        report_check linux "$scenario" true "$text"
        return
    elif ! reason=$(emulation_at_fault); then
        report_check linux "$scenario" false "$text: $(tail -n 3 <<<"$said" | tr '\n' ' ')"
    elif [ "$crashes" -eq "$most_crashes" ]; then
        report_check linux "$scenario" false "$text: $reason, as $crashes times before"
    else
        say "$scenario is run once more: $reason ($text)"
        crashed=true
    fi
    if [[ ${reason:-} == *"virtual host"* ]]; then
        # It may hang.
        kill -9 "$(cat "$linux_dir/pid")" 2>/dev/null || true
        host_lost=true
    fi
    return 1
}

# run_scenario NAME: from a new guest's disk to the end of all its processes. What they said stays in $linux_dir/NAME.
run_scenario() {
    crashes=0
    while true; do
        ! $host_lost || restart_host || return
        run_scenario_once "$1"
        $crashed || return 0
        crashes=$((crashes + 1))
    done
}

run_scenario_once() {
    local side file
    scenario=$1
    crashed=false
    clients="$linux_dir/$scenario"
    rm -rf "$clients"
    mkdir -p "$clients"
    ping_every_ms=200
    check "the virtual host has disks for it" \
        host 'cp /guest/linux.ext4 /tmp/root.ext4 && cp /guest/linux.qcow2 /tmp/qcow2' || return 0
    "scenario_$scenario"
    stop_clients
    for side in first second; do
        for file in out err events; do
            fetch "$side.$file" >"$clients/$side.$file" 2>/dev/null || rm "$clients/$side.$file"
        done
    done
    host 'for side in first second calls; do finish $side; done
        cd /tmp && rm -rf first.* second.* calls.* vsock.* root.ext4 qcow2 spare.* witness* snapshot* standby.sock' || true
}

# configure TAP [MIRROR]: the guest's configuration, with its first network card on TAP and with the text MIRROR as its last
# section.
configure() {
    host "cat >/tmp/config.json <<'JSON'
{
  \"boot-source\": {
    \"kernel_image_path\": \"/guest/vmlinux\", \"initrd_path\": \"/guest/linux.cpio\",
    \"boot_args\": \"console=ttyS0 quiet reboot=k panic=-1 nokaslr pci=off i8042.noaux i8042.nomux\"
  },
  \"machine-config\": { \"vcpu_count\": 2, \"mem_size_mib\": 256, \"track_dirty_pages\": true },
  \"drives\": [
    { \"drive_id\": \"root\", \"path_on_host\": \"/tmp/root.ext4\", \"is_root_device\": true, \"cache_type\": \"Writeback\" },
    { \"drive_id\": \"qcow2\", \"path_on_host\": \"/tmp/qcow2\", \"is_root_device\": false, \"cache_type\": \"Writeback\" },
    { \"drive_id\": \"spare\", \"path_on_host\": \"/tmp/spare.one\", \"is_root_device\": false }
  ],
  \"network-interfaces\": [
    { \"iface_id\": \"eth0\", \"host_dev_name\": \"$1\", \"guest_mac\": \"02:00:00:00:77:02\" }
  ],
  \"vsock\": { \"guest_cid\": 3, \"uds_path\": \"/tmp/vsock.first\" },
  \"mmds-config\": { \"version\": \"V2\", \"network_interfaces\": [\"eth0\"] },
  \"entropy\": {},
  \"balloon\": { \"amount_mib\": 0, \"deflate_on_oom\": true, \"free_page_reporting\": true }${2:+,
  $2}
}
JSON
        yes 'one  ' | head -c 1048576 >/tmp/spare.one
        yes 'two  ' | head -c 2097152 >/tmp/spare.two"
}

# Gentle enough for emulation within emulation.
readonly mirror='"mirror": {
    "standby": "unix:/tmp/standby.sock", "witness": "/tmp/witness", "guid": "00000000-0000-4000-8000-000000000077",
    "delay_ms": 15000, "interval_ms": 200, "min_interval_ms": 100, "heartbeat_ms": 500, "heartbeat_misses": 6
  }'

start_guest() {
    host 'start first understudy run --config-file /tmp/config.json --serial-in --events /tmp/first.events \
        --api-sock /tmp/first.sock'
}

start_standby() {
    host 'start second understudy standby --listen unix:/tmp/standby.sock --witness /tmp/witness --once \
        --net eth0=queues1 --vsock /tmp/vsock.second --events /tmp/second.events --api-sock /tmp/second.sock'
    within 10 host '[ -S /tmp/standby.sock ]'
}

# clients_are_busy: they are, before something happens to the guest.
clients_are_busy() {
    start_clients
    within 20 client_has_more_ticks 5 && within 20 download_is_running
}

# work_goes_on MS SIDE...: what must hold after something happened for which the guest may have missed pings for MS. It ran
# on the first SIDE, and runs on the last.
work_goes_on() {
    local lost=$(($1 / ping_every_ms + 1))
    shift
    check "a client's connection stays up" ticks_go_on
    check "what a client is told has no gap" ticks_are_whole
    check "a client's download is whole" download_is_whole
    check "at most $lost pings are lost, in one stretch" pings_lost_at_most "$lost"
    check "the guest's counter goes on" goes_on count "$@"
    check "the guest's output has no gap" counts_whole "$@"
    check "the guest goes on writing to its disk" goes_on disk "$@"
    check "the disk returns what was written" disk_is_whole disk "$@"
    check "the guest goes on writing to its qcow2 disk" goes_on qcow2 "$@"
    check "the qcow2 disk returns what was written" disk_is_whole qcow2 "$@"
    check "guest and host reach each other by vsock" vsock_works "${!#}"
    check "random numbers come from the host" random_numbers_come
    check "the guest's metadata is what it was, and its session token good" metadata_is_there
    stop_clients
    check "memory that the guest kept is whole" kept_memory_is_whole
    check "memory that it gave back is good to use again" memory_is_used_again
    ! $long || check "what it does not need goes back to the host" memory_comes_back "${!#}"
    # The keyboard moves, too.
    if [ "$scenario" = failover ]; then
        check "the guest switches itself off when Ctrl-Alt-Del is pressed" heeds_ctrl_alt_del "${!#}"
    else
        check "the guest switches itself off" switches_off "${!#}"
    fi && check "its file systems are in order" disks_are_consistent
}

scenario_boot() {
    configure queues0
    start_guest
    check "comes up with 2 processors, its root on the disk, and answers pings" comes_up || return 0
    check "a user logs in on the serial console" logs_in
    check "a file is downloaded whole" downloads
    check "guest and host reach each other by vsock" vsock_works first
    check "the guest writes to its disk" goes_on disk first
    check "the disk returns what was written" disk_is_whole disk first
    check "the guest writes to its qcow2 disk" goes_on qcow2 first
    check "the qcow2 disk returns what was written" disk_is_whole qcow2 first
    check "random numbers come from the host" random_numbers_come
    check "the guest reads metadata with a session token" reads_metadata
    check "the network card has a queue for each processor" card_has_queues 2
    check "what the guest does not need goes back to the host" memory_comes_back first
    check "memory that it gave back is good to use again" memory_is_used_again
    check "a disk is changed while the guest runs" disk_is_changed
    check "a disk is limited while the guest runs" disk_is_limited
    check "a network card is limited while the guest runs" card_is_limited
    check "the guest switches itself off when Ctrl-Alt-Del is pressed" heeds_ctrl_alt_del first &&
        check "its file systems are in order" disks_are_consistent
}

# snapshot NAME [OPTION...]: takes one, to /tmp/snapshot.NAME.{state,memory}.
snapshot() {
    local name=$1
    shift
    host "understudy snapshot --api-sock /tmp/first.sock --state /tmp/snapshot.$name.state \
        --memory /tmp/snapshot.$name.memory $*" || { complains first; return 1; }
}

# goes_on_from OPTION...: a new process has the guest of snapshot "full" run again.
goes_on_from() {
    host "start second understudy restore --state /tmp/snapshot.full.state --memory /tmp/snapshot.full.memory $* \
        --net eth0=tap1 --vsock /tmp/vsock.second --events /tmp/second.events"
    within 30 answers || { complains second; return 1; }
}

# The guest stands still, is written to a file, and goes on in another process.
scenario_snapshot() {
    configure tap0
    start_guest
    check "comes up" comes_up || return 0
    check "the guest has memory that it keeps" keeps_memory || return 0
    check "the guest reads metadata with a session token" reads_metadata || return 0
    check "clients are busy" clients_are_busy || return 0
    sleep 3
    moment=$EPOCHREALTIME
    check "stands still" host 'understudy pause --api-sock /tmp/first.sock' || return 0
    check "a snapshot is taken" snapshot full || return 0
    host 'finish first'
    check "goes on in a new process" goes_on_from || return 0
    work_goes_on "$(since "$moment")" first second
}

# The same with a snapshot that is taken while the guest runs, and one of what it changed afterwards.
scenario_differential() {
    configure tap0
    start_guest
    check "comes up" comes_up || return 0
    check "the guest has memory that it keeps" keeps_memory || return 0
    check "the guest reads metadata with a session token" reads_metadata || return 0
    check "clients are busy" clients_are_busy || return 0
    check "a snapshot is taken while the guest runs" snapshot full || return 0
    check "the guest goes on" goes_on count first || return 0
    moment=$EPOCHREALTIME
    check "stands still" host 'understudy pause --api-sock /tmp/first.sock' || return 0
    check "a differential snapshot is taken" snapshot diff --diff || return 0
    host 'finish first'
    check "goes on in a new process" goes_on_from --diff /tmp/snapshot.diff.state:/tmp/snapshot.diff.memory || return 0
    work_goes_on "$(since "$moment")" first second
}

# Its primary is killed.
scenario_failover() {
    configure queues0 "$mirror"
    start_standby
    start_guest
    check "comes up" comes_up || return 0
    check "is protected" within 90 told first protected || return 0
    check "the guest has memory that it keeps" keeps_memory || return 0
    check "the guest reads metadata with a session token" reads_metadata || return 0
    check "what it does not need goes back to both hosts" memory_comes_back first second
    check "clients are busy" clients_are_busy || return 0
    sleep 3
    moment=$EPOCHREALTIME
    host 'finish first'
    check "the standby takes over" within 20 told second active || return 0
    check "it answers pings" within 20 answers || return 0
    work_goes_on "$(since "$moment")" first second
}

# Its primary hands it over.
scenario_switchover() {
    # Often enough to tell a pause of some ten ms from one of twice as much.
    ping_every_ms=20
    configure queues0 "$mirror"
    start_standby
    start_guest
    check "comes up" comes_up || return 0
    check "is protected" within 90 told first protected || return 0
    check "the guest has memory that it keeps" keeps_memory || return 0
    check "the guest reads metadata with a session token" reads_metadata || return 0
    check "clients are busy" clients_are_busy || return 0
    sleep 3
    check "is handed over" switches_over || return 0
    pause_ms=$(($(field pause_us "$(cat "$clients/switchover")") / 1000 + 1))
    check "the primary's process ends" within 10 ended first
    work_goes_on "$pause_ms" first second
    say "switchover: a pause of $pause_ms ms; of pings every $ping_every_ms ms $(lost_pings)"
}

switches_over() {
    host 'understudy switchover --api-sock /tmp/first.sock --json' >"$clients/switchover" 2>&1 ||
        { cat "$clients/switchover"; complains first; complains second; return 1; }
}
