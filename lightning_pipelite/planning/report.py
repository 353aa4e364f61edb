"""A plan as text for the user."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.disk_size import disk_size
from lightning_pipelite.planning.fit_command import STRATEGY, fit_command
from lightning_pipelite.planning.leaving_out import faster_without
from lightning_pipelite.planning.planner import MARGIN, Planner, Recommended
from lightning_pipelite.planning.settings import Settings, gib
from lightning_pipelite.planning.stage_table import stage_lines
from lightning_pipelite.planning.stages import StageMemory, step
from lightning_pipelite.planning.ways import other_transpose_cache, ways_to_fit


@dataclass
class Report:
    """A plan and its recommendation; printed as text.

    Attributes:
        planner: The planner that made it, with the configuration's micro-batches per step.
        settings: The settings in the configuration.
        policies: What the configuration's stages take with each activation memory policy, cut as ``fit`` cuts for it.
        recommended: The settings with which a step is fastest; None if nothing fits.
        largest: The most tokens per sequence that fit with the recommended split; None if not known.
        fewest: The fewest stages that fit, and with which policy; None if not known.
        words: Options of ``pipelite fit`` that were given, as on the command line.
        replaced: Options that replace the configuration's.
        ways: What would fit, if nothing does.
        slow_devices: A sentence if a step would be faster without some of the devices, else empty.
        transpose_cache: A sentence if it would be with another ``fp8_transpose_cache``, else empty.
    """

    planner: Planner
    settings: Settings
    policies: dict[str, list[StageMemory]]
    recommended: Recommended | None
    largest: int | None
    fewest: tuple[int, str] | None
    words: Sequence[str] = ()
    replaced: Mapping[str, object] = field(default_factory=dict)
    ways: list[str] = field(default_factory=list)
    slow_devices: str = ""
    transpose_cache: str = ""

    @classmethod
    def of(
        cls,
        planner: Planner,
        settings: Settings,
        words: Sequence[str] = (),
        replaced: Mapping[str, object] | None = None,
    ) -> Report:
        """Make a plan and return its report."""
        devices = planner.devices.count
        if devices % settings.stages:
            raise ConfigurationError(
                f"pipeline_stages={settings.stages} must divide the number of devices ({devices}); change one of them."
            )
        pieces = settings.virtual_stages
        policies = {}
        for policy in planner.policies:
            split = planner.split(settings.stages, settings.partition_method, policy, pieces)
            policies[policy] = planner.stages(split, policy, virtual_stages=pieces)
        report = cls(planner, settings, policies, None, None, None, words, replaced or {})
        found = report.recommended = planner.recommend(report.sequences)
        if found is not None:
            chosen = planner.of(found.micro_batches)
            report.slow_devices = faster_without(chosen, found.stages, found.policy, found.virtual_stages)
            report.transpose_cache = other_transpose_cache(planner, found, report.sequences)
        if planner.memory is None:
            return report
        if found is not None:
            report.fewest = planner.fewest_devices()
            report.largest = chosen.largest_sequence(found.bounds, planner.policies[-1], found.virtual_stages)
        else:
            report.ways = ways_to_fit(planner, report.sequences)
        return report

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.planner.devices.count

    @property
    def sequences(self) -> int:
        """The configured number of sequences per step, over all replicas."""
        return self.settings.micro_batches * (self.devices // self.settings.stages)

    @property
    def policy(self) -> str:
        """The configuration's policy if the model supports it, else the first that fits, as ``auto`` chooses."""
        asked = self.settings.model.get("activation_memory", "auto")
        if asked in self.policies:
            return str(asked)
        return next((name for name, stages in self.policies.items() if self.planner.fits(stages)), [*self.policies][-1])

    @property
    def shown(self) -> list[StageMemory]:
        """The stages to show: the recommended ones, or the configuration's."""
        if (found := self.recommended) is None or self.planner.memory is None:
            return self.policies[self.policy]
        return self.planner.of(found.micro_batches).stages(found.bounds, found.policy, None, found.virtual_stages)

    @property
    def shown_policy(self) -> str:
        """The policy of the stages to show."""
        found = self.recommended
        return self.policy if found is None or self.planner.memory is None else found.policy

    @property
    def command(self) -> str | None:
        """The command that trains as recommended; None if nothing fits or the memory is not known."""
        if (found := self.recommended) is None or self.planner.memory is None:
            return None
        options: dict[str, object] = dict(self.replaced)
        if found.micro_batches != self.settings.micro_batches:
            options["trainer.accumulate_grad_batches"] = found.micro_batches
        options[f"{STRATEGY}.pipeline_stages"] = found.stages
        if found.virtual_stages != self.settings.virtual_stages:
            options[f"{STRATEGY}.virtual_stages"] = found.virtual_stages
        if found.stages > 1:
            options[f"{STRATEGY}.partition_method"] = found.method
        elif self.settings.partition_method != "uniform":
            options[f"{STRATEGY}.partition_method"] = "uniform"
        options["model.activation_memory"] = found.policy
        return fit_command(self.words, options)

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._recommendation(), "", *self._all(), *self._notes()])

    def _head(self) -> list[str]:
        model, planner = self.settings.model, self.planner
        # The uncut model: in separate stages, the embedding and the head would count their tied weight twice.
        (whole,) = planner.stages([0, len(planner.layers)], self.policy)
        held = {"load_in_4bit": " on 4-bit weights", "load_in_fp8": " on FP8 weights"}
        stored = f", {told}" if (told := planner.layers.weights_told) else ""
        bits = next((words for option, words in held.items() if model.get(option)), "")
        devices = f"{self.devices} device{'s' * (self.devices > 1)}"
        if planner.memory is not None:
            devices += f" of {self._sizes()}"
        if planner.devices.speeds:
            devices += f", with relative speeds {', '.join(f'{speed:g}' for speed in planner.devices.speeds)}"
        lines = [
            f"{model['model_dir']}: {whole.parameters / 1e9:.2f} billion parameters "
            f"({disk_size(planner.layers.meta_model)}{stored}), "
            f"{type(planner.layers.adapter).__name__}{bits}, {whole.trained / 1e6:.1f} million trained",
            f"{devices}; {self.sequences} sequence{'s' * (self.sequences > 1)} of {planner.sequence_len} tokens "
            "per step",
        ]
        if planner.memory is not None:
            limits = ", ".join(gib(int((1 - MARGIN) * size)) for size in dict.fromkeys(planner.devices.memory))
            lines.append(f"A stage may take {limits}: {MARGIN:.0%} is kept free, as a plan may be that much too low.")
        return lines

    def _recommendation(self) -> list[str]:
        planner, found = self.planner, self.recommended
        if planner.memory is None:
            given = self.settings
            words = _stages_in_words(given.stages, given.virtual_stages)
            told = f"As configured: {words}, {self._replicas(given.stages)}, activation_memory {self.policy}"
            return [f"{told}:", "", *stage_lines(planner, self.shown)]
        if found is None:
            best = [*planner.policies][-1]
            most = planner.stage_counts(self.sequences)[-1]
            full = planner.of(self.sequences * most // self.devices)
            least = max(stage.total for stage in full.stages(full.split(most, "auto", best), best))
            stages = f"{most} stage{'s' * (most > 1)}"
            lines = [
                f"Nothing fits {self.devices} x {self._sizes()}: {stages} with activation_memory {best} would "
                f"take {gib(least)}" + (" on the fullest device." if self.devices > 1 else ".")
            ]
            if not self.ways:
                return [*lines, "Use devices with more memory, or a smaller model."]
            return [*lines, "Any one of these would make it fit:", *(f"  - {way}" for way in self.ways)]
        options = {**found.options, "activation_memory": found.policy}
        if found.stages == 1:
            del options["partition_method"]  # there is nothing to cut
        words = ", ".join(f"{name}: {value}" for name, value in options.items())
        speed = self.sequences * planner.sequence_len / found.seconds
        return [
            f"Recommended: {words}; {self._replicas(found.stages)}.",
            f"{found.seconds:.2f} s per step, {in_three_digits(speed)} tokens/s ({self._whose_times}).",
            "",
            *stage_lines(planner.of(found.micro_batches), self.shown),
            "",
            *(self.command or "").split("\n"),
        ]

    def _sizes(self) -> str:
        return ", ".join(gib(size) for size in dict.fromkeys(self.planner.devices.memory))

    def _replicas(self, stages: int) -> str:
        replicas = self.devices // stages
        each = self.sequences // replicas
        return f"{replicas} replica{'s' * (replicas > 1)} with {each} micro-batch{'es' * (each > 1)} per step"

    @property
    def _whose_times(self) -> str:
        gpu = self.planner.gpu
        return f"estimated for {gpu.name}s from {'measured' if gpu.measured else 'published'} rates"

    def _all(self) -> list[str]:
        """Return a table of all that was tried for the same number of sequences, the configuration's split first."""
        given, planner = self.settings, self.planner
        configured = _stages_in_words(given.stages, given.virtual_stages)
        lines = [
            f"At {self.sequences} sequence{'s' * (self.sequences > 1)} per step ({self._whose_times}):",
            f"  {'stages':>6} {'replicas':>8}  {'activation_memory':<18}{'fullest stage':>14}{'step':>11}",
            f"as configured, {configured}, partition_method {given.partition_method}:",
            *(self._row(given.stages, policy, stages, planner) for policy, stages in self.policies.items()),
        ]
        rows = []
        for count in planner.stage_counts(self.sequences):
            if count == given.stages and (count == 1 or given.partition_method == "auto") and given.virtual_stages == 1:
                continue
            other = planner.of(self.sequences * count // self.devices)
            for policy in other.policies:
                stages = other.stages(other.split(count, "auto", policy), policy)
                rows.append(self._row(count, policy, stages, other))
        return [*lines, "with partition_method auto:", *rows] if rows else lines

    def _row(self, count: int, policy: str, stages: Sequence[StageMemory], planner: Planner) -> str:
        fullest = max(stage.total for stage in stages)
        time = step(stages, planner.micro_batches).seconds
        verdict = "" if planner.memory is None else "fits" if planner.fits(stages) else "does not fit"
        row = f"  {count:>6} {self.devices // count:>8}  {policy:<18}{gib(fullest):>14}{time:>9.2f} s   {verdict}"
        return row.rstrip()

    def _notes(self) -> list[str]:
        planner, lines = self.planner, [""]
        if self.slow_devices:
            lines.append(f"{self.slow_devices[0].upper()}{self.slow_devices[1:]}")
        if planner.memory is None:
            return [
                "",
                "Give --memory, such as --memory 24GiB, or --device, such as --device 4090, to see what fits.",
            ]
        if self.largest is not None and self.recommended is not None:
            lines.append(
                f"The largest sequence_len with the recommended split is {self.largest}, with activation_memory "
                f"{planner.policies[-1]}."
            )
        if self.fewest is not None:
            count, how = self.fewest
            lines.append(f"The fewest devices that fit: {count}, with activation_memory {how}.")
        if (on_host := self.on_host) and "offload" in planner.policies:
            lines.append(
                f"offload takes up to {gib(on_host)} of page-locked memory on each host, besides the processes' own."
            )
        if optimizer := max(stage.optimizer_on_host for stage in self.shown):
            lines.append(
                f"offload_optimizer keeps up to {gib(optimizer)} of a stage's optimizer state in page-locked host "
                "memory; each step copies it to the device and back."
            )
        layers = planner.layers
        if layers.packed and not layers.meta_model.fits_varlen():
            lines.append(
                "Documents are kept apart by masks, which is slow for long sequences: FlashAttention does not support "
                "this model's attention."
            )
        fp8 = planner.gpu.fp8 is not None and "load_in_fp8" in planner.layers.lighter_weights
        if fp8 and self.recommended is not None:
            lines.append(
                "Faster still, with half the memory for frozen layers, on GPUs with FP8 (Ada, Hopper and later): "
                "--model.load_in_fp8 true."
            )
        if self.transpose_cache:
            lines.append(self.transpose_cache)
        return lines if len(lines) > 1 else []

    @property
    def on_host(self) -> int:
        """Bytes of each host's memory that offload takes, with the recommended split or the configuration's."""
        if "offload" not in self.policies:
            return 0
        stages = self.policies["offload"]
        if (found := self.recommended) is not None:
            planner = self.planner.of(found.micro_batches)
            stages = planner.stages(found.bounds, "offload", virtual_stages=found.virtual_stages)
        replicas = self.devices // len(stages)
        return math.ceil(replicas * sum(stage.on_host for stage in stages) / self.settings.hosts)


def _stages_in_words(stages: int, virtual_stages: int) -> str:
    return f"{stages} stage{'s' * (stages > 1)}" + f" of {virtual_stages} pieces each" * (virtual_stages > 1)


def in_three_digits(speed: float) -> str:
    """Format an estimate with no more than three significant digits."""
    if speed < 1000:
        return f"{speed:.0f}"
    return f"{round(speed, 2 - math.floor(math.log10(speed))):,.0f}"
