"""Models of random n-grams, which take nothing but a generator to make."""

import torch

from portlm.models import build


def random_ngrams(config, seed=0):
    """A model whose tables hold random runs of every length, as many as there is room for, with random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def below(n):
        return int(torch.randint(n, (), generator=generator))

    model, V, M, N = build(config), config.vocab_size, config.histories, config.places
    free = set(range(1 + V, N))
    level = list(range(1, 1 + V))
    for length in range(2, config.order + 1):
        begin, end, longer = (M, N, []) if length == config.order else (1 + V, M, [])
        for parent in sorted({level[below(len(level))] for _ in range(len(level) // 2)} | {level[0]}):
            base = max(begin, 1 + V) - below(V)
            base += below(max(1, end - V - base))
            model.base[parent] = base
            for word in sorted({below(V) for _ in range(40)}):
                if base + word in free and begin <= base + word < end:
                    free.remove(base + word)
                    model.parents[base + word] = parent
                    longer.append(base + word)
        level = longer
    with torch.no_grad():
        model.log_probs.copy_(-8 * torch.rand(N, generator=generator))
        model.back_offs.copy_(-2 * torch.rand(M, generator=generator))
    assert model.problem() == ""
    return model


def children(model):
    """{entry: {word: its child}} of a model."""
    found = {}
    for place, parent in enumerate(model.parents.tolist()):
        if parent >= 0:
            found.setdefault(parent, {})[place - int(model.base[parent])] = place
    return found


def their_ngram(model, ids):
    """Katz's recursion, word by word: log p of what was seen, and log γ and a shorter history for what was not."""
    tree, V = children(model), model.config.vocab_size

    def entry_of(run):
        entry = 1 + run[0]
        for word in run[1:]:
            entry = tree.get(entry, {}).get(word)
            if entry is None:
                return None
        return entry

    def behind(history):
        if not history:
            return list(model.log_probs[1 : 1 + V].unbind())
        shorter, entry = behind(history[1:]), entry_of(history)
        if entry is None:
            return shorter
        seen = tree.get(entry, {})
        return [
            model.log_probs[seen[word]] if word in seen else model.back_offs[entry] + shorter[word]
            for word in range(V)
        ]

    look = model.config.words
    return torch.stack(
        [
            torch.stack([torch.stack(behind(row[max(0, t + 1 - look) : t + 1])) for t in range(len(row))])
            for row in ids.tolist()
        ]
    )
