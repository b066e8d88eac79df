# What is asked of the Linux guest, of its two sides and of its host: each question prints what it saw, and fails if that is
# not what it should be.

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

# comes_up: and has begun every service that is asked later: init starts them one after the other.
comes_up() {
    local port
    within 90 said first '2 processors, root /dev/vda ext4' || { complains first; console first | tail -n 2; return 1; }
    within 20 answers || { echo "it does not answer pings"; return 1; }
    for port in 80 7001 7002; do
        within 20 listens "$port" || { echo "its service at port $port does not listen"; return 1; }
    done
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
    within 40 console_has_more "$word" $((n + 2)) "$@" || { echo "nothing after $word $n"; complains "${!#}"; return 1; }
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
# disk_is_whole NAME SIDE...
disk_is_whole() {
    local name=$1 lines
    shift
    lines=$(console "$@" | grep -ao "$name [0-9]* [a-zA-Z]*")
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
    guest poweroff >/dev/null 2>&1 || true
    is_off "$1"
}
# heeds_ctrl_alt_del SIDE: its init switches it off then.
heeds_ctrl_alt_del() {
    host "virtual-host request /tmp/$1.sock PUT /actions '{ \"action_type\": \"SendCtrlAltDel\" }'" && is_off "$1"
}
is_off() {
    local side=$1
    within 40 ended "$side" || { echo "it has not ended"; console "$side" | tail -n 2; return 1; }
    host "cat /tmp/$side.status; [ \$(cat /tmp/$side.status) = 0 ]" || { complains "$side"; return 1; }
    # By ACPI, and not by a reset or a crash.
    told "$side" ended | grep 'the guest turned its machine off' || { told "$side" ended; return 1; }
}

disks_are_consistent() {
    local images="$clients/images" status=0
    mkdir -p "$images"
    if fetch root.ext4 >"$images/root" && fetch qcow2 >"$images/qcow2" && qemu-img check -q "$images/qcow2" &&
        qemu-img convert -f qcow2 -O raw "$images/qcow2" "$images/second"; then
        e2fsck -fn "$images/root" && e2fsck -fn "$images/second" || status=$?
    else
        status=1
    fi
    rm -r "$images"
    return "$status"
}

# random_numbers_come: the guest's are from the device, and no two alike.
random_numbers_come() {
    local said
    said=$(guest 'cat /sys/class/misc/hw_random/rng_current
        for n in 1 2; do dd if=/dev/hwrng bs=32 count=1 2>/dev/null | hexdump -v -e "/1 \"%02x\""; echo; done')
    echo "$said"
    grep -q '^virtio_rng' <<<"$said" && [ "$(grep -cE '^[0-9a-f]{64}$' <<<"$said")" = 2 ] &&
        [ "$(sort -u <<<"$said" | wc -l)" = 3 ]
}

# card_has_queues COUNT
card_has_queues() {
    local said
    said=$(guest 'ls /sys/class/net/eth0/queues')
    echo "$said"
    [ "$(grep -c rx <<<"$said")" = "$1" ] && [ "$(grep -c tx <<<"$said")" = "$1" ]
}

# resident SIDE: MiB of the host's memory that a side's guest has: of the process's VmRSS the part that is no heap.
resident() { host "awk '/RssShmem/ { print int(\$2 / 1024) }' /proc/\$(cat /tmp/$1.pid)/status"; }
holds_at_most() { [ "$(resident "$1")" -le "$2" ]; }
holds_at_least() { [ "$(resident "$1")" -ge "$2" ]; }

# What the guest fills and gives back: its download several times over, so that a standby sees more than zeros of it.
readonly fill="cat /www/file /www/file /www/file /www/file /www/file /www/file" fill_mib=23

# memory_comes_back SIDE...: what the guest no longer needs, no side holds any more. The kernel tells of 2 MiB that are free as
# a whole, so it is filled in pieces of that size.
memory_comes_back() {
    local side before=() full=() n=0
    for side in "$@"; do before+=("$(resident "$side")"); done
    guest "mkdir -p /tmp/huge && mount -t tmpfs -o huge=always huge /tmp/huge && $fill >/tmp/huge/fill" ||
        { echo "the guest does not get to fill its memory"; return 1; }
    for side in "$@"; do
        within 60 holds_at_least "$side" $((before[n] + fill_mib / 2)) ||
            { echo "$side: before $fill_mib MiB are filled ${before[n]} MiB resident, and then $(resident "$side")"; return 1; }
        full+=("$(resident "$side")")
        n=$((n + 1))
    done
    guest 'umount /tmp/huge'
    n=0
    for side in "$@"; do
        within 60 holds_at_most "$side" $((full[n] - fill_mib * 3 / 4)) ||
            { echo "$side: of ${full[n]} MiB $(resident "$side") stay resident; in the guest are free: $(guest 'cat /proc/buddyinfo')"; return 1; }
        n=$((n + 1))
    done
}

# Memory that the guest keeps, between what it gives back.
keeps_memory() { guest "cp /www/file /tmp/kept" && kept_memory_is_whole; }
kept_memory_is_whole() { guest 'md5sum </tmp/kept' | diff <(download_content | md5sum) -; }
# Pages that were given back are good ones when the guest takes them again.
memory_is_used_again() { guest "$fill >/tmp/again; md5sum </tmp/again; rm /tmp/again" | diff <(filled | md5sum) -; }
filled() { for _ in 1 2 3 4 5 6; do download_content; done; }

# patch SIDE RESOURCE BODY: as Firecracker's clients ask for changes.
patch() { host "virtual-host request /tmp/$1.sock PATCH '$2' '$3'"; }

# The guest sees another disk in the place of the one it had.
disk_is_changed() {
    local reads='echo 1 >/proc/sys/vm/drop_caches; head -c 5 /dev/vdc; echo; cat /sys/block/vdc/size'
    [ "$(guest "$reads" | tr '\n' ' ')" = "one   2048 " ] || { guest "$reads"; return 1; }
    patch first /drives/spare '{ "drive_id": "spare", "path_on_host": "/tmp/spare.two" }' || return 1
    within 10 guest_says "two   4096 " "$reads" || { guest "$reads"; return 1; }
}
guest_says() { [ "$(guest "$2" | tr '\n' ' ')" = "$1" ]; }

# takes_seconds LEAST COMMAND...: whether it takes at least that long.
takes_seconds() {
    local least=$1 start=$EPOCHREALTIME
    shift
    "$@" || return 1
    awk -v start="$start" -v end="$EPOCHREALTIME" -v least="$least" \
        'BEGIN { printf "%.1f s\n", end - start; exit end - start < least }'
}
reads_spare_disk() { guest 'dd if=/dev/vdc of=/dev/null bs=32k count=16 iflag=direct 2>&1' >/dev/null; }
downloads_a_part() {
    [ "$(outside curl --silent --show-error --max-time 60 --range 0-524287 "http://$guest_ip/file" | wc -c)" = 524288 ]
}
readonly limit='{ "bandwidth": { "size": 131072, "refill_time": 1000 } }'
readonly no_limit='{ "bandwidth": { "size": 0, "refill_time": 0 } }'
# Half a MiB by 128 KiB a second, with a bucket that is full at first.
disk_is_limited() {
    patch first /drives/spare "{ \"drive_id\": \"spare\", \"rate_limiter\": $limit }" &&
        takes_seconds 2.5 reads_spare_disk &&
        patch first /drives/spare "{ \"drive_id\": \"spare\", \"rate_limiter\": $no_limit }" &&
        ! takes_seconds 2.5 reads_spare_disk
}
card_is_limited() {
    patch first /network-interfaces/eth0 "{ \"iface_id\": \"eth0\", \"tx_rate_limiter\": $limit }" &&
        takes_seconds 2.5 downloads_a_part &&
        patch first /network-interfaces/eth0 "{ \"iface_id\": \"eth0\", \"tx_rate_limiter\": $no_limit }" &&
        ! takes_seconds 2.5 downloads_a_part
}

# Metadata that is put while the guest runs, and a session token that the guest keeps.
reads_metadata() {
    host "virtual-host request /tmp/first.sock PUT /mmds '{ \"latest\": { \"meta-data\": { \"instance-id\": \"i-77\" } } }'" || return 1
    # shellcheck disable=SC2016 # the guest's shell's
    guest 'ip route replace 169.254.169.254 dev eth0
        printf "PUT /latest/api/token HTTP/1.0\r\nX-metadata-token-ttl-seconds: 3600\r\n\r\n" | nc 169.254.169.254 80 | tail -n 1 >/tmp/token' &&
        metadata_is_there
}
metadata_is_there() {
    local said
    # The wget of Debian's static busybox crashes if it is given a time limit of its own (-T).
    # shellcheck disable=SC2016 # the guest's shell's
    said=$(guest 'timeout 10 wget -q -O - --header "X-metadata-token: $(cat /tmp/token)" http://169.254.169.254/latest/meta-data/instance-id 2>&1')
    [ "$said" = i-77 ] || { echo "it reads: $said"; return 1; }
}
