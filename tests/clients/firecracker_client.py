"""firecracker-python, as PyPI has it, configures, starts, pauses, snapshots and restores a guest of Understudy's."""

import os
import subprocess
import sys
import time

from firecracker.api import Api
from firecracker.exceptions import APIError

UNDERSTUDY, WORK = sys.argv[1:]
PATIENCE = 60


def serve(name):
    """A process without a guest, and its API as the client sees it."""
    socket = os.path.join(WORK, name)
    console = open(socket + ".console", "wb")
    process = subprocess.Popen([UNDERSTUDY, "run", "--api-sock", socket], stdin=subprocess.DEVNULL, stdout=console)
    eventually(lambda: os.path.exists(socket), "the API is served")
    return process, Api(socket)


def eventually(holds, what):
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until, f"not in time: {what}"
        time.sleep(0.01)


def counted(name):
    """How far the guest has counted on its console."""
    with open(os.path.join(WORK, name + ".console")) as console:
        whole = console.read().rpartition("\n")[0]
    return sum(line.startswith("count cpu=0 ") for line in whole.splitlines())


def refused(request, words, **body):
    try:
        request(**body)
    except APIError as error:
        assert words in str(error), f"{words!r} is not in {error}"
    else:
        raise AssertionError(f"{body} was accepted")


def equal(found, wanted):
    assert found == wanted, f"{found!r} instead of {wanted!r}"


def state(api):
    return api.describe.get().json()["state"]


def main():
    process, api = serve("first")
    equal(state(api), "Not started")
    assert "firecracker_version" in api.version.get().json()
    refused(api.vm.patch, "before starting", state="Paused")
    refused(api.machine_config.put, "vcpu_count", vcpu_count=0, mem_size_mib=64)

    disk = os.path.join(WORK, "disk.img")
    with open(disk, "wb") as image:
        image.truncate(1 << 20)
    # The calls are those that the client's own MicroVM makes.
    api.boot.put(kernel_image_path="embedded:guest", boot_args="workload=count")
    api.drive.put(drive_id="rootfs", path_on_host=disk, is_root_device=True, is_read_only=False)
    api.machine_config.put(vcpu_count=1, mem_size_mib=64)
    api.machine_config.patch(track_dirty_pages=True)
    api.network.put(iface_id="eth0", host_dev_name="tap-client")
    api.vsock.put(guest_cid=3, uds_path=os.path.join(WORK, "vsock"))

    machine = api.machine_config.get().json()
    equal((machine["vcpu_count"], machine["mem_size_mib"], machine["track_dirty_pages"]), (1, 64, True))
    config = api.vm_config.get().json()
    equal(config["boot-source"]["kernel_image_path"], "embedded:guest")
    equal([drive["drive_id"] for drive in config["drives"]], ["rootfs"])
    equal(config["drives"][0]["path_on_host"], disk)
    equal(config["network-interfaces"][0]["host_dev_name"], "tap-client")
    equal(config["vsock"]["guest_cid"], 3)

    api.actions.put(action_type="InstanceStart")
    equal(state(api), "Running")
    eventually(lambda: counted("first") > 10, "the guest runs")
    refused(api.actions.put, "after starting", action_type="InstanceStart")
    refused(api.machine_config.put, "after starting", vcpu_count=2, mem_size_mib=64)
    api.drive.patch(drive_id="rootfs", path_on_host=disk)

    api.vm.patch(state="Paused")
    equal(state(api), "Paused")
    stopped = counted("first")
    snapshot, memory = os.path.join(WORK, "snapshot"), os.path.join(WORK, "memory")
    api.create_snapshot.put(mem_file_path=memory, snapshot_path=snapshot)
    assert os.path.getsize(memory) > 0 and os.path.getsize(snapshot) > 0
    equal(counted("first"), stopped)
    api.vm.patch(state="Resumed")
    equal(state(api), "Running")
    eventually(lambda: counted("first") > stopped + 10, "the guest runs on")
    api.close()
    process.kill()
    process.wait()

    process, api = serve("second")
    api.load_snapshot.put(
        enable_diff_snapshots=True,
        mem_backend={"backend_type": "File", "backend_path": memory},
        snapshot_path=snapshot,
        resume_vm=True,
        network_overrides=[{"iface_id": "eth0", "host_dev_name": "tap-client"}],
    )
    equal(state(api), "Running")
    eventually(lambda: counted("second") > 10, "the guest goes on")
    api.close()
    process.terminate()
    process.wait()
    print("== firecracker-python: a guest was configured, started, paused, snapshotted, resumed and restored")


main()
