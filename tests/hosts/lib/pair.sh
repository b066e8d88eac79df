# Two virtual hosts, a and b, in a world with three networks, each a bridge in the network namespace with a port for each host:
#
#   clients 10.78.0.0/24   the guest's: .2 the guest, on whichever host it runs; .1 its clients; .11 and .12 the hosts; .21 to
#                          .23 the members of etcd
#   mirror  10.78.1.0/24   .11 and .12 the hosts, for primary and standby alone
#   control 10.78.2.0/24   .1 the drill; .11 and .12 the hosts: the way on which the drill gives orders, never cut

readonly pair_dir=$cache/two-hosts
readonly pair_guest_mac=02:00:00:00:78:02
readonly pair_witness=etcd:10.78.0.21:2379,10.78.0.22:2379,10.78.0.23:2379
declare -A host_number=([a]=1 [b]=2) pair_job=()
etcd_pids=()

other_side() { if [ "$1" = a ]; then echo b; else echo a; fi; }

open_pair_world() {
    local network side member
    open_world
    for network in clients mirror control; do
        outside ip link add name "$network" type bridge || skip "no bridge can be created here (is the kernel module bridge there?)"
        for side in a b; do
            outside ip tuntap add "$network-$side" mode tap || skip "no tap can be created here (is the kernel module tun there?)"
            outside ip link set "$network-$side" master "$network" up
        done
        outside ip link set "$network" up
    done
    outside ip address add 10.78.0.1/24 dev clients
    outside ip address add 10.78.2.1/24 dev control
    for member in 1 2 3; do
        outside ip address add "10.78.0.2$member/24" dev clients
    done
}

# port NETWORK SIDE forwarding|disabled: what the switch does with a host's port. A disabled one neither takes nor gives frames;
# what comes to it is still heard by `redis-drill watch`, and the host's link stays up: nothing tells it.
port() { outside bridge link set dev "$1-$2" state "$3"; }

# open_ports SIDE: whatever was cut is whole again.
open_ports() {
    local network
    for network in clients mirror; do
        port "$network" "$1" forwarding 2>/dev/null || true
    done
}

# The port behind which the switch has last seen the guest.
guest_port() {
    outside bridge fdb show br clients | sed -n "s/^$pair_guest_mac dev clients-\([ab]\) .*/\1/p" | head -n 1
}
guest_is_behind() { [ "$(guest_port)" = "$1" ]; }

# Three members of etcd, at addresses of the world outside.
start_etcd() {
    local member at all=
    rm -rf "$pair_dir/etcd"
    mkdir -p "$pair_dir/etcd"
    for member in 1 2 3; do
        all+="${all:+,}$member=http://10.78.0.2$member:2380"
    done
    for member in 1 2 3; do
        at=http://10.78.0.2$member
        "${enter_outside[@]}" etcd --name "$member" --data-dir "$pair_dir/etcd/$member" \
            --listen-client-urls "$at:2379" --advertise-client-urls "$at:2379" \
            --listen-peer-urls "$at:2380" --initial-advertise-peer-urls "$at:2380" \
            --initial-cluster "$all" --initial-cluster-token two-hosts >"$pair_dir/etcd/$member.log" 2>&1 </dev/null 9>&- &
        etcd_pids+=($!)
    done
    within 30 outside curl --silent --fail "http://10.78.0.21:2379/health" ||
        fail "etcd does not come up; see $pair_dir/etcd/*.log"
}

# on SIDE COMMANDS: has a host carry out shell commands.
on() { order "10.78.2.1${host_number[$1]}" "$2"; }

# fetch_from SIDE FILE: a file of a host's /tmp.
fetch_from() {
    outside curl --silent --fail --max-time 60 "http://10.78.2.1${host_number[$1]}:7000/tmp/$2"
}

# Sizes of the guest's drive, and of a host's disk: room for its image, an empty one, and the journal beside it.
readonly drive_mib=64 host_disk_mib=320

# The guest's drive with nothing on it, on a disk for a host.
ensure_pair_disk() {
    local disk="$cache/pair-disk" tree="$cache/pair-disk.tree"
    stale "$disk" "$here/lib/pair.sh" || return 0
    rm -rf "$disk.part" "$tree"
    mkdir -p "$tree"
    # Nothing is left to be initialised later: what the guest writes is what it is asked to.
    mke2fs -q -t ext4 -L data -E lazy_itable_init=0,lazy_journal_init=0 "$tree/empty.img" "${drive_mib}M" >/dev/null 2>&1
    mke2fs -q -t ext4 -L host -d "$tree" "$disk.part" "${host_disk_mib}M" >/dev/null 2>&1
    rm -r "$tree"
    mv "$disk.part" "$disk"
}

# new_drive SIDE empty|blank: a drive for a new guest: one with an empty file system, or an image that is to become the same.
new_drive() {
    local make="cp /disk/empty.img /disk/data.img"
    [ "$2" = empty ] || make="truncate -s ${drive_mib}M /disk/data.img"
    on "$1" "rm -f /disk/data.img*; $make && sync"
}

# boot_host SIDE: starts a virtual host, and does not wait for it. It has the disk that it had before.
boot_host() {
    local side=$1 dir="$pair_dir/$1" number=${host_number[$1]} network cards=() place=0
    mkdir -p "$dir"
    [ ! -e "$dir/console.log" ] || mv "$dir/console.log" "$dir/console.before.log"
    { echo "number=$number"; cat "$here/host/pair"; } >"$dir/drill"
    lay_out_host "$dir" "$cache/redis-layer.cpio" -- "$(binary understudy)" "$(binary virtual-host)"
    for network in clients mirror control; do
        place=$((place + 1))
        cards+=(-netdev "tap,id=$network,ifname=$network-$side,script=no,downscript=no"
            -device "virtio-net-pci,netdev=$network,romfile=,mac=52:54:00:78:0$number:0$place")
    done
    [ -e "$dir/disk" ] || cp --sparse=always "$cache/pair-disk" "$dir/disk"
    # Killing QEMU loses what the host's kernel has not written yet, and nothing that QEMU has taken: there is no need to wait
    # for this machine's disk.
    cards+=(-drive "file=$dir/disk,if=none,id=disk,format=raw,cache=unsafe" -device virtio-blk-pci,drive=disk)
    # That it was killed is no news.
    virtual_host "$dir" 7200 "${cards[@]}" 9>&- 2>/dev/null &
    pair_job[$side]=$!
}
host_is_up() { on "$1" true >/dev/null; }
host_runs() { [ -n "${pair_job[$1]:-}" ] && kill -0 "${pair_job[$1]}" 2>/dev/null; }

# ensure_hosts: both hosts are up.
ensure_hosts() {
    local side
    for side in a b; do
        host_runs "$side" || boot_host "$side"
    done
    for side in a b; do
        within 90 host_is_up "$side" || fail "the virtual host $side is not heard of; see $pair_dir/$side/console.log"
    done
}

# kill_host SIDE: its power is gone.
kill_host() {
    kill -9 "$(cat "$pair_dir/$1/pid")"
    rm "$pair_dir/$1/pid"
}

# disk_of SIDE FILE: what a loss of power at this moment would leave of a host's disk.
disk_of() {
    local pid
    # It may have crashed.
    [ -e "$pair_dir/$1/pid" ] || return 1
    pid=$(cat "$pair_dir/$1/pid")
    kill -STOP "$pid"
    cp --sparse=always "$pair_dir/$1/disk" "$2" || { kill -CONT "$pid"; return 1; }
    kill -CONT "$pid"
}

close_pair() {
    local side
    stop_clients
    for side in a b; do
        [ ! -e "$pair_dir/$side/pid" ] || kill_host "$side" 2>/dev/null || true
    done
    [ ${#etcd_pids[@]} -eq 0 ] || kill "${etcd_pids[@]}" 2>/dev/null || true
    wait "${etcd_pids[@]}" "${pair_job[@]}" 2>/dev/null || true
    rm -f "$pair_dir"/[ab]/initrd
}
