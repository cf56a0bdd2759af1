"""pipeline doctor: each fault of a machine is a line with advice, and so is a check that breaks."""

import fcntl
import json
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_program

from observe.doctor import folders, system
from observe.doctor.findings import Check, Finding, fail, ok
from observe.doctor.run import checks

Found = list[tuple[str, str]]


def brief(found: Iterator[Finding]) -> Found:
    """Status and text. A line that is not ok has advice, and one that is has none."""
    listed = list(found)
    assert all(bool(finding.advice) == (finding.status != "ok") for finding in listed)
    return [(str(finding.status), finding.found) for finding in listed]


def faults(found: Iterator[Finding]) -> list[str]:
    return [text for status, text in brief(found) if status != "ok"]


# ---- the command ----


@pytest.mark.slow
def test_every_check_answers_and_the_exit_code_is_that_of_the_worst(tmp_path: Path) -> None:
    result = run_program("doctor", "--json", cwd=tmp_path)
    found = json.loads(result.stdout)
    assert {
        "python", "pipeline", "packages", "compiler", "cpu", "cpu load", "memory", "shared memory", "limits", "clock",
        "host name", "data folder", "run folder", "gpu", "torch", "cpu speed", "all-reduce (cpu)",
    } <= {line["check"] for line in found}  # fmt: skip
    assert all(line.keys() == {"check", "status", "found", "advice"} for line in found)
    assert {line["status"] for line in found} <= {"ok", "warn", "fail"}
    assert result.returncode == (2 if "fail" in [line["status"] for line in found] else 0)
    (reduced,) = (line for line in found if line["check"] == "all-reduce (cpu)")
    assert re.match(r"two ranks, \d+\.\d\d GB/s", reduced["found"])
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_failure_is_a_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a folder")
    result = run_program("doctor", cwd=tmp_path)
    assert result.returncode == 2
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("fail"))
    assert re.match(r"fail  data folder +data \(\w+\): Not a directory; training cannot save there", line)
    assert re.fullmatch(r"\d+ ok, \d+ warning\(s\), 1 failure\(s\)", result.stdout.splitlines()[-1])
    assert result.stderr.strip().endswith("error: 1 check(s) failed, listed above")


def test_the_checks_need_no_torch_until_it_is_measured() -> None:
    names = [check.name for check in checks()]
    assert names.index("torch") == len(names) - 1


# ---- a check that breaks ----


def raises() -> Iterator[Finding]:
    yield ok("it", "one thing")
    raise ValueError("no such\nfile")


def dies() -> Iterator[Finding]:
    yield ok("it", "one thing")
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs() -> Iterator[Finding]:
    yield ok("it", "one thing")
    time.sleep(60)


@pytest.mark.parametrize(
    ("find", "status", "reason"),
    [
        (raises, "warn", "could not be checked: ValueError: no such file"),
        (dies, "fail", "the check was ended by SIGSEGV"),
        (hangs, "fail", "no answer within 1 s"),
    ],
)
def test_a_check_that_breaks_is_a_line_after_those_it_had(
    find: Callable[[], Iterator[Finding]], status: str, reason: str
) -> None:
    started = time.monotonic()
    assert brief(Check("it", find, limit_s=1.0).run()) == [("ok", "one thing"), (status, reason)]
    assert time.monotonic() - started < 10


# ---- the system ----


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /proc and /sys: two cores, 64 GB."""
    monkeypatch.setattr(system, "PROC", tmp_path / "proc")
    monkeypatch.setattr(system, "SYS", tmp_path / "sys")
    monkeypatch.setattr(system, "cores_here", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    write(tmp_path, "proc/cpuinfo", "model name\t: A CPU\nflags\t\t: fma avx2 avx512f amx_bf16\n")
    write(tmp_path, "proc/meminfo", "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n")
    write(tmp_path, "proc/self/cgroup", "0::/job\n")
    return tmp_path


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        ("flags : avx2 avx512_bf16", "avx512_bf16, avx2: bfloat16"),
        ("flags : avx2", "avx2: float32"),
        ("Features : asimd bf16", "bf16, asimd: bfloat16"),
        ("", "no vector unit known: float32"),
    ],
)
def test_the_features_of_a_cpu_and_its_dtype(machine: Path, cpuinfo: str, dtype: str) -> None:
    write(machine, "proc/cpuinfo", cpuinfo)
    assert dtype in brief(system.cpu())[0][1]


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"sys/fs/cgroup/cpu.max": "150000 100000"}, "the container may use 1.5 of 2 cores (cgroup CPU quota)"),
        ({"proc/self/cgroup": "1:cpu:/job", "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000"}, "may use 0.5 of 2"),
        ({"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n"}, "the frequency governor is powersave"),
        ({}, ""),
        ({"sys/fs/cgroup/cpu.max": "max 100000", "proc/self/cgroup": "1:cpu:/\n0::/"}, ""),
    ],
)  # fmt: skip
def test_a_core_that_is_not_all_ours(machine: Path, files: dict[str, str], fault: str) -> None:
    for name, text in files.items():
        write(machine, name, text)
    found = faults(system.cpu())
    assert (len(found), fault in "".join(found)) == (bool(fault), True)


def test_a_busy_machine_is_called_so(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (7.0, 7.0, 7.0))
    assert faults(system.cpu()) == ["the machine is busy: load average 7.0 on 2 cores"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, []),
        ({"proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 900000 kB\n"}, ["0.9 of 65.5 GB available"]),
        ({"sys/fs/cgroup/job/memory.max": "8000000000", "sys/fs/cgroup/job/memory.current": "7000000000"},
         ["1.0 of 8.0 GB available", "a control group allows 8.0 of the machine's 65.5 GB"]),
        ({"sys/fs/cgroup/memory.max": "max"}, []),
    ],
)  # fmt: skip
def test_memory_and_a_limit_of_it(machine: Path, files: dict[str, str], found: list[str]) -> None:
    for name, text in files.items():
        write(machine, name, text)
    assert [fault for fault in faults(system.memory()) if "/dev/shm" not in fault] == found


def test_shared_memory_of_a_container(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = type("Usage", (), {"free": 64 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda _: small)
    assert faults(system.memory()) == ["/dev/shm has 67 MB free, NCCL's ranks need 1 GB"]


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("NOFILE", 1024, "1,024 open files"),
        ("NPROC", 100, "100 processes"),
        ("FSIZE", 1 << 20, "files up to 1,048,576 bytes"),
        ("AS", 1 << 30, "1,073,741,824 bytes of address space"),
        ("CORE", resource.RLIM_INFINITY, "core dumps of any size"),
        ("MEMLOCK", 65536, "65,536 bytes of locked memory"),
        ("NOFILE", 65536, ""),
    ],
)
def test_each_limit(machine: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int, fault: str) -> None:
    unlimited = dict.fromkeys(range(20), resource.RLIM_INFINITY) | {resource.RLIMIT_CORE: 0}
    limited = unlimited | {getattr(resource, f"RLIMIT_{name}"): value}
    (machine / "sys/class/infiniband").mkdir(parents=True)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limited[which], resource.RLIM_INFINITY))
    found = faults(system.limits())
    assert (len(found), fault in "".join(found)) == (bool(fault), True)


@pytest.mark.parametrize(
    ("addresses", "fault"),
    [
        (["127.0.1.1", "::1"], "resolves to 127.0.1.1, ::1: ranks of other nodes would connect to themselves"),
        (["127.0.0.1", "10.0.0.7"], ""),
        (None, "does not resolve: ranks cannot find each other"),
    ],
)
def test_the_host_name(monkeypatch: pytest.MonkeyPatch, addresses: list[str] | None, fault: str) -> None:
    def resolve(*_: Any) -> list[Any]:
        if addresses is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(None, None, None, None, (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = faults(system.host_name())
    assert (len(found), fault in "".join(found)) == (bool(fault), True)


def test_a_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert faults(system.compiler()) == ["no C compiler (no-such-compiler)", f"{tmp_path}/Python.h is missing"]


def test_a_package_that_is_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "regex":
            raise system.metadata.PackageNotFoundError(name)
        return "2.4.1+cu121"

    monkeypatch.setattr(system.metadata, "version", version)
    assert faults(system.versions()) == ["not installed: regex", "torch 2.4.1+cu121: expected 2.9 or newer"]


# ---- GPUs: a stand-in for nvidia-smi ----

SMI = """#!/bin/sh
case "$1" in
  --query-gpu=*) {gpus} ;;
  --query-compute-apps=*) {users} ;;
esac
"""
H100 = "echo '0, NVIDIA H100 80GB HBM3, 560.35.03, 1, 81559, 41, {1}, {0}'"
OLD = 'case "$1" in *event*) echo \'Field "clocks_event_reasons.active" is not a valid field to query.\'; exit 2 ;; esac; '


@pytest.mark.parametrize(
    ("gpus", "users", "fault"),
    [
        (H100.format("0x0000000000000001", 0), "true", ""),
        (H100.format("0x0000000000000040", 0), "true", "throttled (clock event reasons 0x0000000000000040)"),
        (OLD + H100.format("0x0000000000000008", 0), "true", "throttled (clock event reasons 0x0000000000000008)"),
        (H100.format("0x0000000000000004", 2), "true", "2 uncorrected ECC errors"),
        (H100.format("[N/A]", "[N/A]"), f"echo '{os.getpid()}, python, 61234'", "held by process"),
        ("echo Failed to initialize NVML: Driver/library version mismatch; exit 18", "true", "version mismatch"),
        ("true", "true", "no GPU"),
        ("sleep 20", "true", "no answer within 1 s: the driver hangs"),
    ],
    ids=["fit", "hot", "old driver", "ecc", "held", "mismatch", "none", "hangs"],
)
def test_what_the_driver_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str, users: str, fault: str
) -> None:
    write(tmp_path, "nvidia-smi", SMI.format(gpus=gpus, users=users))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(system, "GPU_LIMIT_S", 1.0)
    found = faults(system.gpus())
    assert (len(found), fault in "".join(found)) == (bool(fault), True)


def test_a_report_of_the_driver_that_nobody_knows_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "nvidia-smi", "#!/bin/sh\necho what, is, this\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    ((status, text),) = brief(Check("gpu", system.gpus).run())
    assert status == "warn" and text.startswith("could not be checked: ValueError")


# ---- folders ----


def test_a_folder_that_can_be_written_and_leaves_nothing(tmp_path: Path) -> None:
    ((status, text),) = brief(folders.check_folder("data folder", tmp_path / "not" / "yet"))
    assert status in ("ok", "warn") and f"in {tmp_path}" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fault", ["a file", "a link to nothing", "a full disk", "no locks", "another clock", "few inodes"]
)
def test_a_folder_with_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    folder = tmp_path / "runs"
    reports = {
        "a file": "Not a directory", "a link to nothing": "No such file or directory", "a full disk": "No space left",
        "no locks": "a lock that is held is granted again", "another clock": "its clock is -100",
        "few inodes": "7 inodes free",
    }  # fmt: skip
    if fault == "a file":
        folder.write_text("")
    if fault == "a link to nothing":
        folder.symlink_to(tmp_path / "nowhere")
    if fault == "a full disk":
        monkeypatch.setattr(folders, "publish", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    if fault == "no locks":
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    if fault == "another clock":
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 100)
    if fault == "few inodes":
        space = type("Space", (), {"f_bavail": 1 << 40, "f_frsize": 1, "f_files": 1000, "f_favail": 7})
        monkeypatch.setattr(os, "statvfs", lambda _: space)
    found = faults(folders.check_folder("run folder", folder))
    assert any(reports[fault] in text for text in found), found
    assert not list(tmp_path.glob(".doctor*"))


def test_the_type_of_a_file_system() -> None:
    assert folders.file_system(Path("/proc/self")) == "proc"


def test_a_finding_without_advice_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        brief(iter([fail("it", "broken", "")]))
