"""Calls timed in turn."""

import itertools

import numpy as np

from benchmarks import turns


def test_turns_go_forth_and_back_and_begin_with_calls_that_are_not_timed():
    called: list[str] = []

    def call(name: str) -> None:
        called.append(name)

    times = turns.time_in_turn(
        {name: lambda name=name: call(name) for name in "ab"}, turns=3, warming=2
    )
    in_a_row = [(name, len(list(group))) for name, group in itertools.groupby(called)]
    timed = len(times["a"]) // 3
    assert in_a_row == [
        ("a", 2 + timed),
        ("b", 2 * (2 + timed)),
        ("a", 2 * (2 + timed)),
        ("b", 2 + timed),
    ]
    assert len(turns.medians(times["a"])) == len(turns.medians(times["b"])) == 3


def test_medians_are_those_of_each_turn():
    calls = {"a": lambda: None}
    timed = len(turns.time_in_turn(calls, turns=1, warming=0)["a"])
    first, second = np.arange(timed) + 1.0, np.arange(timed) + 11.0
    np.testing.assert_array_equal(
        turns.medians([*first, *second]), [np.median(first), np.median(second)]
    )
