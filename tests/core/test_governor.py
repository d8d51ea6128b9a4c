"""The choice between all threads and one, on times that are made up: no test here depends on a clock."""

import random

import pytest

from portlm.governor import LONGEST_STAY, TRIAL, Governor

STEP = 0.005  # seconds that a step takes on an idle machine with all threads


def run(governor, steps, time_of, kind="decoder"):
    """Take steps whose seconds are time_of(alone); return which of them ran on one thread, and their seconds."""
    alone, seconds = [], []
    for _ in range(steps):
        alone.append(governor.alone)
        seconds.append(time_of(governor.alone))
        governor.took(kind, seconds[-1], governor.alone)
    return alone, seconds


def idle(alone):
    return 2 * STEP if alone else STEP


def jammed(rng):
    """Every other step with all threads waits for a thread that was set aside; one thread is slower and steady."""
    return lambda alone: 1.6 * 2 * STEP if alone else STEP + rng.choice([0.0, 30 * STEP])


def test_an_idle_machine_always_uses_all_threads():
    rng = random.Random(1)
    alone, _ = run(Governor(2), 5000, lambda alone: idle(alone) * rng.uniform(1.0, 2.5))
    assert not any(alone)


def test_steps_that_grow_with_the_context_are_not_taken_for_slow_ones():
    times = iter(STEP * (1 + i / 200) for i in range(2000))  # eleven times as long in the end
    alone, _ = run(Governor(2), 2000, lambda alone: next(times))
    assert not any(alone)


def test_a_single_pause_costs_no_more_than_a_few_times_itself():
    governor = Governor(2)
    pauses = iter([STEP] * 10 + [20 * STEP])
    _, seconds = run(governor, 1000, lambda alone: next(pauses, idle(alone)))
    assert sum(seconds) - 1000 * STEP <= 10 * 20 * STEP
    assert not governor.alone


def test_a_small_pause_changes_nothing():
    pauses = iter([STEP] * 10 + [4 * STEP])
    alone, _ = run(Governor(2), 1000, lambda alone: next(pauses, idle(alone)))
    assert not any(alone)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [50, 2000])
def test_beside_busy_programs_nearly_all_steps_run_on_one_thread(seed, steps):
    rng = random.Random(seed)
    alone, seconds = run(Governor(2), steps, jammed(rng))
    assert sum(alone) >= 0.9 * steps
    assert sum(seconds) <= 2 * steps * jammed(rng)(alone=True)


def test_all_threads_come_back_soon_after_the_others_are_done():
    governor = Governor(2)
    run(governor, 500, jammed(random.Random(3)))
    alone, seconds = run(governor, 5000, idle)
    back = alone.index(False)
    assert sum(seconds[:back]) <= LONGEST_STAY + 2 * STEP
    assert not any(alone[back:])


def test_one_thread_that_is_no_better_is_left_after_the_trial_and_seldom_tried_again():
    rng = random.Random(4)

    def slow_disk(alone):  # which no choice of threads can help
        return 40 * STEP if alone else STEP + rng.choice([0.0, 0.0, 0.0, 30 * STEP])

    alone, _ = run(Governor(2), 3000, slow_disk)
    trials = sum(1 for before, now in zip([False, *alone], alone, strict=False) if now and not before)
    assert sum(alone) == TRIAL * trials
    assert trials <= 200


def test_a_prompt_of_another_size_is_another_kind_of_step():
    governor = Governor(2)
    run(governor, 10, idle)
    alone, _ = run(governor, 10, lambda alone: 50 * STEP, kind="prompt")
    assert not any(alone)


def test_a_step_that_began_before_the_last_turn_says_nothing():
    governor = Governor(2)
    run(governor, 10, idle)
    governor.took("decoder", 100 * STEP, alone=False)
    assert governor.alone
    for _ in range(10 * TRIAL):
        governor.took("decoder", 100 * STEP, alone=False)
    assert governor.alone


def test_many_cores_are_given_up_for_more_than_few_are():
    """Because a step on one thread may take as many times as long as there are cores."""
    few, many = Governor(2), Governor(64)
    for governor in (few, many):
        run(governor, 10, idle)
        governor.took("decoder", 20 * STEP, alone=False)
    assert few.alone
    assert not many.alone
