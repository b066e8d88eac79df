# Clients of the Linux guest that are busy while something happens to it, and what is asked of what they got.
# Their files are in $clients.

# Milliseconds between two pings.
ping_every_ms=200

clients=
client_pids=()

# start_client NAME COMMAND...: with its output in $clients/NAME.
start_client() {
    local name=$1
    shift
    "${enter_outside[@]}" "$@" >"$clients/$name" 2>"$clients/$name.err" 9>&- &
    client_pids+=($!)
    echo $! >"$clients/$name.pid"
}

# A download that takes its time, a connection on which the guest counts, and pings.
start_clients() {
    start_client download curl --silent --show-error --limit-rate 150k "http://$guest_ip/file"
    start_client ticks bash -c "exec cat </dev/tcp/$guest_ip/7001"
    start_client ping ping -n -i "0.$(printf %03d "$ping_every_ms")" "$guest_ip"
}

stop_clients() {
    [ ${#client_pids[@]} -gt 0 ] || return 0
    kill "${client_pids[@]}" 2>/dev/null || true
    wait "${client_pids[@]}" 2>/dev/null || true
    client_pids=()
}

client_ended() { ! kill -0 "$(cat "$clients/$1.pid")" 2>/dev/null; }

# numbered WORD: whether the numbers behind WORD on stdin follow one another without gap or repetition, and there are some.
# What is there of a last line that is not whole yet does not count.
numbered() {
    awk -v word="$1" '
        { whole[NR] = $0 }
        END {
            for (i = 1; i < NR; i++) {
                if (!match(whole[i], word " [0-9]+\r?$")) continue
                n = substr(whole[i], RSTART + length(word) + 1) + 0
                if (found++ && n != last + 1) { print word " " n " comes after " word " " last; bad = 1 }
                last = n
            }
            if (!found) { print "no " word " at all"; bad = 1 }
            exit bad
        }'
}

# last_of WORD: the last number behind WORD on stdin, 0 if there is none.
last_of() { grep -o "$1 [0-9]*" | tail -n 1 | grep -o '[0-9]*$' || echo 0; }

client_has_more_ticks() { [ "$(last_of tick <"$clients/ticks")" -gt "$1" ]; }
ticks_go_on() { within 30 client_has_more_ticks $(($(last_of tick <"$clients/ticks") + 5)); }
ticks_are_whole() { numbered tick <"$clients/ticks"; }

download_is_running() { [ -s "$clients/download" ] && ! client_ended download; }
download_is_whole() {
    within 120 client_ended download || { echo "it has not ended"; return 1; }
    cat "$clients/download.err"
    is_the_file "$clients/download"
}
# is_the_file FILE: whether it is what the guest has to send.
is_the_file() {
    [ "$(sha256sum <"$1" | cut -d ' ' -f 1)" = "$download_checksum" ] ||
        { echo "it has $(stat -c %s "$1") bytes, and they are not those that were sent"; return 1; }
}

# lost_pings: how many, of how many, and in how many stretches.
lost_pings() {
    awk 'match($0, /icmp_seq=[0-9]+/) { n = substr($0, RSTART + 9, RLENGTH - 9) + 0; got[n]++; if (n > max) max = n }
        END {
            for (n = 1; n <= max; n++) if (!got[n]) { lost++; if (got[n - 1]) stretches++ }
            printf "%d of %d lost in %d stretches\n", lost, max, stretches
        }' "$clients/ping"
}
# pings_lost_at_most COUNT: in one stretch.
pings_lost_at_most() {
    local lost of all in stretches rest
    kill -INT "$(cat "$clients/ping.pid")" 2>/dev/null
    within 5 client_ended ping
    tail -n 3 "$clients/ping"
    lost_pings
    read -r lost of all rest in stretches rest < <(lost_pings)
    [ "$all" -gt 0 ] && [ "$lost" -le "$1" ] && [ "$stretches" -le 1 ]
}
