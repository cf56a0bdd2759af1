"""Ranks that train one model hold the same weights, bit for bit: this check finds a rank where they
differ.
"""

from collections import Counter

import torch
import xxhash
from torch import Tensor

from pipeline.errors import UserError
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import part, parts


def check_replicas(model: LanguageModel, world: World, step: int) -> None:
    """Ends every rank unless those that should hold the same weights do; rank 0 raises a UserError
    that names the ranks and a parameter. A model that is sharded over all ranks has no replicas to
    compare.

    Each rank sends one number while all is well.
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
    """A hash of the bits of each parameter of this rank.

    Each row's is made on the device, so that 8 bytes a row leave it and not the weights. torch's is
    an exclusive or, which no order of the elements changes: it tells the rows apart, not the
    elements of a row.
    """
    return {
        name: xxhash.xxh3_64_intdigest(_row_hashes(part(parameter.detach())).cpu().numpy().data)
        for name, parameter in model.named_parameters()
    }


def _row_hashes(weights: Tensor) -> Tensor:
    # As integers: 0.0 and -0.0 are equal numbers, and a NaN equals nothing.
    bits = weights.contiguous().view(torch.int32)
    return torch.hash_tensor(bits.unsqueeze(1) if bits.ndim == 1 else bits.flatten(1), 1)
