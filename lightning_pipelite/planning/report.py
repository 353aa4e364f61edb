"""A plan as a user reads it."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.disk_size import disk_size
from lightning_pipelite.planning.leaving_out import faster_without
from lightning_pipelite.planning.planner import Planner, Recommended
from lightning_pipelite.planning.settings import Settings
from lightning_pipelite.planning.stages import StageMemory, step

GIB = 2**30
BAR = 44  # characters of a bar
KINDS = {  # of what a stage holds: the character and the name
    "weights": ("█", "weights"),
    "gradients": ("▓", "gradients"),
    "optimizer": ("▒", "optimizer"),
    "activations": ("░", "activations"),
    "transient": ("▚", "comes and goes"),
    "reserve": ("·", "reserve"),
}


@dataclass
class Report:
    """A plan and its recommendation; printed as text.

    Attributes:
        planner: That made it.
        settings: What the configuration says.
        split: The bounds of the configuration's stages, or of all pieces.
        policies: What the stages take with each policy of activation memory, on that split.
        recommended: With what a step is fastest; None if nothing fits.
        largest: The most tokens of a sequence that fit the recommended split, or the configuration's.
        fewest: The fewest stages that fit, and with which policy.
        slow_devices: That a step would be faster without some of the devices; empty if it would not.
    """

    planner: Planner
    settings: Settings
    split: list[int]
    policies: dict[str, list[StageMemory]]
    recommended: Recommended | None
    largest: int | None
    fewest: tuple[int, str] | None
    slow_devices: str = ""

    @classmethod
    def of(cls, planner: Planner, settings: Settings) -> Report:
        """Plan."""
        devices = planner.devices.count
        if devices % settings.stages:
            raise ConfigurationError(
                f"pipeline_stages={settings.stages} must divide the number of devices ({devices}); change one of them."
            )
        pieces = settings.virtual_stages
        split = planner.split(settings.stages, settings.partition_method, planner.policies[0], pieces)
        policies = {policy: planner.stages(split, policy, virtual_stages=pieces) for policy in planner.policies}
        recommended = planner.recommend()
        largest = fewest = None
        if planner.memory is not None:
            fewest = planner.fewest_devices()
            if recommended:
                found = recommended
                largest = planner.largest_sequence(found.bounds, planner.policies[-1], found.virtual_stages)
        slow = (
            ""
            if recommended is None
            else faster_without(planner, recommended.stages, recommended.policy, recommended.virtual_stages)
        )
        return cls(planner, settings, split, policies, recommended, largest, fewest, slow)

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.planner.devices.count

    @property
    def policy(self) -> str:
        """The policy that is shown: the configuration's, if the model can do so."""
        asked = self.settings.model.get("activation_memory", "auto")
        if asked in self.policies:
            return str(asked)
        return next((name for name, stages in self.policies.items() if self.planner.fits(stages)), [*self.policies][-1])

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._stages(), "", *self._policies(), "", *self._advice()])

    def _head(self) -> list[str]:
        model, planner = self.settings.model, self.planner
        count = sum(stage.parameters for stage in self.policies[self.policy])
        trained = sum(stage.trained for stage in self.policies[self.policy])
        size = f" of {self._sizes()}" if planner.memory else ""
        if planner.devices.speeds:
            size += f", of speeds {', '.join(f'{speed:g}' for speed in planner.devices.speeds)}"
        adapter = type(planner.layers.adapter).__name__
        held = {"load_in_4bit": " on 4-bit weights", "load_in_fp8": " on FP8 weights"}
        bits = next((words for option, words in held.items() if model.get(option)), "")
        pieces = f" of {self.settings.virtual_stages} pieces each" if self.settings.virtual_stages > 1 else ""
        return [
            f"{model['model_dir']}: {count / 1e9:.2f} billion parameters ({disk_size(planner.layers.meta_model)}), "
            f"{adapter}{bits}, {trained / 1e6:.1f} million trained",
            f"{self.devices} device{'s' * (self.devices > 1)}{size}, {self.settings.stages} stage"
            f"{'s' * (self.settings.stages > 1)}{pieces}, {planner.micro_batches} micro-batches a step of "
            f"{planner.sequence_len} tokens",
        ]

    def _stages(self) -> list[str]:
        stages = self.policies[self.policy]
        widest = max(stage.total for stage in stages)
        sizes = self.planner.devices.memory_of_stages(len(stages))
        scale = max(widest, *sizes, 0)
        wide = max(9, *(len(self._span(stage)) for stage in stages))
        lines = [f"activation_memory {self.policy}, partition_method {self.settings.partition_method}, in GiB"]
        lines.append(
            f"{'stage':>5} {'layers':>{wide}} {'params':>8} {'weights':>8} {'grads':>7} {'optim.':>7} {'activ.':>7} "
            f"{'passing':>7} {'loss':>6} {'reserve':>7} {'total':>7} {'time':>8}"
        )
        for number, stage in enumerate(stages):
            lines.append(
                f"{number:>5} {self._span(stage):>{wide}} {stage.parameters / 1e9:>7.2f}B {stage.weights / GIB:>8.2f} "
                f"{stage.gradients / GIB:>7.2f} {stage.optimizer / GIB:>7.2f} {stage.activations / GIB:>7.2f} "
                f"{stage.transient / GIB:>7.2f} {stage.loss / GIB:>6.2f} {stage.reserve / GIB:>7.2f} "
                f"{stage.total / GIB:>7.2f} {1e3 * stage.seconds:>5.0f} ms"
            )
        lines.append("")
        for number, stage in enumerate(stages):
            lines.append(f"{number:>5} {self._bar(stage, scale, sizes[number] if sizes else None)} {gib(stage.total)}")
        lines.append("      " + "  ".join(f"{mark} {name}" for mark, name in KINDS.values()))
        sent = [stage.sent for stage in stages[:-1]]
        if sent:
            waits = 1 - step(stages, self.planner.micro_batches).efficiency
            lines.append(
                f"      bubble {waits:.0%} of the time; over each boundary "
                f"{', '.join(sorted({gib(size) for size in sent}))} a step"
            )
        return lines

    def _span(self, stage: StageMemory) -> str:
        layers = self.planner.layers.meta_model.groups
        return "+".join(f"{layers[start]}-{layers[stop] - 1}" for start, stop in stage.spans)

    def _bar(self, stage: StageMemory, scale: int, size: int | None) -> str:
        marks, so_far = "", 0
        for name, (mark, _) in KINDS.items():
            so_far += getattr(stage, name)
            marks += mark * (round(BAR * so_far / scale) - len(marks))
        room = BAR - len(marks)
        fits = size is None or stage.total <= size
        return f"|{marks}{' ' * room}{'|' if fits else '> does not fit'}"

    def _sizes(self) -> str:
        return ", ".join(gib(size) for size in dict.fromkeys(self.planner.devices.memory))

    def _policies(self) -> list[str]:
        lines = [f"{'activation_memory':<18}{'fullest stage':>14}{'step':>10}   "]
        for name, stages in self.policies.items():
            fullest = max(stage.total for stage in stages)
            time = step(stages, self.planner.micro_batches).seconds
            verdict = "" if self.planner.memory is None else "fits" if self.planner.fits(stages) else "does not fit"
            lines.append(f"{name:<18}{gib(fullest):>14}{time:>8.2f} s   {verdict}")
        lines.append("(times on H100 GPUs)")
        return lines

    def _advice(self) -> list[str]:
        planner = self.planner
        if planner.memory is None:
            return ["Give --memory, such as --memory 24GiB, to learn what fits."]
        lines = []
        if self.slow_devices:
            lines.append(f"{self.slow_devices[0].upper()}{self.slow_devices[1:]}")
        if self.recommended is None:
            last = [*self.policies][-1]
            ways = ", ".join(["use more devices", *planner.layers.lighter_weights])
            lines.append(
                f"Nothing fits {self.devices} x {self._sizes()}, not even {self.devices} stages with "
                f"activation_memory {last}: {ways}, or a shorter sequence_len."
            )
            return lines
        replicas = self.devices // self.recommended.stages
        options = {**self.recommended.options, "activation_memory": self.recommended.policy}
        lines.append(
            f"Recommended: {', '.join(f'{name}: {value}' for name, value in options.items())}; {replicas} "
            f"replica{'s' * (replicas > 1)}."
        )
        if self.largest is not None:
            lines.append(f"The largest sequence_len on that split is {self.largest}, with {planner.policies[-1]}.")
        if self.fewest is not None:
            count, how = self.fewest
            lines.append(f"The fewest devices that fit: {count}, with activation_memory {how}.")
        if "load_in_fp8" in planner.layers.lighter_weights:
            lines.append(
                "Faster still, in half the memory for frozen layers, on GPUs with FP8 (Ada, Hopper and later): "
                "load_in_fp8."
            )
        return lines


def gib(size: float) -> str:
    """Return bytes in words."""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
