# A virtual host: QEMU with software-emulated SVM, in which Debian's kernel loads kvm-amd and has an ordinary /dev/kvm.

# Enough for the host, its images, and two processes with a guest each.
readonly host_memory_mib=2048
readonly host_cpus=2

# run_host DIRECTORY TIMEOUT_SECONDS [PROGRAM...]: boots a virtual host which runs DIRECTORY/drill (a shell script; see
# host/init for what it can call, and it finds the PROGRAMs in its path) and switches off.
# Leaves DIRECTORY/{results,console.log,qemu.log}. Returns 0 if the host came to its end by itself.
run_host() {
    local dir=$1 seconds=$2 status=0
    shift 2
    rm -rf "$dir/overlay" "$dir/results" "$dir/console.log"
    mkdir -p "$dir/overlay/bin"
    cp "$dir/drill" "$dir/overlay/drill"
    [ $# -eq 0 ] || install -m 755 -t "$dir/overlay/bin" "$@"
    # Linux unpacks archives that follow one another into one tree: only the small one is made anew each time.
    pack "$dir/overlay" "$dir/overlay.cpio"
    cat "$cache/host.cpio" "$dir/overlay.cpio" >"$dir/initrd"

    timeout --kill-after=5 "$seconds" qemu-system-x86_64 \
        -accel tcg,thread=multi -cpu EPYC-Rome,+svm,+npt -smp "$host_cpus" -m "$host_memory_mib" \
        -nodefaults -display none -no-reboot -nic none \
        -serial "file:$dir/console.log" -serial "file:$dir/results" \
        -kernel "$cache/kernel/bzImage" -initrd "$dir/initrd" \
        -append "console=ttyS0 panic=-1 quiet tsc=reliable" >"$dir/qemu.log" 2>&1 </dev/null || status=$?
    rm -rf "$dir/initrd" "$dir/overlay.cpio" "$dir/overlay"
    [ "$status" -ne 124 ] || say "the virtual host did not end within $seconds s (see $dir/console.log)"
    grep -qsx 'end 0' "$dir/results"
}

# results_of DIRECTORY NAME: the results of one scenario, each "STATUS [TEXT]".
results_of() { sed -n "s/^$2 //p" "$1/results"; }

# run_guest_without_kvm KERNEL INITRD BOOT_ARGS SECONDS LOG: boots the Linux guest on the bare machine that Understudy gives
# it (no firmware tables, no PCI, no RTC), by QEMU's emulation instead, and ends it after SECONDS or when it powers off.
run_guest_without_kvm() {
    timeout --kill-after=5 "$4" qemu-system-x86_64 \
        -M microvm,x-option-roms=off,acpi=off,pic=on,pit=on,rtc=off,isa-serial=on,auto-kernel-cmdline=off \
        -accel tcg -cpu EPYC-Rome,-svm -m 256 -nodefaults -display none -no-reboot -serial "file:$5" \
        -kernel "$1" -initrd "$2" -append "$3" >"$5.qemu" 2>&1 </dev/null || true
}
