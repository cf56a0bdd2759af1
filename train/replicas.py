"""Ranks that train one model hold the same weights, bit for bit: this check finds a rank where they
differ.
"""

from collections import Counter

import torch
import xxhash

from pipeline.errors import UserError
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import part, parts


def check_replicas(model: LanguageModel, world: World, step: int) -> None:
    """Ends every rank unless those that should hold the same weights do; rank 0 raises a UserError
    that names the ranks and a parameter. A model that is sharded over all ranks has no replicas to
    compare.

    Each rank sends one number while all is well. Hashing runs at memory speed: XXH3 takes 0.1 s for
    124M weights.
    """
    count = parts(next(model.parameters()))
    if world.size == count:
        return
    hashes = parameter_hashes(model)
    totals = world.gather(hash(tuple(hashes.values())))
    if totals == totals[:count] * (world.size // count):
        return
    # Rank r holds shard r modulo count; of its replicas the majority is taken to be right.
    everyones = world.gather(hashes)
    usual = [Counter(tuple(each.values()) for each in everyones[i::count]).most_common(1)[0][0] for i in range(count)]
    odd = [rank for rank, each in enumerate(everyones) if tuple(each.values()) != usual[rank % count]]
    first = next(name for i, name in enumerate(hashes) if any(everyones[r][name] != usual[r % count][i] for r in odd))
    with world.fail_together():
        if world.is_first:
            raise UserError(
                f"at step {step} the weights of rank(s) {', '.join(map(str, odd))} of {world.size} differ from the others', "
                f"first in {first}: check their memory and network links; started again, the run resumes from its last checkpoint"
            )


def parameter_hashes(model: LanguageModel) -> dict[str, int]:
    """XXH3 of every parameter's bytes."""
    return {
        name: xxhash.xxh3_64_intdigest(part(parameter.detach()).cpu().contiguous().view(torch.uint8).numpy().data)
        for name, parameter in model.named_parameters()
    }
