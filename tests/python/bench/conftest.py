"""Shared by the tests of vivace.bench: runs of one machine as rows, and ceilings that take no time."""

import pytest

from vivace.bench import machine

FACTS = {
    "device": "cuda",
    "gpu": "NVIDIA H200",
    "unit": "0a1b2c3d",
    "memory_gib": 139.8,
    "power_limit_w": 700.0,
    "driver": "580.1",
    "torch": "2.11.0",
    "vivace": "0.2.0",
    "date": "2026-11-22T08:00Z",
}


@pytest.fixture
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(machine, "ceilings", lambda *_: {"matmul_tflops": 0.1, "copy_gb_s": 10.0, "read_gb_s": 12.0})


@pytest.fixture
def forward_row():
    """forward_row(us=...): a row of one attention cell, its quartiles 1 % around the median."""

    def make(us, case="forward d64", **fields):
        row = {"op": "forward", "case": case, "us": us, "us_q1": us * 0.99, "us_q3": us * 1.01, "arch": "sm90a"}
        return row | {"seed": 0, "warmup": 3, "hash": "0123456789ab"} | FACTS | fields

    return make
