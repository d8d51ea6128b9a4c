"""Experiments of no time at all, where a process of its own finds them."""

import os
import signal
import time

from portlm.flows.lab.experiment import Bar


class Coin:
    """It says which process tossed it."""

    name = "coin"
    shows = "A coin has two sides."
    source = "nobody"
    seeds = (3, 4)
    bars = (Bar("share", ">=", 0.25), Bar("sides", "==", 2))
    runs: list[int] = []  # noqa: RUF012  the tests look at it

    def run(self, seed, tell):
        tell("tossing")
        self.runs.append(seed)
        return {"share": 0.1 * seed, "sides": 2, "tosses": [seed] * 3, "process": os.getpid()}

    def draw(self, results, path):
        path.write_bytes(repr(sorted(results)).encode())


class Broken(Coin):
    """One seed of it fails."""

    name = "broken"

    def run(self, seed, tell):
        if seed == 3:
            raise ArithmeticError("the coin is on its edge")
        return super().run(seed, tell)


class Killed(Coin):
    """One seed of it ends its process, as a system without memory does."""

    name = "killed"

    def run(self, seed, tell):
        if seed == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(seed, tell)


class Endless(Coin):
    """All but one seed of it go on until they are ended."""

    name = "endless"
    seeds = (3, 4, 5)

    def run(self, seed, tell):
        while seed != 3:
            tell(f"is process {os.getpid()}")
            time.sleep(0.05)
        return super().run(seed, tell)
