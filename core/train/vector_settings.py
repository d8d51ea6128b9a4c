"""Settings of the objectives that make word vectors."""

from dataclasses import dataclass

from portlm.settings import require_range


@dataclass(frozen=True)
class SkipgramSettings:
    """Negative sampling (Mikolov et al. 2013), with the defaults of word2vec.c."""

    cbow: bool = False  # guess a word from the mean of its context, instead of its context from the word
    window: int = 5  # words on either side, at most: each word draws its own number from 1 to this
    negatives: int = 5  # words that are drawn for each that is right
    subsample: float = (
        1e-3  # a word of a larger share of the text than this is often left out; 0 leaves none out
    )

    def __post_init__(self) -> None:
        require_range("skipgram.window", self.window, 1, 100)
        require_range("skipgram.negatives", self.negatives, 1, 1000)
        require_range("skipgram.subsample", self.subsample, 0, 1)


@dataclass(frozen=True)
class GloveSettings:
    """The weighted least squares of Pennington et al. 2014, with the defaults of the paper."""

    window: int = 10  # words on either side; one at a distance of d counts 1/d
    x_max: float = 100.0  # pairs that are seen as often or more have the full weight
    power: float = 0.75  # of the weight of rarer ones, (count / x_max)^power

    def __post_init__(self) -> None:
        require_range("glove.window", self.window, 1, 100)
        require_range("glove.x_max", self.x_max, 0, open_low=True)
        require_range("glove.power", self.power, 0, 1)
