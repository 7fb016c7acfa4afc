"""Losses that layers add to the main one, for example the balancing loss of a router.

The contract, which makes the numbers the same under every layout:

- An attention or MLP class states the names of its losses in `auxiliary_losses`. Its `forward` then returns a pair:
  its result, and a scalar for each name, in fp32 or float64 and with its coefficient applied.
- A loss is a sum over the tokens that the module reads. Training adds the losses of all layers, micro-batches and ranks
  and divides by what the main loss is divided by: the tokens that count in the global batch.
- The losses take part in the gradient and are reported by name, beside the main loss and not in it.

A loss that is no sum over tokens (a product of means over a micro-batch, say) is multiplied by the number of tokens,
and depends on the sizes of micro-batches as it does everywhere.

Losses are results, not side effects, so recompute counts none twice. `parallel.auxiliary_losses` carries them through
tensor parallelism and pipelines.
"""

import torch

AuxiliaryLosses = dict[str, torch.Tensor]
"""Scalars by name."""

ModuleOutput = torch.Tensor | tuple[torch.Tensor, AuxiliaryLosses]
"""What attention, MLP and layer return: a result, and losses where the class states some."""


def split_output(output: ModuleOutput) -> tuple[torch.Tensor, AuxiliaryLosses | None]:
    """Return the result of a module, and its losses if it has any."""
    return (output, None) if isinstance(output, torch.Tensor) else output


def add_losses(first: AuxiliaryLosses | None, second: AuxiliaryLosses | None) -> AuxiliaryLosses | None:
    """Return the sums by name; a name may be in one of the two only."""
    if not first or not second:
        return first or second
    total = dict(first)
    for name, loss in second.items():
        total[name] = total[name] + loss if name in total else loss
    return total
