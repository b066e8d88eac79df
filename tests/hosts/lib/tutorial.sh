# The README's tutorial, carried out: its commands are taken from the page itself.

# tutorial_commands README: the commands of the tutorial, those of the terminals `first` and `second` as processes in the
# background.
tutorial_commands() {
    awk '
        /^## / { tutorial = /^## Five minutes/ }
        /^```/ { code = !code; next }
        !(tutorial && code) { next }
        document { print; document = $0 != "END"; next }
        /<<.END.$/ { document = 1 }
        sub(/^(first|second)\$ +/, "&") { split($0, prompt, "$"); sub(/^[a-z]+\$ +/, ""); print "start " prompt[1] " " $0; next }
        sub(/^third\$ +/, "") { print "third " $0; next }
        sub(/^\$ /, "") { print }
    ' "$1"
}

# tutorial_script README: what a virtual host does for it. Prints how it went, and fails if the guest's ticks have a gap.
tutorial_script() {
    cat <<'SCRIPT'
. /lib/drill/functions
set -e
# What the terminals showed of the guest's end is what this says itself.
trap 'cat /tmp/first.err /tmp/second.err >&2' EXIT
# It may be carried out for the second time.
finish first
rm -rf /root /boot
export HOME=/root
mkdir -p /root /boot
ln -s /guest/bzImage "/boot/vmlinuz-$(uname -r)"
# What is there already in a virtual host: the program and its tools.
cargo() { :; }
sudo() {
    case $1 in
    resources/install | apt-get) ;;
    # busybox has none
    install) cp "$4" "$5" ;;
    *) "$@" ;;
    esac
}

# Debian's static busybox has none.
pkill() { kill -9 "$(cat /tmp/second.pid)"; }

# within SECONDS COMMAND...
within() {
    left=$(($1 * 5))
    shift
    until "$@"; do
        left=$((left - 1))
        [ $left -gt 0 ] || { echo "not in time: $*"; tail -n 3 /tmp/first.err /tmp/second.err; exit 1; }
        usleep 200000
    done
}
# ticks TERMINAL: the numbers that it showed.
ticks() { sed -n 's/^tick \([0-9]*\)\r*$/\1/p' "/tmp/$1.out"; }
has_ticks() { [ "$(ticks "$1" | wc -l)" -ge "$2" ]; }

# The third terminal: what its commands say is looked at, and the guest works meanwhile.
third() {
    within 60 grep -q 'is protected' /tmp/second.err
    within 60 has_ticks second 10
    said=$("$@")
    [ "$1" != understudy ] || echo "$said" | grep -q lockstep || { echo "not in lockstep: $said"; exit 1; }
}
SCRIPT
    # Everything takes its time in emulation within emulation.
    tutorial_commands "$1" |
        sed 's/"delay_ms": 5000/"delay_ms": 15000, "interval_ms": 250, "min_interval_ms": 250, "heartbeat_ms": 500, "heartbeat_misses": 6/'
    cat <<'SCRIPT'
within 60 has_ticks first 5
{ ticks second; ticks first; } | sort -n | uniq | awk '$1 != NR { print "tick " NR " is missing"; exit 1 }'
echo "$(ticks second | wc -l) ticks of the primary, $(ticks first | wc -l) of the standby, and none is missing"
SCRIPT
}

# report_tutorial DIRECTORY
report_tutorial() {
    local status=none text
    report_repeated tutorial "$1"
    read -r status text < <(results_of "$1" tutorial | tail -n 1) || true
    if [ "$status" = 0 ]; then
        report_check one-host tutorial true "$text"
    else
        report_check one-host tutorial false "exit status $status: $text; see $1/console.log"
    fi
}
