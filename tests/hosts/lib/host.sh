# A virtual host: QEMU with software-emulated SVM, in which Debian's kernel loads kvm-amd and has an ordinary /dev/kvm.

# Enough for the host, its images, and two processes with a guest each.
readonly host_memory_mib=2048
# With two, interrupts between them go astray in the emulation (see README.md).
readonly host_cpus=1

# lay_out_host DIRECTORY LAYER... [-- PROGRAM...]: what a virtual host boots from. It runs DIRECTORY/drill (a shell script; see
# host/init for what it can call), finds the PROGRAMs in its path, and has the files of the initramfs images LAYER.
lay_out_host() {
    local dir=$1 layers=()
    shift
    rm -rf "$dir/overlay" "$dir/results" "$dir/console.log"
    mkdir -p "$dir/overlay/bin"
    cp "$dir/drill" "$dir/overlay/drill"
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        layers+=("$1")
        shift
    done
    [ $# -lt 2 ] || install -m 755 -t "$dir/overlay/bin" "${@:2}"
    # Linux unpacks archives that follow one another into one tree: only the small one is made anew each time.
    pack "$dir/overlay" "$dir/overlay.cpio"
    cat "$cache/host.cpio" ${layers[@]+"${layers[@]}"} "$dir/overlay.cpio" >"$dir/initrd"
    rm -rf "$dir/overlay.cpio" "$dir/overlay"
}

# virtual_host DIRECTORY TIMEOUT_SECONDS [QEMU_ARGUMENT...]: runs the virtual host that was laid out in DIRECTORY until its
# drill has ended, in the world outside if there is one (see outside.sh). Its process is in DIRECTORY/pid. Leaves DIRECTORY/{results,console.log,qemu.log}. Returns 0 if the host came to its end by itself.
virtual_host() {
    local dir=$1 seconds=$2 status=0
    shift 2
    "${enter_outside[@]}" timeout --kill-after=5 "$seconds" qemu-system-x86_64 -pidfile "$dir/pid" \
        -accel tcg,thread=multi -cpu EPYC-Rome,+svm,+npt -smp "$host_cpus" -m "$host_memory_mib" \
        -nodefaults -display none -no-reboot "$@" \
        -serial "file:$dir/console.log" -serial "file:$dir/results" \
        -kernel "$cache/kernel/bzImage" -initrd "$dir/initrd" \
        -append "console=ttyS0 panic=-1 softlockup_panic=1 quiet tsc=reliable" >"$dir/qemu.log" 2>&1 </dev/null || status=$?
    rm -f "$dir/initrd"
    [ "$status" -ne 124 ] || say "the virtual host did not end within $seconds s (see $dir/console.log)"
    grep -qsx 'end 0' "$dir/results"
}

# run_host DIRECTORY TIMEOUT_SECONDS [PROGRAM...]: a virtual host without network.
run_host() {
    local dir=$1 seconds=$2
    lay_out_host "$dir" -- "${@:3}"
    virtual_host "$dir" "$seconds" -nic none
}

# How often a scenario is run anew that the emulation has ended (see README.md); `forgiving` in host/init has it, too.
readonly most_crashes=4

# host_has_crashed DIRECTORY: nothing that runs in a virtual host may be able to do this to its kernel: it is the emulation's fault
# (see README.md).
host_has_crashed() { grep -aqs '^\[.*Kernel panic' "$1/console.log"; }

# results_of DIRECTORY NAME: the results of one scenario, each "STATUS [TEXT]".
results_of() { sed -n "s/^$2 //p" "$1/results"; }

# run_guest_without_kvm KERNEL INITRD BOOT_ARGS SECONDS LOG [QEMU_ARGUMENT...]: boots a Linux guest on a bare machine as
# Understudy gives it (no PCI, no RTC), by QEMU's emulation instead, and ends it after SECONDS or when it powers off. It has no
# firmware tables unless $microvm says so.
run_guest_without_kvm() {
    "${enter_outside[@]}" timeout --kill-after=5 "$4" qemu-system-x86_64 \
        -M "microvm,x-option-roms=off,acpi=off,pic=on,pit=on,rtc=off,isa-serial=on,auto-kernel-cmdline=off${microvm:+,$microvm}" \
        -global virtio-mmio.force-legacy=false \
        -accel tcg -cpu EPYC-Rome,-svm -m 256 -nodefaults -display none -no-reboot -serial "file:$5" \
        -pidfile "$5.pid" -kernel "$1" -initrd "$2" -append "$3" "${@:6}" >"$5.qemu" 2>&1 </dev/null || true
}
