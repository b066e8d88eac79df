# shellcheck shell=bash
# What the drills share: their options, how they reach both sides, and a client that watches the service all the while.
# Not to be run by itself.
#
# Options that all drills take:
#   --primary SOCKET        the API socket of the process that runs the guest
#   --standby SOCKET        the API socket of its standby
#   --primary-host HOST     reach that side by ssh HOST; without it, it is on this machine
#   --standby-host HOST     and so the other
#   --counter HOST:PORT     count on the guest's service all the while: on the embedded guest's ("incr 1000"), or on
#                           Redis ("INCR understudy-drill") with --redis
#   --redis                 see --counter
#   --understudy PATH       the command on both sides (default: understudy)
#   --patience SECONDS      how long anything may take (default: 30)
#   --yes                   do not ask before harm is done
set -euo pipefail

drill=${0##*/}
drill=${drill%.sh}
understudy=understudy
patience=30
declare -A socket=([primary]='' [standby]='') host=([primary]='' [standby]='')
counter='' redis=false yes=false

say() { printf '%(%H:%M:%S)T  %s\n' -1 "$*"; }
fail() {
    say "FAILED: $*" >&2
    exit 1
}
wrong_usage() {
    echo "$drill: $*; the head of $0 says how it is used" >&2
    exit 2
}
now_ms() { echo $(($(date +%s%N) / 1000000)); }

# The head of the script that was started, as its help.
usage() {
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
    sed -n '/^# Options that all/,/^#   --yes/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
}


# parse WORDS: reads the options; those that only a script knows are given to its own_option, which sets taken.
parse() {
    while [ $# -gt 0 ]; do
        local taken=2
        case $1 in
        -h | --help) usage ;;
        --yes) yes=true taken=1 ;;
        --redis) redis=true taken=1 ;;
        --primary | --standby | --primary-host | --standby-host | --counter | --understudy | --patience)
            [ $# -ge 2 ] || wrong_usage "$1 needs a value"
            case $1 in
            --primary) socket[primary]=$2 ;;
            --standby) socket[standby]=$2 ;;
            --primary-host) host[primary]=$2 ;;
            --standby-host) host[standby]=$2 ;;
            --counter) counter=$2 ;;
            --understudy) understudy=$2 ;;
            --patience) patience=$2 ;;
            esac
            ;;
        *)
            taken=0
            own_option "$@"
            [ "$taken" -gt 0 ] || wrong_usage "no such option: $1"
            ;;
        esac
        [ $# -ge "$taken" ] || wrong_usage "$1 needs a value"
        shift "$taken"
    done
    if [ -z "${socket[primary]}" ] || [ -z "${socket[standby]}" ]; then wrong_usage "give --primary and --standby"; fi
}
own_option() { :; }

# on SIDE WORDS: runs a command where the side is.
on() {
    local side=$1
    shift
    if [ -n "${host[$side]}" ]; then
        # The other shell is to see the words as they are.
        # shellcheck disable=SC2029
        ssh -o BatchMode=yes "${host[$side]}" "$(printf '%q ' "$@")"
    else
        "$@"
    fi
}

# status SIDE: what it tells of itself, a line of JSON; nothing if it cannot be reached.
status() { on "$1" timeout 2 "$understudy" status --api-sock "${socket[$1]}" --json 2>/dev/null || true; }

# field NAME: a field of the JSON that comes in, text or number.
field() { sed -n "s/.*\"$1\":\"\{0,1\}\([^\",}]*\).*/\1/p"; }

# process SIDE: the number of its process.
process() {
    local found
    # From its beginning on: a script that is told of the socket is not meant.
    found=$(on "$1" pgrep -f -- "^[^ ]*${understudy##*/} .*--api-sock[= ]${socket[$1]}( |\$)" | head -n 1) || true
    [ -n "$found" ] || fail "no process with --api-sock ${socket[$1]} is running"
    echo "$found"
}

# await WHAT WORDS: repeats a command until it succeeds; FAILED after the patience. Says nothing.
await() {
    local what=$1 until=$((SECONDS + patience))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$until" ] || fail "not within $patience s: $what"
        sleep 0.01
    done
}

# is SIDE ROLE: whether the side says that it has this role (primary, standby, active, ...).
is() { [ "$(status "$1" | field role)" = "$2" ]; }
# in_phase SIDE PHASE: and that it is in this phase (lockstep, shadowing, solo, frozen, ...).
in_phase() { [ "$(status "$1" | field phase)" = "$2" ]; }

# runs_guest SIDE: whether it runs the guest, as far as it says.
runs_guest() {
    local told role phase
    told=$(status "$1")
    role=$(field role <<<"$told") phase=$(field phase <<<"$told")
    [ "$role" = active ] || { [ "$role" = primary ] && [[ $phase =~ ^(seeding|lockstep|solo|seeking)$ ]]; }
}

# begin TEXT: checks that the pair is protected, asks whether the harm may be done, and starts the client.
begin() {
    in_phase primary lockstep || fail "the guest is not protected: $(status primary); attach a standby first"
    echo "$drill: $1"
    if ! $yes; then
        read -r -p 'Go on? [y/N] ' answer
        [ "$answer" = y ] || exit 1
    fi
    work=$(mktemp -d "${TMPDIR:-/tmp}/understudy-drill.XXXXXX")
    trap end EXIT
    trap 'exit 130' INT TERM
    if [ -n "$counter" ]; then
        count >"$work/answers" &
        client=$!
        await "the service answers" test -s "$work/answers"
    fi
    sleep "$(random_second)"
}

# A moment within the next second, at random.
random_second() { printf '0.%03d\n' $((RANDOM % 1000)); }

# Counts on the service, one request at a time; a line for each: when it was asked, when answered (ms), the answer. A
# request without an answer has none. It takes a new connection when one is lost.
count() {
    local request='incr 1000' asked line
    $redis && request='INCR understudy-drill'
    # The last answer may come after the end.
    trap 'exit 0' TERM
    while :; do
        if ! exec 3<>"/dev/tcp/${counter%:*}/${counter##*:}"; then
            sleep 0.05
            continue
        fi
        while :; do
            asked=$(now_ms)
            printf '%s\r\n' "$request" >&3 || break
            if ! read -r -t "$patience" line <&3; then
                echo "$asked - -"
                break
            fi
            line=${line%$'\r'} line=${line#value } line=${line#:}
            echo "$asked $(now_ms) $line"
        done
        exec 3>&-
    done 2>/dev/null
}

# harm TEXT: notes that it is done now.
harm() {
    harmed=$(now_ms)
    say "$1"
}

# since_harm: milliseconds.
since_harm() { echo $(($(now_ms) - harmed)); }

has_answers() { [ "$(wc -l <"$work/answers")" -ge "$1" ]; }

# answers_go_on: waits until the service has answered again, 20 times.
answers_go_on() {
    [ -n "$counter" ] || return 0
    await "the service answers again" has_answers $(($(wc -l <"$work/answers") + 20))
}

# check_answers: each acknowledged count must still be there: the next one is higher, and by one where all were answered.
check_answers() {
    [ -n "$counter" ] || return 0
    kill "$client" 2>/dev/null || true
    wait "$client" 2>/dev/null || true
    client=''
    awk -v harmed="${harmed:-0}" '
        $3 == "-" { unanswered++; next }
        $3 !~ /^[0-9]+$/ { print "no number: " $0; bad++; next }
        {
            if (n && $3 <= last) { print "answered " $3 " after " last ": an acknowledged count is gone"; bad++ }
            if (n && $3 > last + 1 + unanswered) { print "answered " $3 " after " last ": counted twice"; bad++ }
            if (n && $2 - before > longest) longest = $2 - before
            last = $3; before = $2; unanswered = 0; n++
        }
        END {
            printf "%d counts, the longest time without an answer %d ms, %d violations\n", n, longest, bad
            exit bad > 0
        }' "$work/answers" || fail "the service took back what it had said"
}

# restore: undoes what the script changed. Scripts replace it; it may be called when nothing was changed.
restore() { :; }

end() {
    local status=$?
    trap '' INT TERM
    [ -z "${client:-}" ] || kill "$client" 2>/dev/null || true
    restore || say "what was changed is NOT restored" >&2
    rm -rf "$work"
    exit "$status"
}
