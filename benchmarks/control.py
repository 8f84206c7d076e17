"""How often does the base's AUC interval contain .5 when members and non-members are drawn at random?

    python benchmarks/control.py MODEL SOURCE [PATH] [--records 3000] [--seeds 500] [--each 300]

Scores part of a pool once with the untouched model, then divides it over and over by the tool's own split; a 95%
interval should contain .5 in 95% of them. Prints the share with intervals clustered by group, and without.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from imprint.attacks import ATTACKS, run_attack
from imprint.data import Pool, make_split, read_pool
from imprint.data.tokens import Encoder
from imprint.measures import auc
from imprint.scoring.score import token_stats
from imprint.spec import DataSpec, ModelSpec, Source
from imprint.tuning.locate import locate
from imprint.tuning.models import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("source")
    parser.add_argument("path", nargs="?")
    parser.add_argument("--records", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--each", type=int, default=300)
    args = parser.parse_args()

    spec = DataSpec(
        source=Source(name=args.source, path=args.path), members=args.each, nonmembers=args.each, validation=20
    )
    located = locate(ModelSpec(name=args.model))
    encoder = Encoder(load_tokenizer(located), located.context - 32)
    everything = read_pool(spec)
    records = [example for part in everything.parts.values() for example in part]
    rng = np.random.default_rng(0)
    chosen = tuple(records[n] for n in rng.permutation(len(records))[: args.records])
    chosen = tuple(example for example in chosen if encoder.usable(example) is None)
    pool = Pool(everything.name, {"all": chosen})
    stats = token_stats(load_model(located, "float32", torch.device("cpu")), [encoder(e) for e in chosen], 4096)
    sizes = np.array([encoder(e).zlib_bytes for e in chosen])
    row = {example.id: n for n, example in enumerate(chosen)}
    group = np.array([e.group or e.id for e in chosen])
    print(f"{args.model} on {args.source}: {len(chosen)} records, {len(set(group))} groups, {args.seeds} splits")
    attacks = ("loss", "zlib", "min_k", "min_k_plus")
    scores = {name: run_attack(ATTACKS[name], target=stats, zlib_bytes=sizes) for name in attacks}
    hits = {name: np.zeros(2) for name in attacks}
    for seed in range(args.seeds):
        split = make_split(pool, spec, seed)
        ins, outs = (np.array([row[e.id] for e in side]) for side in (split.members, split.nonmembers))
        for name, score in scores.items():
            clustered = auc(score[ins], score[outs], member_groups=group[ins], nonmember_groups=group[outs])
            hits[name] += [0.5 in clustered, 0.5 in auc(score[ins], score[outs])]
    for name in attacks:
        clustered_share, plain_share = hits[name] / args.seeds
        print(
            f"  {name:12} contains .5: {clustered_share:.1%} clustered, {plain_share:.1%} taking records as independent"
        )


if __name__ == "__main__":
    main()
