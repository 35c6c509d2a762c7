"""Which layers get more bits, so that the average is as asked."""

from dataclasses import replace

from lorq.pipeline.plan import Plan


def mix_widths(plan: Plan) -> Plan:
    """The plan with some layers' codes made wider, so that the average is as asked, and never above.

    Raises:
        ValueError: if the average is not between the two widths, or no layer is small enough to be widened.

    Source:
        LoftQ (arXiv:2310.08659) and LoRDS reach 2.25, 2.5 and 3 bits with 4 bits in the first layers and 2 in the rest.
    """
    average, low, wide = plan.options.average_bits, plan.method.bits, plan.options.wide_bits
    if not average:
        return plan
    if not low < average <= wide:
        raise ValueError(
            f"average_bits must be above the method's bits and at most wide_bits, got {average} with bits {low} and "
            f"wide_bits {wide}; lower bits or raise wide_bits"
        )
    sizes = {target: target.out_features * target.in_features for target, method in plan.jobs() if method.bits == low}
    room = (average - low) / (wide - low) * sum(sizes.values())
    mixed = {part: dict(layers) for part, layers in plan.layers.items()}
    for part in mixed if plan.options.wide_layers == "first" else reversed(list(mixed)):
        for target, method in plan.layers[part].items():
            if target in sizes and sizes[target] <= room:
                mixed[part][target] = replace(method, bits=wide)
                room -= sizes[target]
    if mixed == plan.layers:
        raise ValueError(f"average_bits {average} leaves no room for a single layer of {wide} bits; give more")
    return replace(plan, layers=mixed)
