"""How often are the validity gates red on clean random splits, and how often when the non-members are shifted?

    python benchmarks/gates.py [--sources world/articles world/triples world/news] [--seeds 100] [--each 300]
                               [--strengths .1 .2 .5 1] [--planted 30]
    python benchmarks/gates.py --sources webnlg=../shared/data/webnlg --strengths

Clean: the tool's own random split, by the seed. Planted: a share of the non-members is replaced by records that the
split left over and that are all of one subject, towns for articles and triples, parades for news, as WebNLG's official
test part holds categories that training never saw. A source `name=folder` is a benchmark in a folder; its official
split is judged too, where it has one. Base control: a part of the pool is scored once and only divided anew.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch

from imprint.attacks import run_attack
from imprint.data import Pool, make_split, read_pool
from imprint.data.tokens import Encoder
from imprint.gates import Gate, base_control, blind_baseline, blind_scores, overlap, overlap_gate, power
from imprint.gates.judge import Sides
from imprint.scoring.score import token_stats
from imprint.spec import DataSpec, ModelSpec, Source
from imprint.tuning.locate import locate
from imprint.tuning.models import load_model, load_tokenizer
from imprint.types import Example, Floats, Split

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus")
SUBJECT = {"world/articles": " town", "world/triples": " : region : ", "world/news": " parade "}
"""What the records of one subject hold and no other does."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", default=list(SUBJECT))
    parser.add_argument("--model", default="tiny/gpt2-medium")
    parser.add_argument("--records", type=int, default=3000, help="records of a pool that are scored")
    parser.add_argument("--seeds", type=int, default=100, help="clean splits")
    parser.add_argument("--planted", type=int, default=30, help="splits for each strength")
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.1, 0.2, 0.5, 1.0])
    parser.add_argument("--each", type=int, default=300)
    args = parser.parse_args()
    for source in args.sources:
        name, _, folder = source.partition("=")
        spec = DataSpec(
            source=Source(name=name, path=folder or None), members=args.each, nonmembers=args.each, validation=20
        )
        pool = read_pool(spec)
        official = len(pool.parts) > 1
        sample, scores = scored(pool, spec, args.model, args.records)
        report(f"{name}, random", judged(sample, spec, scores, range(args.seeds)))
        for strength in args.strengths if name in SUBJECT else []:
            found = judged(sample, spec, scores, range(args.planted), strength)
            report(f"{name}, {strength:.0%} of the non-members of one subject", found)
        if official:
            spec = spec.model_copy(update={"split": "official"})
            report(f"{name}, official", judged(sample, spec, scores, range(args.planted)))


def scored(pool: Pool, spec: DataSpec, model: str, records: int) -> tuple[Pool, dict[str, dict[str, float]]]:
    """A part of the pool, and attack → id → score of its records on the untuned base."""
    located = locate(ModelSpec(name=model))
    encoder = Encoder(load_tokenizer(located), located.context - 32)
    rng = np.random.default_rng(0)
    parts = {part: tuple(e for e in found if encoder.usable(e) is None) for part, found in pool.parts.items()}
    # Whole groups: a split of a pool whose groups were thinned out would have fewer records that depend on others.
    kept = {part: whole_groups(found, round(records / len(parts)), rng) for part, found in parts.items()}
    chosen = [e for part in kept.values() for e in part]
    encoded = [encoder(e) for e in chosen]
    stats = token_stats(load_model(located, "float32", torch.device("cpu")), encoded, 4096)
    sizes = np.array([record.zlib_bytes for record in encoded])
    scores = {name: run_attack(name, target=stats, zlib_bytes=sizes) for name in ATTACKS}
    by_id = {name: dict(zip([e.id for e in chosen], found.tolist(), strict=True)) for name, found in scores.items()}
    return Pool(pool.name, kept), by_id


def whole_groups(records: tuple[Example, ...], count: int, rng: np.random.Generator) -> tuple[Example, ...]:
    """Records of random groups until there are `count`."""
    labels = sorted({e.group or e.id for e in records})
    sizes = Counter(e.group or e.id for e in records)
    order = [labels[n] for n in rng.permutation(len(labels))]
    taken = np.cumsum([sizes[label] for label in order]) <= count
    chosen = {label for label, take in zip(order, taken, strict=True) if take}
    return tuple(e for e in records if (e.group or e.id) in chosen)


def judged(
    pool: Pool, spec: DataSpec, scores: Mapping[str, Mapping[str, float]], seeds: Iterable[int], strength: float = 0.0
) -> list[list[Gate]]:
    """The gates of each seed's split."""
    return [gates(shifted(make_split(pool, spec, seed), pool, strength, seed), scores, seed) for seed in seeds]


def shifted(split: Split, pool: Pool, strength: float, seed: int) -> Split:
    """The split with a share of its non-members replaced by left-over records of one subject."""
    count = round(strength * len(split.nonmembers))
    if not count:
        return split
    used = {e.group or e.id for side in (split.members, split.nonmembers, split.validation) for e in side}
    cue = SUBJECT[pool.name]
    spare = [e for e in pool.parts["all"] if (e.group or e.id) not in used and cue in e.prompt + e.target]
    assert len(spare) >= count, f"{pool.name} has {len(spare)} left-over records of one subject, not {count}"
    rng = np.random.default_rng(seed)
    chosen = [spare[n] for n in rng.permutation(len(spare))[:count]]
    return replace(split, nonmembers=(*split.nonmembers[count:], *chosen))


def gates(split: Split, scores: Mapping[str, Mapping[str, float]], seed: int) -> list[Gate]:
    members, nonmembers = split.members, split.nonmembers
    groups = [e.group or e.id for e in members], [e.group or e.id for e in nonmembers]
    blind = blind_scores(members, nonmembers, groups, seed)
    cut = len(members)
    base = {name: (_of(members, by_id), _of(nonmembers, by_id)) for name, by_id in scores.items()}
    halves: dict[str, Sides] = {name: (score[:cut], score[cut:]) for name, score in blind.items()}
    return [
        base_control(base, groups),
        blind_baseline(halves, groups),
        overlap_gate(overlap(members, nonmembers)),
        power(base["loss"], groups),
    ]


def _of(records: tuple[Example, ...], by_id: Mapping[str, float]) -> Floats:
    return np.array([by_id[e.id] for e in records])


def report(title: str, found: list[list[Gate]]) -> None:
    """Share of splits in which each gate is red, and the mean AUCs."""
    print(f"{title}, {len(found)} splits", flush=True)
    for column in zip(*found, strict=True):
        red = np.mean([gate.state == "red" for gate in column])
        aucs = [gate.figures["auc"] for gate in column if "auc" in gate.figures]
        means = {key: np.mean([one[key]["value"] for one in aucs]) for key in (aucs[0] if aucs else {})}
        print(f"  {column[0].name:15} red {red:6.1%}  {', '.join(f'{key} {mean:.3f}' for key, mean in means.items())}")


if __name__ == "__main__":
    main()
