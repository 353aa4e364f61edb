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
        optimizer: Bytes of the optimizer's state.
        optimizer_on_host: Bytes of it that wait in the host's memory between steps, and are not in ``optimizer``.
        optimizer_passing: Bytes of these that are on the device at once within a step.
        retained: Bytes that a forward keeps for the backward pass.
        forward: The most bytes at once in the forward pass, beside all that was held before it.
        backward: The most bytes at once in the backward pass, beside all that was held before it. The gradients of the
            parameters are there already, or, in a step's first micro-batch, are made then.
        flops: Floating-point operations forward and backward, by the size of the elements in bytes.
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
        hidden: Bytes of what is handed on to the next stage.
        unsaved: Bytes of the item's input, if the item does not keep it for its backward pass.
        handover: Bytes that the tail's backward leaves beside what was retained before it: the gradient of its input,
            and those of its parameters if they are made then.
        tied: What of the tail is the embedding's weight; a stage that has both holds it once.
        offloaded: Bytes of the item's input that wait in the host's memory.
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
