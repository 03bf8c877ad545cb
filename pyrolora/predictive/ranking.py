"""Which of the continuations that draws wrote are the answer."""

from __future__ import annotations

from pyrolora.predictive.generation import Generation


def chosen(generation: Generation, count: int, *, sampled: bool, prompt: int = 0) -> list[int]:
    """Return the places of ``count`` continuations of a prompt.

    Of sampled ones the first of every draw, then the second, which is a sample of the posterior
    predictive. Of greedy ones those that the mixture over draws finds likeliest per token.
    """
    places = range(generation.sequences.shape[1])
    if sampled:
        seen: dict[int, int] = {}
        turns = []
        for place in places:
            draw = int(generation.draw[place])
            turns.append(seen.setdefault(draw, 0))
            seen[draw] += 1
        return sorted(places, key=lambda place: (turns[place], place))[:count]
    score = generation.log_predictive[prompt] / generation.num_tokens[prompt].clamp(min=1)
    return score.argsort(descending=True, stable=True)[:count].tolist()
