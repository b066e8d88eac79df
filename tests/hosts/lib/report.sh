# What a drill says: a line for people, or with --json one JSON object a line.

# Checks and scenarios that did not pass.
failures=0

# json_text TEXT: TEXT as a JSON string.
json_text() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    printf '"%s"' "${text//[$'\001'-$'\037']/ }"
}

# report_check DRILL NAME true|false TEXT
report_check() {
    "$3" || failures=$((failures + 1))
    if "$json"; then
        printf '{"drill":"%s","check":"%s","passed":%s,"text":%s}\n' "$1" "$2" "$3" "$(json_text "$4")"
    else
        "$3" && printf 'ok      ' || printf 'FAILED  '
        printf '%s: %s\n' "$2" "$4"
    fi
}

report_skip() {
    ! "$json" || printf '{"drill":"%s","outcome":"skipped","reason":%s}\n' "$command" "$(json_text "$1")"
}

# field NAME JSON: a number or string of a flat JSON object; empty if it is not there.
field() { sed -n "s/.*\"$1\": *\"\{0,1\}\([^,\"}]*\).*/\1/p" <<<"$2"; }

# report_runs DRILL NAME DIRECTORY RUNS: what the demo reported of each run of a scenario. A run that was not reported
# has failed.
report_runs() {
    local drill=$1 name=$2 dir=$3 wanted=$4 seen=0 survived=0 status=none run_status line
    while read -r run_status line; do
        status=$run_status
        [[ $line == "{"* ]] || continue
        seen=$((seen + 1))
        report_run "$drill" "$name" "$status" "$line" && survived=$((survived + 1))
    done < <(results_of "$dir" "$name")

    report_repeated "$name" "$dir"
    if [ "$seen" -ne "$wanted" ]; then
        report_missing "$drill" "$name" "$seen of $wanted runs reported, exit status $status; see $dir/console.log"
    elif [ "$survived" -eq "$wanted" ] && [ "$status" != 0 ]; then
        report_missing "$drill" "$name" "all survived, it says, but exit status $status; see $dir/console.log"
    elif [ "$survived" -eq "$wanted" ]; then
        return
    fi
    failures=$((failures + 1))
}

# report_repeated NAME DIRECTORY: says how often a scenario was run once more.
report_repeated() {
    while read -r _; do
        say "$1 was run once more: its guest had crashed (see $2/console.log)"
    done < <(results_of "$2" "$1" | grep -x again)
}

# Prints one report; returns whether the guest survived.
report_run() {
    local drill=$1 name=$2 status=$3 line=$4 outcome
    outcome=$(field outcome "$line")
    if "$json"; then
        printf '{"drill":"%s","kernel":"%s","exit_status":%s,%s\n' "$drill" "$name" "$status" "${line#\{}"
    elif [ "$outcome" = survived ]; then
        printf '%-17s survived  epochs %s, failover %s ms, outputs %s before and %s after (lost %s), pages verified %s (wrong %s)\n' \
            "$name" "$(field epochs_committed "$line")" "$(field failover_ms "$line")" \
            "$(field outputs_before "$line")" "$(field outputs_after "$line")" "$(field outputs_lost "$line")" \
            "$(field pages_verified "$line")" "$(field pages_wrong "$line")"
    else
        printf '%-17s FAILED    %s\n' "$name" "$line"
    fi
    [ "$outcome" = survived ]
}

report_missing() {
    if "$json"; then
        printf '{"drill":"%s","kernel":"%s","outcome":"failed","reason":%s}\n' "$1" "$2" "$(json_text "$3")"
    else
        printf '%-17s FAILED    %s\n' "$2" "$3"
    fi
}
