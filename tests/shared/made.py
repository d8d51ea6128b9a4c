"""What takes long to make, made for whoever asks for it and for nothing else."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path


class Made(Mapping[str, Path]):
    """Folders by name, each of them made when it is first asked for.

    A test of one family waits for that family alone; iterating makes all of them. What is made in the middle of a test
    is made in what the test has changed by then, so those that such tests ask for are made at once.
    """

    def __init__(
        self, names: Iterable[str], make: Callable[[str], Path], at_once: Iterable[str] = ()
    ) -> None:
        """Know these names; make(name) returns the folder of one."""
        self._names, self._make = dict.fromkeys(names), make
        self._folders: dict[str, Path] = {}
        self._folders.update((name, make(name)) for name in at_once)

    def __getitem__(self, name: str) -> Path:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._folders:
            self._folders[name] = self._make(name)
        return self._folders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Answer without making anything, which Mapping's own would do."""
        return name in self._names
