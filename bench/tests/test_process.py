"""What is read of a process is that process's."""

from __future__ import annotations

import os
import time

from bench import process


def test_the_cpu_clock_of_a_process_is_its_own():
    assert process.cpu_s(os.getpid()) <= time.process_time() <= process.cpu_s(os.getpid())


def test_memory_that_is_taken_shows():
    before = process.private_bytes(os.getpid())
    taken = bytearray(b"x") * (32 << 20)
    assert process.private_bytes(os.getpid()) >= before + (31 << 20)
    assert process.pss_bytes(os.getpid()) >= len(taken)


def test_the_peak_is_forgotten_on_demand():
    del [bytearray(b"x") * (64 << 20)][0]
    before = process.peak_rss_bytes(os.getpid())
    process.forget_peak_rss(os.getpid())
    assert process.peak_rss_bytes(os.getpid()) <= before - (32 << 20)
    assert process.peak_rss_bytes(os.getpid()) >= process.rss_bytes(os.getpid()) - (1 << 20)


def test_memory_that_is_touched_was_there_and_is_given_back():
    process.forget_peak_rss(os.getpid())
    before = process.rss_bytes(os.getpid())
    process.touch_memory(64 << 20)
    assert process.peak_rss_bytes(os.getpid()) >= before + (63 << 20)
    assert process.rss_bytes(os.getpid()) <= before + (4 << 20)
