"""Which backend is chosen, for every verdict about KVM; the cache of the verdict; doctor's data."""

from __future__ import annotations

from pathlib import Path

import pytest

from microvm import accel, doctor
from microvm.errors import AccelError

Verdict = tuple[str, int, str, float, float]

GOOD: Verdict = ("good", 0, "", 0.3, 1500.0)
USELESS: Verdict = ("useless", 0, "", 717.0, 8750.0)
OLD: Verdict = ("old", 95, "KVM_CAP_IMMEDIATE_EXIT", 0.0, 0.0)
FORBIDDEN: Verdict = ("forbidden", 13, "/dev/kvm", 0.0, 0.0)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /dev/kvm, and a cache of its own."""
    path = tmp_path / "kvm"
    path.touch()
    path.chmod(0o660)
    monkeypatch.setattr(accel, "_DEVICE", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def measure(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> list[int]:
    """Makes the measurement give `verdict`; the list grows with each measurement."""
    calls: list[int] = []

    def measured() -> Verdict:
        calls.append(1)
        return verdict

    monkeypatch.setattr(accel, "_measure", measured)
    return calls


@pytest.mark.parametrize(
    ("verdict", "backend"), [(GOOD, "kvm"), (USELESS, "dbt"), (OLD, "dbt"), (FORBIDDEN, "dbt")]
)
def test_accel_auto_takes_kvm_only_if_good(
    device: Path, monkeypatch: pytest.MonkeyPatch, verdict: Verdict, backend: str
) -> None:
    measure(monkeypatch, verdict)
    chosen, why = accel.choose("auto")
    assert chosen == backend
    assert why


def test_accel_auto_without_device_takes_dbt_and_measures_nothing(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measure(monkeypatch, GOOD)
    device.unlink()
    chosen, why = accel.choose("auto")
    assert (chosen, calls) == ("dbt", [])
    assert str(device) in why


def test_accel_dbt_asked_for_measures_nothing(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measure(monkeypatch, GOOD)
    assert accel.choose("dbt") == ("dbt", "asked for")
    assert calls == []


def test_accel_kvm_asked_for_is_taken_though_slow(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, USELESS)
    assert accel.choose("kvm")[0] == "kvm"


@pytest.mark.parametrize("verdict", [OLD, FORBIDDEN])
def test_accel_kvm_asked_for_and_unusable_says_what_to_do(
    device: Path, monkeypatch: pytest.MonkeyPatch, verdict: Verdict
) -> None:
    measure(monkeypatch, verdict)
    with pytest.raises(AccelError, match=r"--accel kvm: .*; ."):
        accel.choose("kvm")


def test_accel_second_time_comes_from_the_cache(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measure(monkeypatch, USELESS)
    first, second = accel.probe_kvm(), accel.probe_kvm()
    assert first == second
    assert len(calls) == 1


def test_accel_changed_rights_are_measured_again(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measure(monkeypatch, USELESS)
    accel.probe_kvm()
    device.chmod(0o666)
    accel.probe_kvm()
    assert len(calls) == 2


@pytest.mark.parametrize("text", ["", "1\n", "garbage\nuseless\n0\n\n1\n1\n", "\x00\xff"])
def test_accel_broken_cache_is_measured_again(
    device: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    calls = measure(monkeypatch, USELESS)
    accel.probe_kvm()
    Path(accel._cache_path()).write_text(text, encoding="latin-1")
    assert accel.probe_kvm().verdict == "useless"
    assert len(calls) == 2


def test_accel_forbidden_names_the_group(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, FORBIDDEN)
    assert "usermod -aG" in accel.probe_kvm().advice


def test_accel_real_device_is_judged() -> None:
    probe = accel.probe_kvm(fresh=True)
    assert probe.verdict != "broken", probe.reason
    if probe.verdict in ("good", "useless"):
        assert probe.ns_per_exit > 0


def test_doctor_findings_are_complete() -> None:
    findings = doctor.examine()
    names = [finding.name for finding in findings]
    assert {"cpu", "kvm", "translator", "accel", "kernel", "memory"} <= set(names)
    assert len(names) == len(set(names))
    for finding in findings:
        assert finding.state in ("ok", "note", "bad")
        assert finding.found
        assert finding.advice or finding.state != "bad"
