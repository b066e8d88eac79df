# The scenarios of the drill "linux": what is done to the guest, and what must hold then. Everything is seen from outside; the
# virtual host is told what to do by `host`.

# The name of the scenario that runs.
scenario=

# Most pings that may be lost where a guest has to be missed first, or goes on from a file: 5 s of them. The pause of a
# switchover is known, and counted exactly.
readonly patience=$((5000 / ping_every_ms))

# check TEXT COMMAND...: one promise; what the command prints is told if it is broken.
check() {
    local text=$1 said
    shift
    if said=$("$@" 2>&1); then
        report_check linux "$scenario" true "$text"
    else
        report_check linux "$scenario" false "$text: $(tail -n 3 <<<"$said" | tr '\n' ' ')"
        return 1
    fi
}

# run_scenario NAME: from a new guest's disk to the end of all its processes. What they said stays in $linux_dir/NAME.
run_scenario() {
    local side file
    scenario=$1
    clients="$linux_dir/$scenario"
    rm -rf "$clients"
    mkdir -p "$clients"
    host 'cp /guest/linux.ext4 /tmp/root.ext4' || return 0
    "scenario_$scenario"
    stop_clients
    for side in first second; do
        for file in out err events; do
            fetch "$side.$file" >"$clients/$side.$file" 2>/dev/null || rm "$clients/$side.$file"
        done
    done
    host 'for side in first second calls; do finish $side; done
        cd /tmp && rm -rf first.* second.* calls.* vsock.* root.ext4 witness* snapshot* standby.sock'
}

# configure [MIRROR]: the guest's configuration, with the text MIRROR as its last section.
configure() {
    host "cat >/tmp/config.json <<'JSON'
{
  \"boot-source\": {
    \"kernel_image_path\": \"/guest/vmlinux\", \"initrd_path\": \"/guest/linux.cpio\",
    \"boot_args\": \"console=ttyS0 quiet reboot=k panic=-1 nokaslr pci=off i8042.noaux i8042.nomux\"
  },
  \"machine-config\": { \"vcpu_count\": 2, \"mem_size_mib\": 256, \"track_dirty_pages\": true },
  \"drives\": [
    { \"drive_id\": \"root\", \"path_on_host\": \"/tmp/root.ext4\", \"is_root_device\": true, \"cache_type\": \"Writeback\" }
  ],
  \"network-interfaces\": [
    { \"iface_id\": \"eth0\", \"host_dev_name\": \"tap0\", \"guest_mac\": \"02:00:00:00:77:02\" }
  ],
  \"vsock\": { \"guest_cid\": 3, \"uds_path\": \"/tmp/vsock.first\" }${1:+,
  $1}
}
JSON"
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
        --net eth0=tap1 --vsock /tmp/vsock.second --events /tmp/second.events --api-sock /tmp/second.sock'
    within 10 host '[ -S /tmp/standby.sock ]'
}

# console SIDE...: what the guest said, on one side after the other. A standby tells where in the whole output its own begins:
# what it says again was on its way when its primary died.
console() {
    local start
    if [ $# -eq 2 ] && start=$(output_start "$2"); then
        fetch "$1.out" | head -c "$start"
        shift
    fi
    fetch "$1.out" || true
    [ $# -ne 2 ] || fetch "$2.out" || true
}
# A guest from a snapshot says nothing of it.
output_start() { host "grep '\"event\":\"active\"' /tmp/$1.events" | grep -o '"output_start":[0-9]*' | grep -o '[0-9]*'; }

said() { console "$1" | grep -a "$2"; }
told() { host "grep '\"event\":\"$2\"' /tmp/$1.events"; }
complains() { host "tail -n 5 /tmp/$1.err"; }

answers() { outside ping -n -c 1 -W 2 "$guest_ip"; }
ended() { host "[ -e /tmp/$1.status ]"; }

comes_up() {
    within 90 said first '2 processors, root /dev/vda ext4' || { complains first; console first | tail -n 2; return 1; }
    within 20 answers || { echo "it does not answer pings"; return 1; }
    within 20 listens 80 && within 20 listens 7001 || { echo "its services do not listen"; return 1; }
}
listens() { outside bash -c "exec 3<>/dev/tcp/$guest_ip/$1"; }

# goes_on WORD SIDE...: whether the guest says more of what it counts.
console_has_more() {
    local word=$1 than=$2
    shift 2
    [ "$(console "$@" | last_of "$word")" -gt "$than" ]
}
goes_on() {
    local word=$1 n
    shift
    n=$(console "$@" | last_of "$word")
    within 40 console_has_more "$word" $((n + 4)) "$@" || { echo "nothing after $word $n"; complains "${!#}"; return 1; }
}
counts_whole() { says_the_same "$@" && console "$@" | numbered count; }

# Whether two sides agree on what both said, and nothing is missing between them.
says_the_same() {
    local start
    [ $# -eq 2 ] && start=$(output_start "$2") || return 0
    fetch "$1.out" >"$clients/before" && fetch "$2.out" >"$clients/after" || return 1
    local both=$(($(stat -c %s "$clients/before") - start))
    [ "$both" -ge 0 ] || { echo "$((-both)) bytes of output are missing"; return 1; }
    cmp <(tail -c +$((start + 1)) "$clients/before") <(head -c "$both" "$clients/after")
}
disk_is_whole() {
    local lines
    lines=$(console "$@" | grep -ao 'disk [0-9]* [a-zA-Z]*')
    ! grep WRONG <<<"$lines" && grep -q ' ok$' <<<"$lines"
}

logs_in() {
    within 20 said first 'login: ' || { echo "no prompt for a login"; return 1; }
    host "printf 'root\r' >/tmp/first.in"
    within 20 said first '# ' || { echo "no prompt of a shell"; return 1; }
    host "printf 'echo user \$USER of \$((700+77))\r' >/tmp/first.in"
    within 20 said first 'user root of 777' || { console first | tail -n 3; return 1; }
}

downloads() {
    outside curl --silent --show-error --max-time 60 "http://$guest_ip/file" >"$clients/download" &&
        is_the_file "$clients/download"
}

# vsock_works SIDE: calls in both directions.
vsock_works() {
    local said
    said=$(host "linux-vsock host-call /tmp/vsock.$1 5000 'from outside'")
    [ "$said" = "heard from outside" ] || { echo "$said"; return 1; }
    host "start calls linux-vsock host-listen /tmp/vsock.$1_6000"
    within 15 host "grep '^call ' /tmp/calls.out" || { echo "the guest does not call"; return 1; }
    host "finish calls"
}

switches_off() {
    local side=$1
    outside bash -c "exec cat </dev/tcp/$guest_ip/7002" >/dev/null 2>&1 || true
    within 40 ended "$side" || { echo "it has not ended"; console "$side" | tail -n 2; return 1; }
    host "cat /tmp/$side.status; [ \$(cat /tmp/$side.status) = 0 ]" || { complains "$side"; return 1; }
}

disk_is_consistent() {
    local image="$clients/root.ext4" status=0
    fetch root.ext4 >"$image" || return 1
    e2fsck -fn "$image" || status=$?
    rm "$image"
    return "$status"
}

# clients_are_busy: they are, before something happens to the guest.
clients_are_busy() {
    start_clients
    within 20 client_has_more_ticks 5 && within 20 download_is_running
}

# What must hold after something happened. SIDE...: where the guest ran, and runs last.
work_goes_on() {
    local lost=$1
    shift
    check "a client's connection stays up" ticks_go_on
    check "what a client is told has no gap" ticks_are_whole
    check "a client's download is whole" download_is_whole
    check "at most $lost pings are lost, in one stretch" pings_lost_at_most "$lost"
    check "the guest's counter goes on" goes_on count "$@"
    check "the guest's output has no gap" counts_whole "$@"
    check "the guest goes on writing to its disk" goes_on disk "$@"
    check "the disk returns what was written" disk_is_whole "$@"
    check "guest and host reach each other by vsock" vsock_works "${!#}"
    stop_clients
    check "the guest switches itself off" switches_off "${!#}" &&
        check "its file system is in order" disk_is_consistent
}

scenario_boot() {
    configure
    start_guest
    check "comes up with 2 processors, its root on the disk, and answers pings" comes_up || return 0
    check "a user logs in on the serial console" logs_in
    check "a file is downloaded whole" downloads
    check "guest and host reach each other by vsock" vsock_works first
    check "the guest writes to its disk" goes_on disk first
    check "the disk returns what was written" disk_is_whole first
    check "the guest switches itself off" switches_off first &&
        check "its file system is in order" disk_is_consistent
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
        --net eth0=tap1 --vsock /tmp/vsock.second"
    within 30 answers || { complains second; return 1; }
}

# The guest stands still, is written to a file, and goes on in another process.
scenario_snapshot() {
    configure
    start_guest
    check "comes up" comes_up || return 0
    check "clients are busy" clients_are_busy || return 0
    sleep 3
    check "stands still" host 'understudy pause --api-sock /tmp/first.sock' || return 0
    check "a snapshot is taken" snapshot full || return 0
    host 'finish first'
    check "goes on in a new process" goes_on_from || return 0
    work_goes_on $patience first second
}

# The same with a snapshot that is taken while the guest runs, and one of what it changed afterwards.
scenario_differential() {
    configure
    start_guest
    check "comes up" comes_up || return 0
    check "clients are busy" clients_are_busy || return 0
    check "a snapshot is taken while the guest runs" snapshot full || return 0
    check "the guest goes on" goes_on count first || return 0
    check "stands still" host 'understudy pause --api-sock /tmp/first.sock' || return 0
    check "a differential snapshot is taken" snapshot diff --diff || return 0
    host 'finish first'
    check "goes on in a new process" goes_on_from --diff /tmp/snapshot.diff.state:/tmp/snapshot.diff.memory || return 0
    work_goes_on $patience first second
}

# Its primary is killed.
scenario_failover() {
    configure "$mirror"
    start_standby
    start_guest
    check "comes up" comes_up || return 0
    check "is protected" within 90 told first protected || return 0
    check "clients are busy" clients_are_busy || return 0
    sleep 3
    host 'finish first'
    check "the standby takes over" within 20 told second active || return 0
    work_goes_on $patience first second
}

# Its primary hands it over.
scenario_switchover() {
    configure "$mirror"
    start_standby
    start_guest
    check "comes up" comes_up || return 0
    check "is protected" within 90 told first protected || return 0
    check "clients are busy" clients_are_busy || return 0
    sleep 3
    check "is handed over" switches_over || return 0
    pause_ms=$(($(field pause_us "$(cat "$clients/switchover")") / 1000))
    say "switchover: the guest stood still for $pause_ms ms"
    check "the primary's process ends" within 10 ended first
    work_goes_on $((pause_ms / ping_every_ms + 1)) first second
}

switches_over() {
    host 'understudy switchover --api-sock /tmp/first.sock --json' >"$clients/switchover" 2>&1 ||
        { cat "$clients/switchover"; complains first; complains second; return 1; }
}
