"""How a session comes to guess tokens for another, or for itself: see portlm.runtimes.speculation."""

from functools import partial
from typing import Any

from portlm.arguments import shown, whole
from portlm.engine import Engine, goes_back
from portlm.errors import UsageError
from portlm.runtimes.drafting import Lookup, NewDrafter, SmallModel
from portlm.runtimes.speculation import MOST, MOST_GUESSED, Speculation
from portlm.runtimes.translation import refuse_sources


class Guesses:
    """What a Session does about guesses.

    Attributes:
        engine: what computes.
        tokenizer: what turns text into token ids.
    """

    engine: Engine
    tokenizer: Any

    def speculation(self, lookup: bool | int, draft: "Guesses | NewDrafter | None") -> Speculation | None:
        """Who guesses for the rows of one call, None for nobody."""
        most = MOST if isinstance(lookup, bool) else whole("lookup", lookup, 1, MOST_GUESSED)
        if lookup is False and draft is None:
            return None
        if lookup is not False and draft is not None:
            raise UsageError("lookup and draft are two ways to guess: choose one")
        vocabulary = self.tokenizer.vocab_size
        first = SmallModel.first_seconds
        if draft is None:
            drafter: NewDrafter = lambda row: Lookup()  # noqa: E731
            first = Lookup.first_seconds
        elif isinstance(draft, Guesses):
            for each in (self, draft):
                refuse_sources(each.engine, "a draft model continues what the model continues")
            drafter = draft._drafter(self.tokenizer)
        elif callable(draft):
            drafter = draft
        else:
            raise UsageError(f"draft must be a session (portlm.load gives one), got {shown(draft)}")
        _check_goes_back(self.engine)
        return Speculation(drafter, vocabulary, hasattr(self.engine, "advance"), most, first)

    def _drafter(self, tokenizer: Any) -> NewDrafter:
        """Return what guesses with this model for a larger one, which has this tokenizer.

        Raises:
            UsageError: the tokens of the two are not the same.
        """
        ours, theirs = self.tokenizer, tokenizer
        digests = [getattr(t, "sha256", None) for t in (ours, theirs)]
        if ours.vocab_size != theirs.vocab_size:
            what = f"a tokenizer of {ours.vocab_size} tokens, and the model one of {theirs.vocab_size}"
        elif None not in digests and digests[0] != digests[1]:
            what = "another tokenizer than the model"
        else:
            return partial(SmallModel, self.engine, ours.vocab_size)
        raise UsageError(f"the draft model has {what}: take one whose ids mean the same")


def _check_goes_back(engine: Engine) -> None:
    spec = engine.roles.get("decoder")
    if spec is not None and not goes_back(spec):
        raise UsageError(
            "this model has a state that cannot go back to before a wrong guess: decode without guesses"
        )
