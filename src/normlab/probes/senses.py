"""Distances between two occurrences of a word in the same and in different senses.

Shape suffixes: B batch, T time, F features, N words, P pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normlab.config import DataConfig, InputError, require_choice
from normlab.data.corpora import Corpus, load_corpus
from normlab.data.tokens import Tokenizer
from normlab.probes.base import Measurement, Probe, Subject, site_summary
from normlab.probes.sites import Call, Site, watched

__all__ = ["Senses", "auc", "encode_pairs"]

BATCH = 64
QUANTITIES = ("auc", "distance_same", "distance_different", "scale")


class Pair(NamedTuple):
    """Two sentences as ids, the place of the target word's last token in each, and whether its sense is the same."""

    sentences: tuple[list[int], list[int]]
    places: tuple[int, int]
    same: bool


@dataclass(frozen=True)
class Senses(Probe):
    """Word-in-Context (Pilehvar & Camacho-Collados 2019): how far apart the senses of a word lie in the model.

    Each sentence goes through the model alone, in evaluation mode. Per site and layer (and for `output`, what enters
    the head): Euclidean distance between the vectors of the target's two occurrences (of its last token), divided by
    `scale`, the mean distance of random pairs of tokens of these sentences; its means over pairs of the same and of
    different senses; and auc, the chance that a pair of different senses is further apart than one of the same (1/2 =
    it tells nothing). Pairs whose target the model does not know (<unk>) are left out.

    Args:
        split: of the corpus wic.
        pairs: the first so many; 0 takes all.
    """

    split: str = "valid"
    pairs: int = 0

    def __post_init__(self) -> None:
        if self.pairs < 0:
            raise InputError(f"--pairs of the probe {self.name} is {self.pairs}; it must be >= 0 (0 takes all)")

    @torch.no_grad()
    def measure(self, subject: Subject) -> Measurement:
        corpus = load_corpus(DataConfig(corpus="wic"))
        require_choice("split", self.split, corpus.splits)
        pairs, unknown = encode_pairs(corpus, self.split, subject.text.tokenizer, self.pairs)
        same_P = torch.tensor([pair.same for pair in pairs], dtype=torch.bool)
        if not 0 < int(same_P.sum()) < len(pairs):
            raise InputError(
                f"{len(pairs)} pairs of wic have targets that this run's corpus knows, and not of both kinds; "
                "use a run on a larger text, or more --pairs"
            )
        vectors = _vectors(subject, pairs).items()
        rows = [{**site.columns(), **_distances(words_NF, at_P2, same_P)} for site, (words_NF, at_P2) in vectors]
        summary = site_summary(rows, QUANTITIES)
        summary |= {"pairs_same": int(same_P.sum()), "pairs_different": int((~same_P).sum()), "pairs_unknown": unknown}
        return Measurement(summary, rows)


def encode_pairs(corpus: Corpus, split: str, tokenizer: Tokenizer, most: int) -> tuple[list[Pair], int]:
    """The first `most` (0 = all) pairs whose target is known in both sentences, and how many are not."""
    texts, labels = corpus.splits[split].texts, corpus.splits[split].labels
    if labels is None or corpus.classes is None:
        raise InputError(f"the {split} split of wic has no labels; use another")
    pairs: list[Pair] = []
    unknown = 0
    for text, label in itertools.islice(zip(texts, labels, strict=True), most or None):
        _, places, *sentences = text.split("\t")
        encoded = [
            _encode(tokenizer, sentence.split(), int(place))
            for sentence, place in zip(sentences, places.split("-"), strict=True)
        ]
        (first, i), (second, j) = encoded
        if tokenizer.unknown_id is not None and tokenizer.unknown_id in (first[i], second[j]):
            unknown += 1
        else:
            pairs.append(Pair((first, second), (i, j), corpus.classes[label] == "T"))
    return pairs, unknown


def _encode(tokenizer: Tokenizer, words: Sequence[str], place: int) -> tuple[list[int], int]:
    """Ids of a sentence, and the place of the last token of its word number `place`."""

    def ids(part: Sequence[str]) -> list[int]:
        found = tokenizer.encode(" ".join(part)).tolist()
        return found[:-1] if tokenizer.kind == "word" and tokenizer.lines else found  # without its <eos>

    return ids(words), len(ids(words[: place + 1])) - 1


def _vectors(subject: Subject, pairs: Sequence[Pair]) -> dict[Site, tuple[Tensor, Tensor]]:
    """Per site the vectors N x F of all tokens of all sentences, and where the targets' are among them, P x 2."""
    sentences = [sentence for pair in pairs for sentence in pair.sentences]
    places = torch.tensor([pair.places for pair in pairs])
    lengths = torch.tensor([len(sentence) for sentence in sentences])
    starts = lengths.cumsum(0) - lengths
    seen: dict[Site, list[Tensor]] = {}
    whole: dict[Site, list[Tensor]] = {}
    rows = 0

    def see(site: Site, call: Call) -> None:
        # Sites inside attention have a row per head, and backward directions read in another order.
        if len(call.y_BTF) == rows and "_reverse" not in site.path:
            seen.setdefault(site, []).append(call.y_BTF)

    head = dict(subject.model.named_children()).get("head")
    with watched(subject.model, see):
        hook = None
        if isinstance(head, nn.Linear) and subject.is_language_model:
            output = Site("output", -1, "head")
            hook = head.register_forward_pre_hook(lambda module, x: see(output, Call(x[0], x[0].detach(), None, 0)))
        for first in range(0, len(sentences), BATCH):
            part = sentences[first : first + BATCH]
            rows = len(part)
            mask_BT = torch.arange(max(map(len, part))) < torch.tensor([len(ids) for ids in part]).unsqueeze(1)
            tokens_BT = torch.zeros(mask_BT.shape, dtype=torch.long)
            tokens_BT[mask_BT] = torch.tensor([i for ids in part for i in ids])
            subject.model(tokens_BT.to(subject.device), mask_BT.to(subject.device))
            for site, columns in seen.items():
                whole.setdefault(site, []).append(torch.cat(columns, 1).cpu()[mask_BT])
            seen.clear()
        if hook is not None:
            hook.remove()
    at_P2 = starts.reshape(-1, 2) + places
    return {site: (torch.cat(parts), at_P2) for site, parts in whole.items()}


def _distances(words_NF: Tensor, at_P2: Tensor, same_P: Tensor) -> dict[str, Any]:
    words = words_NF.double()
    count = len(words)
    one = torch.randint(count, (4096,))
    other = (one + torch.randint(1, max(2, count), one.shape)) % count
    scale = (words[one] - words[other]).norm(dim=-1).mean()
    distance_P = (words[at_P2[:, 0]] - words[at_P2[:, 1]]).norm(dim=-1) / scale
    return {
        "auc": auc(distance_P[~same_P], distance_P[same_P]),
        "distance_same": float(distance_P[same_P].mean()),
        "distance_different": float(distance_P[~same_P].mean()),
        "scale": float(scale),
    }


def auc(larger: Tensor, smaller: Tensor) -> float:
    """Share of pairs (one of each) in which the first is above the second; ties count half."""
    difference = larger.unsqueeze(1) - smaller
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)
