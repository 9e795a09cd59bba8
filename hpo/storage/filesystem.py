"""Finds the file system of a path. SQLite's locks do not work on network file systems."""

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
    """Return the type of a path's file system, as the system names it, "" if unknown. The path need not exist."""
    resolved = path.resolve()
    mounted = {Path(found.mountpoint): found.fstype for found in psutil.disk_partitions(all=True)}
    return next((mounted[folder] for folder in (resolved, *resolved.parents) if folder in mounted), "")
