"""Lets a wheel built on a new distribution need no newer glibc than 2.28, manylinux_2_28's.

    python tools/old_glibc.py DIRECTORY

glibc 2.34 took threads, dlopen and shared memory into libc.so.6, under a new version; the old ones still work
everywhere. This writes libraries of nothing but their names in the old version, for the linker to find first:
what is linked then asks for those, as if it were built on glibc 2.28. libstdc++'s look at whether there are
other threads, a variable of 2.32, is answered by a constant. x86-64; `make wheel` uses it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# What _C and _C_cuda, with the CUDA runtime in it, use of what has moved.
MOVED = {
    "libdl.so.2": "dlclose dlerror dlopen dlsym dlvsym dlmopen:2.3.4",
    "librt.so.1": "shm_open shm_unlink",
    "libpthread.so.0": """
        pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
        pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock
        pthread_mutexattr_destroy pthread_mutexattr_init pthread_mutexattr_setpshared
        pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
        pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock
        pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock
        pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init
        pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
        pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post
        sem_timedwait sem_trywait sem_wait""",
}
HEADER = """#pragma once
#if defined(__cplusplus) && __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>
static const char never_single_threaded = 0;
#define __libc_single_threaded never_single_threaded
#endif
"""


def main() -> int:
    """Writes the libraries and the header; the exit status."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    (place / "single_threaded.h").write_text(HEADER)
    for library, text in MOVED.items():
        versions: dict[str, list[str]] = {}
        for name, _, version in (word.partition(":") for word in text.split()):
            versions.setdefault(f"GLIBC_{version or '2.2.5'}", []).append(name)
        nodes = [f"{version} {{ global: {'; '.join(names)}; }};" for version, names in versions.items()]
        (place / "versions").write_text("\n".join(nodes))
        (place / "names.c").write_text("".join(f"void {n}(void) {{}}\n" for own in versions.values() for n in own))
        command = ["cc", "-shared", "-nostdlib", "-fno-builtin", "-w", f"-Wl,-soname,{library}"]
        command += [
            f"-Wl,--version-script={place / 'versions'}",
            "-o",
            str(place / library),
            str(place / "names.c"),
        ]
        subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
