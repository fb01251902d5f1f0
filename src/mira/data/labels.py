"""The labels of a conversation: the tokens of its answers."""

from __future__ import annotations

from dataclasses import dataclass

from mira.core.encoded import Encoded
from mira.data.chat import Answer, Conversation
from mira.data.tokenizing import Tokens


@dataclass(frozen=True)
class Labels:
    """``stops``: the tokens that end a generated answer. ``added``: the tokens that text is never split through. ``eos``: the
    token that is added where the template ends no answer."""

    stops: frozenset[int]
    added: frozenset[int]
    eos: int

    def encoded(self, talk: Conversation, asked: tuple[int, ...], whole: Tokens) -> Encoded:
        """The whole conversation, with labels on each answer, from the end of its prompt through the token that ends it."""
        ids, label = list(whole.ids), [False] * len(whole.ids)
        same = whole.ids[: len(asked)] == asked
        prompt = len(asked) if same else whole.before(talk.answers[-1].start)
        for answer in talk.answers:
            last = answer is talk.answers[-1]
            first = prompt if last else whole.before(answer.start)
            stop = self._stop(talk, whole, answer)
            end = self._unended(talk, whole, answer) if stop is None else stop + 1
            label[first:end] = [True] * (end - first)
            if last and stop is None:
                ids, label = [*ids[:end], self.eos], [*label[:end], True]
        return Encoded(tuple(ids), tuple(label), False, prompt, () if same else asked)

    def _stop(self, talk: Conversation, whole: Tokens, answer: Answer) -> int | None:
        """The place of the token that ends ``answer``: the first added token after its words and white space, if generation stops
        at it; where tool calls may follow the words, the first stop token. None where there is none."""
        words_end = answer.text[1]
        if answer.loose:
            turn = range(whole.before(words_end), whole.before(answer.limit))
            return next((n for n in turn if whole.ids[n] in self.stops), None)
        after = (n for n in range(whole.before(words_end), len(whole.ids)) if whole.ids[n] in self.added)
        stop = next(after, None)
        if stop is None or whole.ids[stop] not in self.stops:
            return None
        return None if talk.whole.text[words_end : whole.spans[stop][0]].strip() else stop

    def _unended(self, talk: Conversation, whole: Tokens, answer: Answer) -> int:
        """The place after an answer without a stop token: after its words or tool calls, or the token that contains their end."""
        limit = answer.text[1]
        if answer.loose:
            limit = len(talk.whole.text[: answer.limit].rstrip())
        end = next((n for n, (start, _) in enumerate(whole.spans) if start >= limit), len(whole.ids))
        last = whole.ids[end - 1]
        ends_turn = answer.loose and last in self.added and last not in self.stops
        return end - 1 if ends_turn and whole.spans[end - 1][0] >= answer.text[1] else end
