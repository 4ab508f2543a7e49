"""What bench-layers, bench-space and bench-disk share: hosts, mounts, QEMU's export, fio, and cleaning up."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
PLOOPFS = os.path.join(TARGET, "release/ploopfs")
MIB = 1 << 20
undo = []


def run(*args, **kw):
    return subprocess.run(args, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **kw).stdout


def fio(path, **options):
    options = dict({"name": "x", "filename": path, "ioengine": "libaio", "direct": 1, "output-format": "json"}, **options)
    args = ["fio"] + [f"--{k}={v}" for k, v in options.items()]
    job = json.loads(run(*args))["jobs"][0]
    return job


def host(kind, size):
    """A file system of `kind` in a file on the disk; "tmpfs" and "disk" (that of /tmp) as they are."""
    where = tempfile.mkdtemp(prefix="ploopfs-bench.", dir="/dev/shm" if kind == "tmpfs" else "/tmp")
    undo.append(lambda: shutil.rmtree(where, ignore_errors=True))
    if kind in ("tmpfs", "disk"):
        return where
    disk, mnt = f"{where}/disk", f"{where}/mnt"
    run("truncate", "-s", str(size), disk)
    run(*({"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "ext4": ["mkfs.ext4", "-q", "-F"]}[kind]), disk)
    os.mkdir(mnt)
    run("mount", "-o", "loop", disk, mnt)
    undo.append(lambda: subprocess.run(["umount", mnt]))
    return mnt


def mount(images, *options):
    mnt = tempfile.mkdtemp(prefix="ploopfs-bench.")
    run(PLOOPFS, "mount", *options, images, mnt)

    def end():
        subprocess.run([PLOOPFS, "umount", mnt], stdout=subprocess.DEVNULL)
        os.rmdir(mnt)

    undo.append(end)
    return mnt


def export(image, writable, driver="qcow2"):
    """QEMU's FUSE export of an image, its best setting."""
    point = image + ".export"
    open(point, "w").close()
    file = {"driver": "file", "filename": image, "aio": "io_uring", "discard": "unmap"}
    node = json.dumps({"driver": driver, "node-name": "d", "file": file, "discard": "unmap"})
    daemon = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", node, "--export", f"type=fuse,id=e,node-name=d,mountpoint={point},writable={'on' if writable else 'off'}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    size = json.loads(run("qemu-img", "info", "-U", "--output=json", image))["virtual-size"]
    for _ in range(100):
        if os.stat(point).st_size == size:
            break
        time.sleep(0.1)

    def end():
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()

    return point, end


def median(values):
    return statistics.median(values)


def main(parts):
    """Runs the parts that the command line names, or all; cleans up in any case."""
    wanted = sys.argv[1:] or list(parts)
    if unknown := set(wanted) - set(parts):
        sys.exit(f"unknown: {', '.join(unknown)}; there are {', '.join(parts)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name in wanted:
            parts[name]()
    finally:
        for step in reversed(undo):
            step()
