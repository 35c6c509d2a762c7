"""Which layers get more bits, so that the average is as asked."""

from dataclasses import replace

from lorq.methods import Method
from lorq.models.blocks import Target
from lorq.pipeline.options import Options


def mix_widths(
    plan: dict[str, dict[Target, Method]], method: Method, options: Options
) -> dict[str, dict[Target, Method]]:
    """The plan with some layers' codes made wider, so that the average is as asked, and never above.

    Raises:
        ValueError: if the average is not between the two widths, or no layer is small enough to be widened.

    Source:
        LoftQ (arXiv:2310.08659) and LoRDS reach 2.25, 2.5 and 3 bits with 4 bits in the first layers and 2 in the rest.
    """
    average, low, wide = options.average_bits, method.bits, options.wide_bits
    if not average:
        return plan
    if not low < average <= wide:
        raise ValueError(
            f"average_bits must be above the method's bits and at most wide_bits, got {average} with bits {low} and "
            f"wide_bits {wide}; lower bits or raise wide_bits"
        )
    sizes = {t: t.out_features * t.in_features for layers in plan.values() for t, m in layers.items() if m.bits == low}
    room = (average - low) / (wide - low) * sum(sizes.values())
    mixed = {block: dict(layers) for block, layers in plan.items()}
    for block in mixed if options.wide_layers == "first" else reversed(list(mixed)):
        for target in plan[block]:
            if target in sizes and sizes[target] <= room:
                mixed[block][target] = replace(plan[block][target], bits=wide)  # type: ignore[type-var]
                room -= sizes[target]
    if mixed == plan:
        raise ValueError(f"average_bits {average} leaves no room for a single layer of {wide} bits; give more")
    return mixed
