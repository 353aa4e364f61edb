"""What a stage of one item takes, part by part."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Part:
    """What a part of a stage takes for one micro-batch: one item of layers, or what comes before or after them.

    Attributes:
        parameters: The number of weights of the base model.
        weights: Bytes of all parameters and buffers, 4-bit and FP8 ones with their scales.
        trained: The number of trained parameters.
        gradients: Bytes of their gradients.
        optimizer: Bytes of the optimizer state on the device.
        optimizer_on_host: Bytes of optimizer state in host memory between steps, not included in ``optimizer``.
        optimizer_passing: Bytes of the latter that are on the device at once within a step.
        retained: Bytes that the forward pass keeps for the backward pass.
        forward: Peak bytes of the forward pass, on top of all that was held before it.
        backward: Peak bytes of the backward pass, on top of all that was held before it. The parameters' gradients
            already exist or, in a step's first micro-batch, are allocated by this pass.
        flops: Floating-point operations, forward and backward, by element size in bytes.
        moved: Bytes that the other operations read and write.
    """

    parameters: int = 0
    weights: int = 0
    trained: int = 0
    gradients: int = 0
    optimizer: int = 0
    optimizer_on_host: int = 0
    optimizer_passing: int = 0
    retained: int = 0
    forward: int = 0
    backward: int = 0
    flops: dict[int, float] = field(default_factory=dict)
    moved: int = 0


@dataclass
class Trial:
    """A stage of one item.

    Attributes:
        entry: What comes before the item.
        item: The item.
        tail: What comes after it.
        hidden: Bytes sent to the next stage.
        unsaved: Bytes of the item's input, if the item does not save it for its backward pass.
        handover: Bytes that the tail's backward pass leaves on top of what was retained before the tail: the gradient
            of its input, and those of its parameters if this pass allocates them.
        tied: The embedding's weight in the tail; a stage with both ends holds it once.
        offloaded: Bytes of the item's input in host memory.
    """

    entry: Part
    item: Part
    tail: Part
    hidden: int = 0
    unsaved: int = 0
    handover: int = 0
    tied: Part = field(default_factory=Part)
    offloaded: int = 0

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        """Entry, item and tail."""
        return self.entry, self.item, self.tail
