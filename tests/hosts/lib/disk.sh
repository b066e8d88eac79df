# What is on the drive of the guest that serves Redis, when all that is left is its image.

# recovered_drive SIDE FOLDER: the files that are on the drive of a host that loses power now, in FOLDER/appendonlydir; says what is
# wrong with it. File systems are brought in order from their journals, as the next kernel would.
recovered_drive() {
    local side=$1 folder=$2 status
    rm -rf "$folder"
    mkdir -p "$folder"
    disk_of "$side" "$folder/host" || { echo "the disk cannot be copied"; return 1; }
    e2fsck -fp "$folder/host" >"$folder/host.fsck" 2>&1 || status=$?
    [ "${status:-0}" -le 1 ] || { echo "the host's file system is damaged; see $folder/host.fsck"; return 1; }
    debugfs -R "dump /data.img $folder/data" "$folder/host" >"$folder/dump" 2>&1
    [ -s "$folder/data" ] || { echo "there is no image; see $folder/dump"; return 1; }
    status=0
    e2fsck -fp "$folder/data" >"$folder/data.fsck" 2>&1 || status=$?
    [ "$status" -le 1 ] || { echo "the guest's file system is damaged; see $folder/data.fsck"; return 1; }
    debugfs -R "rdump /appendonlydir $folder" "$folder/data" >"$folder/dump" 2>&1
    [ -s "$folder/appendonlydir/appendonly.aof.manifest" ] || { echo "Redis's files are not there; see $folder/dump"; return 1; }
}

# check_disk SIDE: a Redis in the world outside reads from the image of SIDE what clients were told, as if both hosts were gone.
check_disk() {
    local folder="$clients/drive" wrong server redis="$cache/redis-server"
    if ! wrong=$(recovered_drive "$1" "$folder"); then
        complain "the drive of $1: $wrong"
        return
    fi
    "${enter_outside[@]}" "$redis/lib64/ld-linux-x86-64.so.2" --library-path "$redis/lib/x86_64-linux-gnu" \
        "$redis/bin/redis-server" --bind 10.78.0.1 --port 6380 --dir "$folder" --appendonly yes --save '' \
        --protected-mode no >"$folder/redis.out" 2>&1 </dev/null 9>&- &
    server=$!
    outside "$(binary redis-drill)" recovered 10.78.0.1:6380 "$clients/history" "$clients/recovered" ||
        complain "what is on the drive of $1 cannot be read; see $folder/redis.out"
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    # Large, and of no use any more.
    rm -f "$folder/host" "$folder/data"
}
