"""On what kind of file system a path lies: SQLite's locks do not hold on those that a network serves."""

from __future__ import annotations

from pathlib import Path

import psutil

# fmt: off
NETWORK = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph",
    "glusterfs", "lustre", "beegfs", "gpfs", "panfs", "pvfs2", "orangefs", "sshfs",
    "davfs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse",
})
# fmt: on


def kind_of(path: Path) -> str:
    """Return the type, as the system calls it, of the file system on which a path lies or would lie; "" if unknown."""
    resolved = path.resolve()
    mounted = {Path(found.mountpoint): found.fstype for found in psutil.disk_partitions(all=True)}
    return next((mounted[folder] for folder in (resolved, *resolved.parents) if folder in mounted), "")
