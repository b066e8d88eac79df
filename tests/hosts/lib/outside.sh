# The world outside of virtual hosts: a network namespace in which QEMU's taps, and clients, are. It needs no privileges
# where users may have namespaces of their own, and is gone with the last process in it.

readonly client_ip=10.77.0.1 guest_ip=10.77.0.2 host_ip=10.77.0.254

# The process that keeps the namespace, and how others get into it.
outside_pid=
enter_outside=()

open_world() {
    local new=(unshare --net) enter=(--net)
    if ! "${new[@]}" true 2>/dev/null; then
        new=(unshare --user --map-root-user --net)
        enter=(--user --preserve-credentials --net)
    fi
    "${new[@]}" true 2>/dev/null || skip "no right to create network namespaces (try as root)"
    [ -w /dev/net/tun ] || skip "no right to use /dev/net/tun (try as root)"

    "${new[@]}" sleep infinity 9>&- &
    outside_pid=$!
    enter_outside=(nsenter --target "$outside_pid" "${enter[@]}" --)
    until [ "$(readlink "/proc/$outside_pid/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do
        sleep 0.01
    done
    outside ip link set lo up
}

# The world of one virtual host, on tap0.
open_outside() {
    open_world
    outside ip tuntap add tap0 mode tap || skip "no tap can be created here (is the kernel module tun there?)"
    outside ip address add "$client_ip/24" dev tap0
    outside ip link set tap0 up
    # Small, so that a download at a limited rate is still with the guest, and not in the client's buffers.
    outside sh -c 'echo "4096 16384 65536" >/proc/sys/net/ipv4/tcp_rmem'
}

close_outside() {
    [ -z "$outside_pid" ] || kill "$outside_pid" 2>/dev/null || true
    outside_pid=
    enter_outside=()
}

# outside COMMAND...: runs a command in the world outside.
outside() { "${enter_outside[@]}" "$@"; }

# host COMMANDS: has the virtual host carry out shell commands (host/functions is at hand), and prints their output. Fails if
# they fail.
host() { order "$host_ip" "$1"; }
# order ADDRESS COMMANDS: the same for a virtual host at ADDRESS.
order() {
    outside curl --silent --show-error --fail-with-body --max-time 120 --data-binary "$2" \
        "http://$1:7000/cgi-bin/agent" 2>&1
}

# emulation_hangs ORDER...: whether on the virtual host that carries out orders by `ORDER...` something stands still by the emulation's
# fault (see README.md): a guest runs, and takes no interrupt; or the timer of a processor of the host itself has no interrupts (the
# kernel's own watchdog sees to it that each has some every four seconds); or the host does not answer at all.
emulation_hangs() {
    local before after
    if ! { before=$("$@" counted) && sleep 6 && after=$("$@" counted); }; then
        # What a guest's process does keeps no other from answering.
        ! "$@" true >/dev/null || return 1
        echo "the host does not answer"
        return
    fi
    awk 'NR == FNR { taken[$1 $2] = $3; exits[$1 $2] = $4; next }
        ($1 $2) in taken && taken[$1 $2] == $3 && ($1 == "processor" || $4 > exits[$1 $2]) { hangs = 1; print }
        END { exit !hangs }' <(echo "$before") <(echo "$after")
}

# guest COMMANDS: has the guest carry out shell commands, and prints what they print.
guest() {
    # shellcheck disable=SC2016 # the inner shell's
    outside timeout 60 bash -c 'exec 3<>"/dev/tcp/$1/7002" && printf "%s\nexit\n" "$2" >&3 && cat <&3' \
        guest "$guest_ip" "$1"
}

# fetch FILE: a file from the virtual host's /tmp.
fetch() { outside curl --silent --show-error --fail --max-time 120 "http://$host_ip:7000/tmp/$1"; }

# within SECONDS COMMAND...: tries a command until it succeeds.
within() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.2
    done
}
